"""The forward sweep against brute force, closed forms, and itself: resumed, in shards, at another base."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from additive import BranchTask, Perplexity, Regression
from scipy.special import rel_entr, softmax
from test_gram import is_semidefinite
from tiny import Bench, TinyTask, make_bench

from hwmodels import Format, Precision
from search.errors import ConfigError, DataError
from search.quantize.prefix import PrefixRunner
from search.quantize.simulate import exact_inference
from search.sensitivity.choices import Base, choices_of, positions
from search.sensitivity.forward import ForwardScores, forward_scores, merge_scores
from search.sensitivity.pairs import pair_divergences
from search.tasks.function import FunctionTask
from search.tasks.task import Task


def swept(bench: Bench, base: Base | None = None, **options) -> ForwardScores:
    return forward_scores(bench.task, bench.simulated, choices_of(bench.space), base, **options)


def outputs(bench: Bench, policy: Base) -> list[torch.Tensor]:
    with exact_inference():
        model = bench.simulated.apply(policy)
        return [bench.task.outputs(model, batch).clone() for batch in bench.task.batches("calibration")]


def mean_divergence(bench: Bench, policy: Base) -> float:
    both = zip(outputs(bench, {}), outputs(bench, policy), strict=True)
    return float(torch.cat([bench.task.divergence(*pair) for pair in both]).mean())


def low_bits(bench: Bench) -> dict[str, Precision]:
    return {layer: Precision.parse("int4/uint4") for unit in bench.space.units for layer in unit.layers}


def same(found: ForwardScores, expected: ForwardScores, exactly: bool = False) -> None:
    """Equal, up to rounding of sums unless `exactly`."""
    tolerance = 0 if exactly else 1e-9
    for name in ("kl", "loss", "drop", "linear", "score", "constant", "base_score"):
        if getattr(expected, name) is None:
            assert getattr(found, name) is None
            continue
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=tolerance, abs=tolerance), name
    assert found.gram.total == pytest.approx(expected.gram.total, rel=tolerance, abs=tolerance)
    assert found.gram.count == expected.gram.count
    ours, theirs = found.superposition.arrays(), expected.superposition.arrays()
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    "task", [BranchTask(), Perplexity(shape=(4,)), TinyTask()], ids=["top-1", "perplexity", "no loss"]
)
def test_scores_are_measured(task: Task) -> None:
    bench = make_bench(task, weight=("int2", "int4", "float"), input=("int4",))
    found, choices = swept(bench), choices_of(bench.space)
    batches = list(task.batches("calibration"))

    def mean(read, policy: Base) -> np.ndarray:
        return (
            torch.cat([read(out, b) for out, b in zip(outputs(bench, policy), batches, strict=True)]).double().numpy()
        )

    for position, choice in enumerate(choices):
        policy = choice.on({})
        assert found.kl[position] == pytest.approx(mean_divergence(bench, policy), rel=1e-9, abs=1e-12)
        drop = task.reduce(mean(task.score, {})) - task.reduce(mean(task.score, policy))
        assert found.drop[position] == pytest.approx(drop if task.higher_is_better else -drop, abs=1e-9)
        if isinstance(task, BranchTask):
            rise = mean(task.loss, policy).mean() - mean(task.loss, {}).mean()
            assert found.loss[position] == pytest.approx(rise, abs=1e-6)
        else:
            assert found.loss is None
    assert found.constant == 0
    assert not found.linear.any()


def test_interactions_are_products_in_the_fisher_metric(bench: Bench) -> None:
    found, choices = swept(bench), choices_of(bench.space)
    z = torch.cat(outputs(bench, {})).double().numpy()
    p = softmax(z, 1)
    metric = np.einsum("ni,ij->nij", p, np.eye(5)) - p[:, :, None] * p[:, None]
    changes = np.stack([torch.cat(outputs(bench, choice.on({}))).double().numpy() - z for choice in choices])
    expected = np.einsum("ani,nij,bnj->ab", changes, metric, changes) / len(z)
    assert found.gram.mean == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert found.gram.count == 48
    assert is_semidefinite(found.gram.mean)
    assert is_semidefinite(found.scaled)


def test_interactions_are_those_measured_where_changes_are_small() -> None:
    bench = make_bench(BranchTask(), weight=("int8", "float"), input=("int8",))
    choices = choices_of(bench.space)
    pairs = [(0, 2), (0, 4), (2, 4), (0, 7), (6, 8)]
    found = swept(bench).gram.mean
    with torch.no_grad():  # float64, since products of two small changes drown in float32
        task = bench.task
        task.model.double()
        task._batches = [batch.double() for batch in task._batches]
        task.example_input = task._batches[0][:2]
    bench = make_bench(task, weight=("int8", "float"), input=("int8",))
    true = pair_divergences(bench.task, bench.simulated, choices, pairs)
    assert [found[pair] for pair in pairs] == pytest.approx(true, rel=0.1, abs=1e-7)
    assert np.diag(found) == pytest.approx(2 * swept(bench).kl, rel=0.05, abs=1e-9)


def test_pairs_are_what_both_cost_beyond_each(bench: Bench) -> None:
    choices = choices_of(bench.space)
    pairs = [(0, 3), (3, 12), (0, 12)]
    for base in ({}, low_bits(bench)):
        found = pair_divergences(bench.task, bench.simulated, choices, pairs, base)
        for (i, j), interaction in zip(pairs, found, strict=True):
            both, one, other = (
                mean_divergence(bench, policy)
                for policy in (choices[j].on(choices[i].on(base)), choices[i].on(base), choices[j].on(base))
            )
            assert interaction == pytest.approx(both - one - other + mean_divergence(bench, base), rel=1e-9, abs=1e-12)
    with pytest.raises(ConfigError, match="exclude each other"):
        pair_divergences(bench.task, bench.simulated, choices, [(0, 1)])


def test_scaled_interactions_are_exact_for_single_choices(bench: Bench) -> None:
    for base in ({}, low_bits(bench)):
        found = swept(bench, base)
        alone = found.constant + found.linear + np.diag(found.scaled) / 2
        assert alone - found.constant == pytest.approx(found.kl, rel=1e-6, abs=1e-9)
        assert is_semidefinite(found.scaled)


def test_another_base(bench: Bench) -> None:
    """Scores are rises over the base, divergences still those from the float network."""
    base, choices = low_bits(bench), choices_of(bench.space)
    found = swept(bench, base)
    assert found.constant == pytest.approx(mean_divergence(bench, base), rel=1e-9)
    z0, z = (torch.cat(outputs(bench, policy)).double().numpy() for policy in ({}, base))
    p, q = softmax(z0, 1), softmax(z, 1)
    for position, choice in enumerate(choices):
        change = torch.cat(outputs(bench, choice.on(base))).double().numpy() - z
        assert found.kl[position] + found.constant == pytest.approx(mean_divergence(bench, choice.on(base)), rel=1e-9)
        assert found.linear[position] == pytest.approx((change * (q - p)).sum(1).mean(), rel=1e-4, abs=1e-7)
        bregman = rel_entr(q, softmax(z + change, 1)).sum(1).mean()
        assert found.curvature[position] == pytest.approx(bregman, rel=1e-4, abs=1e-6), "the divergence from the base"
        if choice.is_in(base):
            assert (
                found.kl[position]
                == found.linear[position]
                == found.drop[position]
                == found.gram.total[position].sum()
                == 0
            )
            assert not found.superposition.changes[position].any()
    inside = [choice.is_in(base) for choice in choices]
    assert 0 < sum(inside) < len(inside)
    assert found.superposition.base == pytest.approx(z, abs=1e-6)
    assert found.superposition.reference == pytest.approx(z0, abs=1e-6)


def test_forecasts_from_the_base_are_best_near_it() -> None:
    """Two decisions away from the fewest bits, scores told apart from there foretell better than those from float."""
    bench = make_bench(BranchTask(outputs=8), weight=("int2", "int3", "float"), input=("uint2", "int3", "float"))
    base = bench.space.decode([0] * len(bench.space.decisions))
    points = []
    for i, j in combinations(range(len(bench.space.decisions)), 2):
        point = [0] * len(bench.space.decisions)
        point[i], point[j] = 1, 2
        points.append(point)
    true = np.array([mean_divergence(bench, bench.space.decode(point)) for point in points])

    def error(found: ForwardScores) -> float:
        at = [positions(bench.space, point) for point in points]
        forecasts = [found.constant + found.linear[p].sum() + found.scaled[np.ix_(p, p)].sum() / 2 for p in at]
        return float(np.abs(np.array(forecasts) - true).mean())

    assert error(swept(bench, base)) < 0.5 * error(swept(bench))


@pytest.mark.parametrize("kept", [0, 1, 9, 18])
def test_resuming_measures_only_the_rest(bench: Bench, tmp_path: Path, kept: int, monkeypatch) -> None:
    whole = swept(bench, directory=tmp_path / "whole")
    files = sorted((tmp_path / "whole").iterdir())
    assert len(files) == 18
    assert {file.suffix for file in files} == {".npz"}
    (tmp_path / "part").mkdir()
    for file in files[:kept]:
        (tmp_path / "part" / file.name).write_bytes(file.read_bytes())

    measured, progress, sweep = [], [], PrefixRunner.sweep
    monkeypatch.setattr(
        PrefixRunner, "sweep", lambda self, policies, read: measured.extend(policies) or sweep(self, policies, read)
    )
    again = swept(bench, directory=tmp_path / "part", progress=lambda *step: progress.append(step))
    same(again, whole, exactly=True)
    same(swept(bench), whole, exactly=True)
    assert len(measured) == 18 - kept + 18
    assert progress == [(done, 18) for done in range(1, 19)]
    assert {file.name for file in (tmp_path / "part").iterdir()} == {file.name for file in files}


def test_results_of_other_settings_are_not_taken(bench: Bench, tmp_path: Path) -> None:
    for index, options in enumerate(({}, {"seed": 1}, {"width": 2}, {"base": low_bits(bench)}, {"shard": (0, 2)}), 1):
        before = len(list(tmp_path.iterdir()))
        swept(bench, directory=tmp_path, **options)
        assert len(list(tmp_path.iterdir())) > before, index


def test_damaged_results(bench: Bench, tmp_path: Path) -> None:
    swept(bench, directory=tmp_path)
    path = sorted(tmp_path.iterdir())[3]
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=f"{path.name} is damaged .*delete it"):
        swept(bench, directory=tmp_path)


@pytest.mark.parametrize("options", [{}, {"outputs": 6, "numbers": 6 * 40, "width": 8}], ids=["all", "reduced"])
@pytest.mark.parametrize("count", [2, 3])
def test_shards_merge_to_the_whole(options: dict[str, int], count: int) -> None:
    bench = make_bench(Perplexity(outputs=20, shape=(4,)), weight=("int2", "int4"), input=("int4",))
    for base in ({}, low_bits(bench)):
        parts = [swept(bench, base, shard=(index, count), **options) for index in range(count)]
        assert [part.samples for part in parts] == ([42, 30] if count == 2 else [30, 30, 12])
        merged, whole = merge_scores(bench.task, parts), swept(bench, base, **options)
        same(merged, whole)
        assert merged.samples == 72
        assert len(whole.superposition.base) == (40 if options else 288)


@pytest.mark.parametrize("shard", [(2, 2), (-1, 2), (0, 4), (0, 0)])
def test_shards_there_are_none_of(shard: tuple[int, int]) -> None:
    bench = make_bench(BranchTask(), weight=("int2",), input=("int4",))
    with pytest.raises(ConfigError, match=r"of 3 calibration batches; give \(i, n\) with 0 <= i < n <= 3"):
        swept(bench, shard=shard)


def test_projected_interactions_keep_their_mean() -> None:
    bench = make_bench(BranchTask(outputs=40), weight=("int2", "int4"), input=("int4",))
    exact = swept(bench).gram.mean
    found = [swept(bench, width=8, seed=seed).gram.mean for seed in range(40)]
    size = np.sqrt(np.diag(exact))
    errors = (np.array(found) - exact) / size / size[:, None]
    assert np.abs(errors).max() < 0.6
    assert np.abs(errors.mean(0)).max() < 0.06
    assert 0.01 < errors.std(0).mean() < 0.1, "sqrt(2 / 8 / 72) = 0.06 for independent samples of the same size"
    assert all(is_semidefinite(form) for form in found)


def test_many_samples_share_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(BranchTask(outputs=40), weight=("int2",), input=("int4",))
    exact = swept(bench).gram.mean
    monkeypatch.setattr("search.sensitivity.lens.FEATURES", 72 * 3)
    found = swept(bench).gram.mean
    assert not np.allclose(found, exact, rtol=1e-3)
    assert np.diag(found) == pytest.approx(np.diag(exact), rel=0.5)


def test_a_divergence_alone_gives_interactions() -> None:
    bench = make_bench(Regression(), weight=("int2", "int4"), input=("uint4",))
    found, choices = swept(bench), choices_of(bench.space)
    z = torch.cat(outputs(bench, {})).double().numpy()
    changes = np.stack([torch.cat(outputs(bench, choice.on({}))).double().numpy() - z for choice in choices])
    assert found.gram.mean == pytest.approx(2 * np.einsum("ani,bni->ab", changes, changes) / len(z), rel=1e-4, abs=1e-9)
    assert np.diag(found.gram.mean) / 2 == pytest.approx(found.kl, rel=1e-4, abs=1e-9), "exact at any distance"
    there = swept(bench, low_bits(bench))
    assert there.linear + np.diag(there.gram.mean) / 2 == pytest.approx(there.kl, rel=1e-3, abs=1e-6)


def test_function_task_with_squared_error() -> None:
    tiny = TinyTask()
    task = FunctionTask(
        tiny.model,
        tiny.example_input,
        [batch[0] for batch in tiny.batches("calibration")],
        lambda model, split: 0.0,
        divergence="squared_error",
    )
    found = swept(make_bench(task, weight=("int2", "int4"), input=("uint4",)))
    assert np.diag(found.gram.mean) / 2 == pytest.approx(found.kl, rel=1e-4, abs=1e-9)
    assert found.drop is None
    assert found.score is None
    assert found.loss is None
    assert found.superposition.reading == "squared"
    assert found.superposition.metric(task, np.array([0])) is None


class NotANumber(TinyTask):
    def divergence(self, reference: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        return super().divergence(reference, outputs) + (0 if torch.equal(reference, outputs) else torch.nan)

    def tangent(self, reference: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
        return change


class OneForAll(NotANumber):
    def divergence(self, reference: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
        return (reference - outputs).square().mean()


def test_divergences_that_are_none() -> None:
    with pytest.raises(DataError, match=r"the divergence is nan with the (weight|input) of .* in u?int"):
        swept(make_bench(NotANumber()))
    with pytest.raises(DataError, match=r"divergence returned shape \(\); it must return one value per sample"):
        swept(make_bench(OneForAll()))


def test_nothing_to_decide() -> None:
    bench = make_bench(weight=("float",), input=("float",))
    found = swept(bench)
    assert not found.kl.any()
    assert not found.gram.total.any()
    assert all(choice.format == Format.parse("float") for choice in choices_of(bench.space))
