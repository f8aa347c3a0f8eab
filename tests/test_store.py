"""The evaluation store: what it serves is what would be measured, to the last bit, and nothing is measured twice."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conformance import what
from hypothesis import given
from hypothesis import strategies as st
from tiny import Bench, TinyTask, make_bench
from torch import Tensor, nn

from hwmodels import Precision
from search.objective import SpentError
from search.plan import fingerprint
from search.policy import Policy
from search.quality.dealing import LEAST, dealing_keeps_bits, pieces_of, rest_of
from search.quality.evaluate import Evaluator
from search.quality.loop_repair import choose_repair
from search.quality.racing import Racing
from search.quality.store import SampleScores, StoreWarning, _narrowest, open_store
from search.quality.subsets import shuffle_split
from search.quantize.settings import QuantizerSettings
from search.strategies.baselines import RandomSearch
from search.tasks.digits import Digits
from search.tasks.function import FunctionTask
from search.tasks.task import Task
from search.trials import Trial, TrialLog

RACING = Racing(first=16, growth=1.5)
MEASURED: list[int] = []  # samples of every batch that was scored


class Counted(TinyTask):
    """Says how many samples were scored."""

    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        MEASURED.append(len(outputs))
        return super().score(outputs, batch)


class Alone(Counted):
    """Computes every sample by itself, so that its batch cannot alter a bit."""

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return torch.cat([model(image[None]) for image in batch[0]])


class Loss(Counted):
    """Judged by cross-entropy, whose last bits depend on the batch."""

    metric, higher_is_better = "cross-entropy", False

    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        super().score(outputs, batch)
        return nn.functional.cross_entropy(outputs, batch[1], reduction="none")


class AloneLoss(Alone):
    """Likewise, sample by sample."""

    metric, higher_is_better = "cross-entropy", False

    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        super().score(outputs, batch)
        pairs = zip(outputs, batch[1], strict=True)
        return torch.stack([nn.functional.cross_entropy(row, label) for row, label in pairs])


class Collapsed(Counted):
    """What is no number is a score, too."""

    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        scores = super().score(outputs, batch)
        return torch.where(batch[1] == 0, torch.nan, scores)


class Uneven(Alone):
    """Batches that name their samples: they cannot be taken apart."""

    def batches(self, split: Any) -> Any:
        images, labels = self._data[split]
        for start in range(0, len(labels), 8):
            yield images[start : start + 8], [int(label) for label in labels[start : start + 8]]

    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        MEASURED.append(len(outputs))
        return (outputs.argmax(-1) == torch.tensor(batch[1])).double()


def stored(
    root: Path, task: Task | None = None, racing: Racing | None = None, quantizer: QuantizerSettings | None = None
) -> Bench:
    """A bench whose evaluator has a store, as another run would make it."""
    bench = make_bench(task or Counted(), quantizer=quantizer)
    store = open_store(root, bench.task, bench.simulated, fingerprint(bench.task.model))
    assert store is not None
    bench.evaluator = Evaluator(bench.task, bench.simulated, racing=racing, store=store)
    return bench


def ready(bench: Bench) -> Evaluator:
    """An evaluator that has probed whatever it wants to know, so that only measurements are counted from now on."""
    evaluator = bench.evaluator
    evaluator.float_scores("selection")
    if evaluator.racing:
        evaluator.race(uniform(bench, "int8/uint4"), [])
    else:
        evaluator.measure(uniform(bench, "int8/uint4"), "selection")
    MEASURED.clear()
    return evaluator


def uniform(bench: Bench, precision: str) -> Policy:
    return Policy.uniform(bench.network, Precision.parse(precision))


def searched(bench: Bench, folder: Path, evaluations: int = 6) -> list[Trial]:
    folder.mkdir()
    objective = bench.objective(folder / "trials.jsonl", {}, RandomSearch(evaluations), primary_cost="bit_ops")
    with suppress(SpentError):
        RandomSearch(evaluations).search(bench.space, objective, np.random.default_rng(0))
    return TrialLog(folder / "trials.jsonl").trials


def files(root: Path, name: str = "*.npz") -> list[Path]:
    return sorted(root.rglob(name))


# --- what is served ---


@pytest.mark.parametrize("racing", [None, RACING], ids=["full", "raced"])
@pytest.mark.parametrize("task", [Counted, Alone, Loss, Uneven], ids=lambda task: task.__name__)
def test_trials_are_the_same_with_and_without_a_store(
    task: Callable[[], Task], racing: Racing | None, tmp_path: Path
) -> None:
    plain = make_bench(task())
    plain.evaluator.racing = racing
    expected = searched(plain, tmp_path / "plain")
    first = searched(stored(tmp_path / "store", task(), racing), tmp_path / "first")
    assert what(first) == what(expected)
    bench = stored(tmp_path / "store", task(), racing)
    ready(bench)
    again = searched(bench, tmp_path / "again")
    assert what(again) == what(expected)
    assert [trial.seconds for trial in again] == [trial.seconds for trial in first], "those of the first run"
    assert all(trial.seconds > 0 for trial in again)
    assert MEASURED == []
    assert bench.evaluator.was_served


@pytest.mark.parametrize("split", ["selection", "report"])
def test_a_full_measurement_answers_any_part(split: Any, tmp_path: Path) -> None:
    first, evaluator = ready(stored(tmp_path)), ready(stored(tmp_path))
    policy = uniform(stored(tmp_path), "int2/uint4")
    expected, seconds = timed(first, lambda: first.scores(policy, split))
    assert not first.was_served
    evaluator.float_scores(split)
    MEASURED.clear()
    for fidelity, count in ((1.0, 120), (0.5, 80), (0.01, 40)):
        scores, again = timed(evaluator, lambda share=fidelity: evaluator.scores(policy, split, share))
        assert np.array_equal(scores, expected[:count])
        assert again == pytest.approx(seconds * count / 120, abs=1e-6)
        assert evaluator.was_served
    assert MEASURED == []


def timed(evaluator: Evaluator, measure: Callable[[], Any]) -> tuple[Any, float]:
    """What comes of a measurement, and the seconds it spent."""
    before = evaluator.seconds
    return measure(), evaluator.seconds - before


def test_a_part_is_completed(tmp_path: Path) -> None:
    evaluator = ready(stored(tmp_path))
    policy = uniform(stored(tmp_path / "other"), "int2/uint4")
    MEASURED.clear()
    part, first = timed(evaluator, lambda: evaluator.scores(policy, "selection", 0.5))
    assert MEASURED == [40, 40]
    whole, total = timed(evaluator, lambda: evaluator.scores(policy, "selection"))
    assert MEASURED == [40, 40, 40], "what was known is not measured again"
    assert not evaluator.was_served
    assert total > first > 0
    assert np.array_equal(whole[:80], part)
    assert np.array_equal(whole, make_bench(Counted()).evaluator.scores(policy, "selection"))
    assert timed(evaluator, lambda: evaluator.scores(policy, "selection"))[1] == pytest.approx(total, abs=1e-9)


def test_scores_that_are_no_numbers_are_known(tmp_path: Path) -> None:
    policy = uniform(stored(tmp_path, Collapsed()), "int2/uint4")
    first = ready(stored(tmp_path, Collapsed())).scores(policy, "selection")
    again = ready(stored(tmp_path, Collapsed()))
    assert first.tobytes() == again.scores(policy, "selection").tobytes()
    assert np.isnan(first).any()
    assert MEASURED == []


# --- races ---


@pytest.mark.parametrize("task", [Alone, AloneLoss, Uneven], ids=lambda task: task.__name__)
def test_a_race_after_a_full_run_measures_nothing(task: Callable[[], Task], tmp_path: Path) -> None:
    full, raced = ready(stored(tmp_path, task())), ready(stored(tmp_path, task(), RACING))
    policy = uniform(stored(tmp_path / "other", task()), "int2/uint4")
    scores, seconds = timed(full, lambda: full.scores(policy, "selection"))
    MEASURED.clear()
    plain = make_bench(task()).evaluator
    plain.racing = RACING
    better = raced.float_scores("selection") + (0 if raced.task.higher_is_better else -0.5)
    for incumbents in ([], [better]):
        expected = plain.race(policy, incumbents)
        MEASURED.clear()
        finish, spent = timed(raced, lambda rivals=incumbents: raced.race(policy, rivals))
        assert MEASURED == []
        assert (finish.quality, finish.fidelity) == (expected.quality, expected.fidelity)
        assert spent == pytest.approx(seconds * finish.fidelity, abs=1e-6)
        assert raced.was_served
    assert finish.fidelity < 1
    assert np.array_equal(raced.race(policy, []).scores, scores)


@pytest.mark.parametrize("task", [Alone, AloneLoss], ids=lambda task: task.__name__)
def test_what_a_stopped_race_left_is_all_that_is_measured(task: Callable[[], Task], tmp_path: Path) -> None:
    full, raced = ready(stored(tmp_path, task())), ready(stored(tmp_path, task(), RACING))
    policy = uniform(stored(tmp_path / "other", task()), "int2/uint4")
    MEASURED.clear()
    better = raced.float_scores("selection") + (0 if raced.task.higher_is_better else -0.5)
    stopped, first = timed(raced, lambda: raced.race(policy, [better]))
    seen = stopped.quality.samples
    assert sum(MEASURED) == seen < 100
    assert raced.race(policy, [better]) == stopped
    assert sum(MEASURED) == seen, "the same race is known"
    scores, total = timed(full, lambda: full.scores(policy, "selection"))
    assert sum(MEASURED) == 120
    assert total > first
    assert np.array_equal(scores, make_bench(task()).evaluator.scores(policy, "selection"))
    MEASURED.clear()
    finish, spent = timed(raced, lambda: raced.race(policy, []))
    assert MEASURED == []
    assert np.array_equal(finish.scores, scores)
    assert spent == pytest.approx(total, abs=1e-9)


def test_a_longer_race_goes_on_where_a_shorter_one_stopped(tmp_path: Path) -> None:
    raced = ready(stored(tmp_path, Loss(), RACING))
    policy = uniform(stored(tmp_path / "other", Loss()), "int2/uint4")
    MEASURED.clear()
    seen = raced.race(policy, [raced.float_scores("selection") - 0.5]).quality.samples
    finish = raced.race(policy, [])
    assert seen < sum(MEASURED) == 120
    plain = make_bench(Loss()).evaluator
    plain.racing = RACING
    assert np.array_equal(finish.scores, plain.race(policy, []).scores)


def test_races_are_kept_apart_where_batches_alter_bits(tmp_path: Path) -> None:
    """Else a search would depend on what others measured before it."""
    full, raced = ready(stored(tmp_path, Loss())), ready(stored(tmp_path, Loss(), RACING))
    policy = uniform(stored(tmp_path / "other", Loss()), "int2/uint4")
    scores = full.scores(policy, "selection")
    MEASURED.clear()
    finish = raced.race(policy, [])
    assert sum(MEASURED) == 120
    assert not np.array_equal(finish.scores, scores), "or this test shows nothing"
    assert {path.parent.name for path in files(tmp_path, f"{policy.digest}.npz")} == {
        "selection",
        "selection_raced_16_1.5_0",
    }
    other = ready(stored(tmp_path, Loss(), Racing(first=16, growth=1.5, seed=1)))
    other.race(policy, [])
    assert sum(MEASURED) == 120, "another order, other batches"


def test_whether_dealing_keeps_bits() -> None:
    for task, expected in ((Alone(), True), (AloneLoss(), True), (Loss(), False), (TinyTask(), False)):
        batches = list(task.batches("selection"))
        split = shuffle_split(batches, lambda batch: np.ones(len(batch[1])), 120, lambda units: [16, units], 0)
        assert dealing_keeps_bits(task, task.model, batches, split) is expected


@pytest.mark.parametrize("task", [TinyTask, Uneven], ids=lambda task: task.__name__)
def test_pieces_are_the_batches_of_a_split(task: Callable[[], Task]) -> None:
    made = task()
    batches = list(made.batches("selection"))
    split = shuffle_split(batches, lambda batch: np.ones(len(batch[1])), 120, lambda units: [units // 4, units], 0)
    images = made._data["selection"][0]
    places = []
    for subset, pieces in zip(split.subsets, pieces_of(split), strict=True):
        assert [piece[0] for piece in pieces] == list(subset.batches)
        for batch, at in pieces:
            assert torch.equal(batch[0], images[at])
            places += at.tolist()
    assert sorted(places) == list(range(120))


def test_what_is_left_of_a_batch_is_never_a_single_row() -> None:
    batch, places, measured = torch.arange(20) * 10, np.arange(100, 120), np.zeros(200, dtype=bool)
    assert rest_of((batch, places), measured)[0] is batch
    measured[100:119] = True
    rest, at = rest_of((batch, places), measured)
    assert len(rest) == LEAST
    assert at[-1] == 119
    assert torch.equal(rest, torch.from_numpy(at - 100) * 10)
    measured[:] = False
    measured[100:105] = True
    assert rest_of((batch, places), measured)[1].tolist() == list(range(105, 120))


# --- what scores depend on ---


class Changed(Counted):
    """The same task, its source another."""


def folder(root: Path, task: Task | None = None, quantizer: QuantizerSettings | None = None) -> Path:
    """Where scores of a policy end up."""
    bench = stored(root, task, quantizer=quantizer)
    policy = uniform(bench, "int4/uint4")
    bench.evaluator.scores(policy, "selection")
    before = set(files(root, f"{policy.digest}.npz"))
    return max(before, key=lambda path: path.stat().st_mtime_ns).parent.parent


def test_what_differs_is_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other_data, other_model, other_setting = Counted(), Counted(), Counted()
    other_data._data["report"][0][0, 0, 0, 0] += 1
    other_model.model.left.bias.data[0] += 1
    other_setting.top = 5  # type: ignore[attr-defined]
    found = [
        folder(tmp_path),
        folder(tmp_path, other_data),
        folder(tmp_path, other_model),
        folder(tmp_path, other_setting),
        folder(tmp_path, Changed()),
        folder(tmp_path, quantizer=QuantizerSettings(weight_range="minmax")),
        folder(tmp_path, quantizer=QuantizerSettings(repair="bias")),
    ]
    forward = TinyTask().model.__class__.forward
    monkeypatch.setattr(TinyTask().model.__class__, "forward", lambda self, x: 2 * forward(self, x))
    found.append(folder(tmp_path))
    assert len(set(found)) == len(found), "the last one is the same by all that is written, but answers otherwise"
    monkeypatch.undo()
    assert folder(tmp_path / "again").name == found[0].name
    about = json.loads((found[0] / "about.json").read_text())
    assert about["quantizer"]["weight_range"] == "mse"
    about = json.loads((found[0].parent / "about.json").read_text())
    assert about["task"] == "tiny"
    assert set(about["versions"]) == {"bitplan", "torch"}


def test_calibration_tells_networks_apart(tmp_path: Path) -> None:
    """Ranges depend on more than the quantizer's settings: on kernels, on machines, on repairs."""
    bench, other = stored(tmp_path), stored(tmp_path)
    other.simulated.calibrate(batch[0] * 2 for batch in other.task.batches("calibration"))
    for each in (bench, other):
        each.evaluator.scores(uniform(each, "int4/uint4"), "selection")
    assert len(files(tmp_path, "selection")) == 2


def prompted() -> type[Task]:
    space = {"TinyTask": TinyTask}
    exec("class Prompted(TinyTask):\n    pass", space)
    return space["Prompted"]


def function_task() -> FunctionTask:
    task = TinyTask()
    return FunctionTask(task.model, task.example_input, [task.example_input], lambda model, split: 1.0)


def with_function() -> Task:
    task = TinyTask()
    task.measures = {"top": [len]}  # type: ignore[attr-defined]
    return task


@pytest.mark.parametrize("make", [lambda: prompted()(), function_task, with_function])
def test_judgement_that_cannot_be_seen_is_not_kept(make: Callable[[], Task], tmp_path: Path) -> None:
    task, reasons = make(), []
    assert task.judgement is None
    bench = make_bench(task)
    assert open_store(tmp_path / "store", task, bench.simulated, "model", reasons.append) is None
    assert len(reasons) == 1
    assert "judgement" in reasons[0]
    assert not (tmp_path / "store").exists()


def test_a_judgement_of_ones_own(tmp_path: Path) -> None:
    task = function_task()
    task.judgement = "always one"
    bench = make_bench(task)
    evaluator = Evaluator(task, bench.simulated, store=open_store(tmp_path, task, bench.simulated, "model"))
    policy = uniform(bench, "int2/uint4")
    assert evaluator.measure(policy, "selection").value == 1
    assert not evaluator.was_served
    assert evaluator.measure(policy, "selection").value == 1
    assert evaluator.was_served


def test_judgement_is_that_of_source_and_settings() -> None:
    assert TinyTask(0).judgement == TinyTask(1).judgement, "data and weights have digests of their own"
    assert len({TinyTask().judgement, Counted().judgement, Loss().judgement}) == 3
    assert Digits().judgement == Digits().judgement != None  # noqa: E711
    task = Digits()
    before = task.judgement
    assert task.fingerprint
    assert task.model
    again = Digits()
    assert again.fingerprint
    assert again.model
    assert again.judgement == before, "what is computed when first asked for is no setting"


def test_answers_that_change_are_not_kept(tmp_path: Path) -> None:
    task, reasons = Noisy(), []
    bench = make_bench(task)
    assert open_store(tmp_path, task, bench.simulated, "model", reasons.append) is None
    assert "answers differently every time" in reasons[0]


class Noisy(TinyTask):
    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return super().outputs(model, batch) + 1e-6 * torch.randn(len(batch[1]), 5)


def test_repaired_networks_have_no_store_or_one_of_their_own(tmp_path: Path) -> None:
    bench = stored(tmp_path)
    policy = uniform(bench, "int2/uint4")
    expected = bench.evaluator.scores(policy, "selection")
    altered = bench.simulated.fork()
    altered.alter({"left.bias": torch.ones(6)})
    other = bench.evaluator.of(altered)
    assert other.store is None
    assert not np.array_equal(other.scores(policy, "selection"), expected)
    named = bench.evaluator.of(altered, ["bias", {"to": 1}])
    scores = named.scores(policy, "selection")
    assert np.array_equal(scores, other.scores(policy, "selection"))
    assert np.array_equal(bench.evaluator.scores(policy, "selection"), expected)
    assert np.array_equal(bench.evaluator.of(altered, ["bias", {"to": 1}]).scores(policy, "selection"), scores)
    assert len(files(tmp_path, f"{policy.digest}.npz")) == 2
    for evaluator in (other, named):  # whichever asks first
        assert np.array_equal(evaluator.float_scores("report"), make_bench().evaluator.float_scores("report"))
    assert len(named.scores(policy, "report", 0.5)) == 80


def test_the_choice_of_a_repair_is_not_measured_again(tmp_path: Path) -> None:
    found = []
    for _ in range(2):
        bench = stored(tmp_path, quantizer=QuantizerSettings(repair="auto"))
        bench.evaluator.float_scores("selection")
        MEASURED.clear()
        found.append(choose_repair(bench.evaluator, bench.space, samples=80))
        assert sum(MEASURED) == (3 * 40 + 12 * 80 if len(found) == 1 else 3 * 40), "40 tell what a network is"
    first, second = found
    assert (first.repair, first.drops, first.evaluations) == (second.repair, second.drops, second.evaluations)
    bench = stored(tmp_path, quantizer=QuantizerSettings(repair="batch_norm"))
    policy = bench.space.decode([0] * len(bench.space.decisions))
    bench.evaluator.scores(policy, "selection", 80 / 120)
    assert bench.evaluator.was_served, "a run that does not have to choose finds the same"


# --- files ---


DAMAGES = {
    "empty": lambda content: b"",
    "cut": lambda content: content[: len(content) // 2],
    "no archive": lambda content: b"what is this",
    "flipped": lambda content: content[:150] + bytes(byte ^ 255 for byte in content[150:200]) + content[200:],
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_told_and_replaced(damage: str, tmp_path: Path) -> None:
    bench = stored(tmp_path)
    policy = uniform(bench, "int2/uint4")
    expected = ready(bench).scores(policy, "selection")
    (path,) = files(tmp_path, f"{policy.digest}.npz")
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    again = stored(tmp_path).evaluator
    with pytest.warns(StoreWarning, match=rf"{policy.digest}\.npz is damaged .* measured again"):
        assert np.array_equal(again.scores(policy, "selection"), expected)
    MEASURED.clear()
    assert np.array_equal(again.scores(policy, "selection"), expected)
    assert MEASURED == []


def test_arrays_that_do_not_fit_are_damage(tmp_path: Path) -> None:
    bench = stored(tmp_path)
    policy = uniform(bench, "int2/uint4")
    expected = bench.evaluator.scores(policy, "selection")
    (path,) = files(tmp_path, f"{policy.digest}.npz")
    np.savez(path, scores=np.ones(3), measured=np.ones(7, dtype=bool), seconds=1.0)
    with pytest.warns(StoreWarning, match="damaged"):
        assert np.array_equal(bench.evaluator.scores(policy, "selection"), expected)


def test_float_scores_are_kept(tmp_path: Path) -> None:
    evaluator = stored(tmp_path).evaluator
    assert np.array_equal(evaluator.float_scores("report"), make_bench().evaluator.float_scores("report"))
    again = stored(tmp_path).evaluator
    MEASURED.clear()
    assert np.array_equal(again.float_scores("report"), evaluator.float_scores("report"))
    assert again.float_quality("report") == evaluator.float_quality("report")
    assert MEASURED == []
    assert [path.name for path in files(tmp_path)] == ["report.npz"]


def test_more_is_never_replaced_by_less(tmp_path: Path) -> None:
    bench = stored(tmp_path)
    policy, store = uniform(bench, "int2/uint4"), bench.evaluator.store
    values = np.linspace(0, 1, 120)
    for share in (90, 40, 91):
        measured = np.arange(120) < share
        scores = SampleScores(np.where(measured, values, np.nan), measured, share / 10)
        store.keep(bench.simulated, policy, "selection", scores)
        found = store.scores(bench.simulated, policy, "selection", 120)
        assert found.measured.sum() == max(90, share)
        assert found.values[found.measured].tobytes() == values[found.measured].tobytes()
    assert found.seconds == 9.1
    assert found.seconds_for(np.arange(60, 120)) == pytest.approx(9.1 * 31 / 91)
    assert SampleScores.none(5).seconds_for(np.arange(5)) == 0


@given(st.lists(st.floats(width=64) | st.floats(width=32) | st.sampled_from([0.0, 1.0, -0.0]), max_size=20))
def test_values_come_back_to_the_last_bit(values: list[float]) -> None:
    given = np.array(values, dtype=np.float64)
    assert _narrowest(given).astype(np.float64).tobytes() == given.tobytes()


def test_accuracies_take_less_than_two_bits_a_sample(tmp_path: Path) -> None:
    bench, rng = stored(tmp_path), np.random.default_rng(0)
    policy, store = uniform(bench, "int2/uint4"), bench.evaluator.store
    scores = (rng.random(5000) < 0.9).astype(float)
    store.keep(bench.simulated, policy, "selection", SampleScores(scores, np.ones(5000, dtype=bool), math.pi))
    (path,) = files(tmp_path, f"{policy.digest}.npz")
    assert path.stat().st_size < 5000 * 2 / 8 + 500
    assert np.array_equal(store.scores(bench.simulated, policy, "selection", 5000).values, scores)


# --- processes ---

SCRIPT = """
import json, os, signal, sys
import numpy as np
import torch
torch.set_num_threads(1)
from pathlib import Path
from tiny import make_bench
from search.plan import fingerprint
from search.quality.evaluate import Evaluator
from search.quality.store import open_store
bench = make_bench()
store = open_store(Path(sys.argv[1]), bench.task, bench.simulated, fingerprint(bench.task.model))
evaluator = Evaluator(bench.task, bench.simulated, store=store)
evaluator.float_scores("selection")
def torn(file, **arrays):
    file.write(b"PK torn")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
policies = list(bench.space)[:: int(sys.argv[2])]
for number, policy in enumerate(policies):
    if number == int(sys.argv[3]):
        np.savez_compressed = torn
    before = evaluator.seconds
    quality = evaluator.measure(policy, "selection").to_dict()
    row = {"digest": policy.digest, "quality": quality, "seconds": round(evaluator.seconds - before, 6)}
    print(json.dumps(row | {"served": evaluator.was_served}), flush=True)
"""


def test_another_process_finds_what_a_killed_one_left(tmp_path: Path) -> None:
    """It is killed amid a write; everything it had finished is found, bit by bit, and nothing else."""
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests), str(tests.parent)])
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path), "80", "5"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert found.returncode == -signal.SIGKILL
    rows = [json.loads(line) for line in found.stdout.splitlines()]
    assert len(rows) == 5
    assert len(files(tmp_path, ".*.part")) == 1, "what was being written"
    bench, plain = stored(tmp_path, TinyTask()), make_bench()
    evaluator = bench.evaluator
    for number, policy in enumerate(list(bench.space)[::80]):
        quality, seconds = timed(evaluator, lambda p=policy: evaluator.measure(p, "selection"))
        assert evaluator.was_served == (number < 5)
        assert quality == plain.evaluator.measure(policy, "selection")
        if number < 5:
            row = {"digest": policy.digest, "quality": quality.to_dict(), "seconds": round(seconds, 6), "served": False}
            assert rows[number] == row


def test_processes_that_write_at_once(tmp_path: Path) -> None:
    bench = stored(tmp_path)
    policies, store = list(bench.space)[::40], bench.evaluator.store
    values = np.random.default_rng(0).random(120)
    store.scores(bench.simulated, policies[0], "selection", 120)

    def write(worker: int) -> None:
        for turn in range(1, 11):
            for policy in policies:
                measured = np.arange(120) < 10 * turn + worker
                scores = SampleScores(np.where(measured, values, np.nan), measured, 1.0)
                store.keep(bench.simulated, policy, "selection", scores)

    workers = [multiprocessing.get_context("fork").Process(target=write, args=(number,)) for number in range(3)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        for policy in policies:  # a damaged file would be a warning, which is an error here
            found = store.scores(bench.simulated, policy, "selection", 120)
            assert found.values[found.measured].tobytes() == values[found.measured].tobytes()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert all(store.scores(bench.simulated, p, "selection", 120).measured.sum() >= 100 for p in policies)
    assert not files(tmp_path, "*.part")
