"""Foretold outputs: exact for networks that add up, and for single choices of any network."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from additive import BranchTask, Perplexity, Regression
from tiny import Bench, TinyTask, make_bench

from search.errors import DataError
from search.quality.evaluate import batch_scores
from search.sensitivity.choices import choices_of, positions
from search.sensitivity.forward import forward_scores
from search.sensitivity.superposition import Superposition, default_reading, merge_superpositions
from search.solve.readings import cross_entropy, divergence_to, error, margin_error
from search.tasks.function import FunctionTask
from search.tasks.task import Task


def swept(bench: Bench, **options) -> Superposition:
    return forward_scores(bench.task, bench.simulated, choices_of(bench.space), **options).superposition


def branches(task: Task) -> Bench:
    return make_bench(task, weight=("int2", "int3", "float"), input=("float",))


def random_points(bench: Bench, count: int) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [list(bench.space.encode(bench.space.sample(rng))) for _ in range(count)]


def measured(bench: Bench, point: list[int]) -> float:
    """The true metric of a point on the calibration split."""
    model = bench.simulated.apply(bench.space.decode(point))
    return bench.task.reduce(batch_scores(bench.task, model, bench.task.batches("calibration")))


@pytest.mark.parametrize(
    "task", [BranchTask(), BranchTask(shape=(3,)), Perplexity()], ids=["rows", "sequences", "nats"]
)
def test_exact_where_choices_add_up(task: Task) -> None:
    bench = branches(task)
    found = swept(bench)
    for point in random_points(bench, 8):
        at = positions(bench.space, point)
        assert found.metric(task, at) == pytest.approx(measured(bench, point), rel=1e-5)
        wrong = found.losses(at[None], "error")[0]
        if task.higher_is_better:
            assert 1 - wrong == pytest.approx(measured(bench, point))
        else:
            assert np.exp(found.losses(at[None])[0]) == pytest.approx(measured(bench, point), rel=1e-5)


def test_exact_for_single_choices() -> None:
    bench = make_bench(weight=("int2", "int4", "float"), input=("uint4", "float"))
    found = swept(bench)
    floats = [len(decision.formats) - 1 for decision in bench.space.decisions]
    for index, decision in enumerate(bench.space.decisions):
        for choice in range(len(decision.formats)):
            point = [*floats[:index], choice, *floats[index + 1 :]]
            at = positions(bench.space, point)
            assert found.metric(bench.task, at) == measured(bench, point)
            assert found.changes[at[index]].any() == (choice != floats[index]), "float changes nothing"


def test_perplexity_of_wide_outputs_is_exact_for_single_choices() -> None:
    task = Perplexity(outputs=60, shape=(3,))
    bench = branches(task)
    found = swept(bench, outputs=6)
    assert found.changes.shape == (12, 216, 6)
    assert found.has_rest
    assert found.shapes is None
    for point in ([0, 2, 2], [2, 1, 2], [2, 2, 0]):
        at = positions(bench.space, [*point, 0, 0, 0])
        assert np.exp(found.losses(at[None], "cross_entropy")[0]) == pytest.approx(
            measured(bench, point + [0] * 3), rel=1e-5
        )
        assert found.metric(task, at) is None, "outputs were left out"


def test_losses_are_readings_of_outputs(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    found = swept(bench)
    points = np.array([positions(bench.space, point) for point in random_points(bench, 7)])
    outputs = np.stack([found.outputs(at) for at in points])
    by_hand = found.base + sum(found.changes[at] for at in points[3])
    assert outputs[3] == pytest.approx(by_hand, abs=1e-5)
    monkeypatch.setattr("search.sensitivity.superposition.CHUNK", 2 * found.base.size)
    for name, read in (("margin_error", margin_error), ("cross_entropy", cross_entropy), ("error", error)):
        assert found.losses(points, name) == pytest.approx(read(outputs, found.targets), rel=1e-5)
    assert found.losses(points, "divergence_to") == pytest.approx(divergence_to(outputs, found.reference), rel=1e-5)
    assert np.array_equal(found.losses(points), found.losses(points, "margin_error"))


def test_the_rest_is_no_rival() -> None:
    """The rest stands for many classes: more than each of them, so it may not take part where classes are compared."""
    found = swept(branches(BranchTask(outputs=60)), outputs=6)
    crowded = replace(found, base=np.concatenate([found.base[:, :-1], np.full((len(found.base), 1), 99.0)], 1))
    at = np.array([[2, 5, 8]])
    assert crowded.losses(at, "error") == found.losses(at, "error")
    assert found.seen_by("error").changes.shape[2] == found.seen_by("error").base.shape[1] == 5
    assert found.seen_by("cross_entropy").changes.shape[2] == 6
    assert found.seen_by("divergence_to").targets.shape == found.base.shape


def test_outputs_that_are_no_logits() -> None:
    bench = make_bench(Regression(), weight=("int2", "float"), input=("float",))
    found = swept(bench)
    assert found.reading == "squared"
    assert found.targets is None
    assert found.losses(np.array([[1, 3, 5, 7, 8, 9, 10]]))[0] == 0, "float"
    at = positions(bench.space, [0, 1, 1, 1, 0, 0, 0])
    assert found.metric(bench.task, at) == pytest.approx(measured(bench, [0, 1, 1, 1, 0, 0, 0]), rel=1e-6)
    with pytest.raises(DataError, match=r"margin_error needs a target class.*take one of divergence_to, squared"):
        found.losses(at[None], "margin_error")


@pytest.mark.parametrize("outputs", [64, 3])
def test_saved_and_loaded(bench: Bench, tmp_path: Path, outputs: int) -> None:
    found = swept(bench, outputs=outputs)
    found.save(tmp_path / "superposition.npz")
    again = Superposition.load(tmp_path / "superposition.npz")
    assert (again.reading, again.has_rest, again.shapes) == (found.reading, found.has_rest, found.shapes)
    for name in ("base", "changes", "reference", "targets", "samples"):
        assert np.array_equal(getattr(again, name), getattr(found, name))
        assert getattr(again, name).dtype == getattr(found, name).dtype


def test_shards_of_different_scorings(bench: Bench) -> None:
    with pytest.raises(DataError, match="shards of the same scoring"):
        merge_superpositions([swept(bench, outputs=3), swept(bench)])


def test_reading_that_stands_for_the_metric() -> None:
    def judged(task: Task, by: str) -> bool:
        return default_reading(task, has_logits=True) == by

    function = {"model": TinyTask().model, "example_input": 0, "calibration": [0], "evaluate": lambda model, split: 0.0}
    assert judged(TinyTask(), "margin_error")
    assert judged(Perplexity(), "cross_entropy")
    assert judged(FunctionTask(**function), "margin_error")
    assert judged(FunctionTask(**function, higher_is_better=False), "divergence_to")
    assert default_reading(TinyTask(), has_logits=False) == "squared"
