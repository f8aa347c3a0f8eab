"""What samplers choose: numbers that respect the formats' order, and blocks of layers that share one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import Synthetic
from tiny import make_bench

from hwmodels import Format
from search.space import Decision, SearchSpace, Unit
from search.strategies.samplers import Tpe
from search.strategies.samplers.parameters import MANY, Parameters, block_of

INTS = tuple(map(Format.parse, ("int2", "int4", "int8")))
UINTS = tuple(map(Format.parse, ("uint4", "uint8")))


def space_of(weights: dict[str, tuple[Format, ...]], inputs: tuple[Format, ...] = UINTS) -> SearchSpace:
    """A space of layers that each read a tensor of their own."""
    names = list(weights)
    decisions = [Decision(name, "weight", (name,), weights[name]) for name in names]
    decisions += [Decision(f"{name}.input", "input", (name,), inputs) for name in names]
    units = tuple(Unit(name, (name,), (), at, len(names) + at) for at, name in enumerate(names))
    return SearchSpace(tuple(decisions), units)


RESNET = ["conv1", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.downsample.0", "fc"]


@pytest.mark.parametrize(
    ("layers", "blocks"),
    [
        (RESNET, ["", "layer1.0", "layer1.0", "layer2.0", "layer2.0", ""]),
        (["h.0.attn.q", "h.0.attn.o", "h.0.mlp.up", "h.0.mlp.down", "head"], ["h.0.attn"] * 2 + ["h.0.mlp"] * 2 + [""]),
        (["features.1.conv.0.0", "features.1.conv.1.0", "features.1.conv.2"], ["features.1.conv"] * 3),
        (["alone"], [""]),
        ([], []),
    ],
)
def test_blocks_are_the_smallest_modules_with_company(layers: list[str], blocks: list[str]) -> None:
    assert block_of(layers) == dict(zip(layers, blocks, strict=True))


def test_ties_keep_sides_and_formats_apart() -> None:
    space = space_of(dict.fromkeys(RESNET, INTS) | {"layer2.0.downsample.0": INTS[1:], "fc": INTS[-1:]})
    tied = Parameters.of(space, "block")
    assert {item.name: [space.decisions[at].name for at in item.decisions] for item in tied.parameters} == {
        "weight conv1": ["conv1"],
        "weight layer1.0.*": ["layer1.0.conv1", "layer1.0.conv2"],
        "weight layer2.0.conv1": ["layer2.0.conv1"],
        "weight layer2.0.downsample.0": ["layer2.0.downsample.0"],
        "input conv1.input": ["conv1.input"],
        "input layer1.0.*": ["layer1.0.conv1.input", "layer1.0.conv2.input"],
        "input layer2.0.*": ["layer2.0.conv1.input", "layer2.0.downsample.0.input"],
        "input fc.input": ["fc.input"],
    }, "the pinned weight of fc is no parameter"
    point = tied.point({item.name: item.levels - 1 for item in tied.parameters})
    assert point == (2, 2, 2, 2, 1, 0, 1, 1, 1, 1, 1, 1)
    assert [item.decisions for item in Parameters.of(space, "none").parameters] == [(at,) for at in space.free]


def test_names_tell_lists_of_formats_apart() -> None:
    layers = {f"block.{number}": INTS if number < 2 else INTS[:2] for number in range(4)}
    names = [item.name for item in Parameters.of(space_of(layers), "block").parameters]
    assert names == ["weight block.* (int2, int4, int8)", "weight block.* (int2, int4)", "input block.*"]


@pytest.mark.parametrize(("layers", "parameters"), [(MANY // 2, MANY), (MANY // 2 + 1, 2)])
def test_auto_ties_large_spaces(layers: int, parameters: int) -> None:
    space = space_of({f"stage.{number}": INTS for number in range(layers)})
    assert len(Parameters.of(space, "auto").parameters) == parameters
    assert len(Parameters.of(space, "none").parameters) == 2 * layers


@given(st.lists(st.integers(0, 2), min_size=6, max_size=6), st.integers(0, 2**32 - 1))
def test_nearest_is_nearest(levels: list[int], seed: int) -> None:
    """No other choice of a block changes fewer formats by fewer steps: held against all choices."""
    space = space_of(dict.fromkeys(RESNET, INTS), inputs=UINTS[:1])
    tied = Parameters.of(space, "block")
    point = (*levels, *[0] * 6)

    def distance(chosen: dict[str, int]) -> int:
        return int(np.abs(np.subtract(tied.point(chosen), point)).sum())

    nearest = tied.nearest(point)
    for parameter in tied.parameters:
        assert distance(nearest) == min(distance(nearest | {parameter.name: level}) for level in range(3))
    assert tied.nearest(tied.point(nearest)) == nearest
    for neighbour in tied.neighbours(point, np.random.default_rng(seed)):
        assert sum(abs(neighbour[name] - nearest[name]) for name in nearest) == 1


def test_orders_and_sizes() -> None:
    parameters = Parameters.of(make_bench().space)
    assert {name: (d.low, d.high) for name, d in parameters.distributions.items()}["weight head"] == (0, 2)
    assert parameters.size == 648
    uniform = [parameters.point(chosen) for chosen in parameters.uniform()]
    assert uniform == [tuple(min(level, len(d.formats) - 1) for d in parameters.space.decisions) for level in (2, 1, 0)]
    nothing = Parameters.of(make_bench(weight=["int8"], input=["uint8"]).space)
    assert (nothing.size, nothing.distributions, list(nothing.uniform())) == (1, {}, [{}])


def test_a_tied_search_keeps_starts_that_no_block_can_express(tmp_path: Path) -> None:
    """One number stands for the weights of all layers of one space here, yet every start is measured as it is."""
    bench = make_bench()
    synthetic = Synthetic(bench, {"weight_bytes": float(np.quantile(bench.costs("weight_bytes"), 0.5))})
    blocks = dict.fromkeys(bench.network.names, "net")
    strategy = Tpe(12, tie="block")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("search.strategies.samplers.parameters.block_of", lambda layers: blocks)
        starts = [p for p in bench.space if synthetic.objective(tmp_path / "x", strategy).is_feasible(p)][7:40:11]
        trials, _ = synthetic.search(strategy, tmp_path / "trials.jsonl", starts=lambda objective: starts)
        tied = Parameters.of(bench.space, "block")
    assert tied.size == 6
    points = [bench.space.encode(trial.policy) for trial in trials]
    assert [trial.policy for trial in trials[: len(starts)]] == starts
    assert any(tied.point(tied.nearest(point)) != point for point in points[: len(starts)])
    nearest = [tied.point(tied.nearest(point)) for point in points[: len(starts)]]
    assert set(nearest) <= set(points), "and what comes nearest is tried, too"
