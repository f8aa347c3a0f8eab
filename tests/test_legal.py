"""What a device cannot run leaves the space, and oracles settle the shortlist."""

from __future__ import annotations

import itertools
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import make_synthetic
from tiny import TinyTask, make_bench

from hwmodels import CostReport, Layer, Network, Precision, StorageModel
from search.api import find_plan
from search.errors import BitplanError, ConfigError
from search.legal import in_words, runnable, without
from search.shortlist import settle
from search.space import SearchSpace, build_space
from search.strategies.baselines import RandomSearch

WEIGHTS, INPUTS = ("int2", "int4", "int8", "int16"), ("uint4", "uint8", "int16", "float")


class Picky(StorageModel):
    """A device that refuses some pairs of formats, of some layers."""

    name = "picky"

    def __init__(self, refused: set[str], layers: set[str] | None = None) -> None:
        self.refused, self.layers = refused, layers

    def refusal(self, layer: Layer, precision: Precision) -> str | None:
        concerns = self.layers is None or layer.name in self.layers
        return f"no {precision} here" if concerns and str(precision) in self.refused else None


def space_of(pins: dict[str, str] | None = None) -> tuple[Network, SearchSpace]:
    network = make_bench().network
    return network, build_space(network, WEIGHTS, INPUTS, pins)


def refused_pairs(space: SearchSpace, network: Network, model: Picky) -> list[tuple[str, str]]:
    return [
        (layer, str(precision))
        for layer, precisions in space.layer_choices.items()
        for precision in precisions
        if model.refusal(network[layer], precision)
    ]


def test_nothing_is_lost_where_nothing_is_refused() -> None:
    network, space = space_of()
    assert runnable(space, network, Picky(set())) == (space, ())


def test_formats_that_never_run_are_dropped_with_the_reason() -> None:
    network, space = space_of()
    model = Picky({f"int2/{format}" for format in INPUTS})
    kept, dropped = runnable(space, network, model)
    assert {str(f) for d in kept.decisions if d.side == "weight" for f in d.formats} == {"int4", "int8", "int16"}
    assert all(
        kept.decisions[u.weight].formats == tuple(dict.fromkeys(c.weight for c in u.choices)) for u in kept.units
    )
    assert [d.formats for d in kept.decisions if d.side == "input"] == [
        d.formats for d in space.decisions if d.side == "input"
    ]
    assert {(entry.side, entry.format) for entry in dropped} == {("weight", "int2")}
    assert in_words(dropped) == ("weight format int2 dropped for 4 layers: no int2/uint4 here",)


def test_only_the_layers_concerned_lose_a_format() -> None:
    network, space = space_of()
    kept, dropped = runnable(space, network, Picky({f"int2/{format}" for format in INPUTS}, {"left"}))
    assert [entry.layers for entry in dropped] == [("left",)]
    assert sum(len(decision.formats) for decision in kept.decisions) == sum(len(d.formats) for d in space.decisions) - 1


def test_pairs_of_their_own_width_leave_the_larger_product() -> None:
    """A device that runs 8-bit inputs with 4 and 8-bit weights, and 16 with 16: the odd one out goes."""
    network, space = space_of()
    allowed = {"int4/uint8", "int8/uint8", "int16/int16"}
    everything = {f"{w}/{a}" for w, a in itertools.product(WEIGHTS, INPUTS)}
    kept, _ = runnable(space, network, Picky(everything - allowed))
    assert {str(p) for choices in kept.layer_choices.values() for p in choices} == {"int4/uint8", "int8/uint8"}


@settings(max_examples=40, deadline=None)
@given(st.sets(st.sampled_from([f"{w}/{a}" for w, a in itertools.product(WEIGHTS, INPUTS)]), max_size=14))
def test_what_is_left_runs(refused: set[str]) -> None:
    network, space = space_of()
    model = Picky(refused)
    try:
        kept, dropped = runnable(space, network, model)
    except ConfigError:
        assert len(refused) >= 4, "only whole rows of pairs can leave a decision empty"
        return
    assert not refused_pairs(kept, network, model)
    assert bool(dropped) == bool(refused)
    assert without(space, [asdict(entry) for entry in dropped]) == kept


def test_pins_stay_and_the_other_side_gives_way() -> None:
    network, space = space_of({"stem": "int2"})
    kept, dropped = runnable(space, network, Picky({"int2/uint4"}))
    stem = kept.units[0]
    assert [str(choice) for choice in stem.choices] == ["int2/uint8", "int2/int16", "int2/float"]
    assert dropped


def test_nothing_left_is_an_error_that_says_why() -> None:
    network, space = space_of()
    model = Picky({f"{w}/{a}" for w, a in itertools.product(WEIGHTS, INPUTS)}, {"head"})
    with pytest.raises(
        ConfigError, match=r"picky can run none of space\.\w+ = .* for head.*: no int.* here.*hardware show"
    ):
        runnable(space, network, model)


class Oracle(StorageModel):
    """Its table says bytes, its oracle says that some policies take more."""

    def __init__(self, heavier: set[str]) -> None:
        self.heavier, self.asked = heavier, 0

    def confirm(self, network, policy, workload) -> CostReport:  # type: ignore[no-untyped-def]
        self.asked += 1
        report = self.network_cost(network, policy, workload)
        if policy.digest in self.heavier:
            return replace(report, total=replace(report.total, weight_bytes=1e9), source="oracle")
        return replace(report, source="oracle")


def test_the_oracle_settles_the_shortlist(tmp_path: Path) -> None:
    problem = make_synthetic(share=0.7)
    (limit,) = problem.limits.values()
    trials, objective = problem.search(RandomSearch(evaluations=20), tmp_path / "trials.jsonl")
    best, second, *_ = ranked = sorted((trial for trial in trials if trial.is_whole), key=objective.rank)

    def winner(*heavier: str) -> tuple[str, float]:
        objective.pricing = replace(objective.pricing, cost_model=Oracle(set(heavier)))
        trial, report = settle(objective, trials)
        assert report is not None
        assert report.source == "oracle"
        return trial.digest, report.total.weight_bytes

    assert winner()[0] == best.digest
    assert winner(best.digest)[0] == second.digest
    assert winner(best.digest)[1] <= limit
    everything = winner(*(trial.digest for trial in ranked))
    assert everything == (best.digest, 1e9), "where nothing keeps the limit the best stays, and its price says so"
    assert settle(problem.objective(tmp_path / "other.jsonl", RandomSearch()), trials) == (best, None)
    with pytest.raises(BitplanError, match="no policy within budget was measured in 0 proposals"):
        settle(objective, [])


def test_a_space_of_one_policy_is_searched(tmp_path: Path) -> None:
    """Where the device leaves nothing to decide there still is a plan, and its cautions say what was dropped."""

    class Only(Picky):
        def __init__(self) -> None:
            super().__init__(
                {f"{w}/{a}" for w in ("int2", "int4", "int8") for a in ("uint4", "uint8")} - {"int8/uint8"}
            )

    plan = find_plan(
        TinyTask(),
        hardware=Only(),
        budget={"size_ratio": 1.0},
        space={"weight": ["int2", "int4", "int8"], "input": ["uint4", "uint8"]},
        run_dir=tmp_path / "run",
    )
    assert {str(precision) for precision in plan.policy.values()} == {"int8/uint8"}
    assert any("int2" in caution and "dropped for" in caution for caution in plan.cautions)
