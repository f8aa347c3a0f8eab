"""Races: what stops a policy, what a finished one is worth, and what a search makes of both."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conformance import StrategyContract, what
from tiny import Bench, TinyTask, make_bench
from torch import Tensor, nn

from hwmodels import Precision
from search.errors import ConfigError, DataError
from search.front import compose_front
from search.objective import Objective, SpentError
from search.policy import Policy
from search.quality.evaluate import Evaluator
from search.quality.incumbents import Incumbents
from search.quality.racing import Racing, Track
from search.quality.subsets import shuffle_split
from search.shortlist import best_trial
from search.strategies.base import Strategy
from search.strategies.baselines import RandomSearch
from search.strategies.samplers import Tpe
from search.strategies.solver import Solver
from search.trials import Trial, TrialLog

RACING = Racing(first=16, growth=1.5)


class Loss(TinyTask):
    """Judged by cross-entropy, which has no bounds."""

    metric, higher_is_better = "cross-entropy", False

    def score(self, outputs, batch):
        return nn.functional.cross_entropy(outputs, batch[1], reduction="none")


class Uneven(TinyTask):
    """Batches that name their samples: they cannot be taken apart."""

    def batches(self, split: Any) -> Iterator[Any]:
        images, labels = self._data[split]
        for start in range(0, len(labels), 8):
            yield images[start : start + 8], [int(label) for label in labels[start : start + 8]]

    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        return (outputs.argmax(-1) == torch.tensor(batch[1])).double()


class Percent(TinyTask):
    """An accuracy in percent, which no accuracy may be."""

    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        return 100 * super().score(outputs, batch)


def racing_bench(task: TinyTask | None = None, racing: Racing = RACING, **options: Any) -> Bench:
    bench = make_bench(task, **options)
    bench.evaluator.racing = racing
    return bench


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return racing_bench(directory=tmp_path)


def uniform(bench: Bench, precision: str) -> Policy:
    return Policy.uniform(bench.network, Precision.parse(precision))


def allow(evaluations: int = 100) -> SimpleNamespace:
    return SimpleNamespace(evaluations=evaluations, seconds=None)


# --- settings and looks ---


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tolerance": -0.1}, "racing.tolerance=-0.1 must be at least 0"),
        ({"tolerance": float("nan")}, "racing.tolerance=nan"),
        ({"confidence": 1.0}, "racing.confidence=1.0 must be between 0 and 1"),
        ({"first": 0}, "racing.first=0 must be at least 1"),
        ({"growth": 1.0}, "racing.growth=1.0 must be above 1"),
    ],
)
def test_settings_out_of_range(given: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Racing(**given)


@pytest.mark.parametrize(
    ("racing", "samples", "units", "expected"),
    [
        (Racing(), 350, 350, [32, 64, 128, 256, 350]),
        (Racing(first=500), 350, 350, [350]),
        (Racing(first=1, growth=1.01), 4, 4, [1, 2, 3, 4]),
        (Racing(first=32), 5000, 10, [1, 2, 4, 8, 10]),
        (Racing(first=64, growth=3), 300, 300, [64, 192, 300]),
    ],
)
def test_looks_are_nested_and_end_with_everything(racing: Racing, samples: int, units: int, expected: list) -> None:
    assert racing.looks(samples, units) == expected


# --- the decision, on scores alone ---


def replayed(
    scores: np.ndarray, incumbents: list[np.ndarray], racing: Racing, task: TinyTask, reference: np.ndarray
) -> int:
    """Samples seen when a race ends, as `Evaluator.race` goes through it."""
    count = len(scores)
    split = shuffle_split(
        [torch.arange(count)], lambda b: b.double().numpy(), count, lambda n: racing.looks(n, n), racing.seed
    )
    track = Track(task, split, racing, reference)
    looks = np.cumsum([len(subset.places) for subset in split.subsets])
    return next((n for n in looks[:-1] if track.is_lost(scores[split.order[:n]], incumbents)), count)


def drawn(rng: np.random.Generator, accuracy: float, other: np.ndarray | None = None, agree: float = 0.9) -> np.ndarray:
    """Right-or-wrong scores, for the share `agree` the same as another network's."""
    own = (rng.random(2000) < accuracy).astype(float)
    return own if other is None else np.where(rng.random(2000) < agree, other, own)


def test_worse_policies_stop_early_and_others_finish() -> None:
    rng, task = np.random.default_rng(0), TinyTask()
    good = drawn(rng, 0.95)
    bad, close = drawn(rng, 0.6, good, 0.5), drawn(rng, 0.95, good)
    for seed in range(5):
        racing = Racing(seed=seed)
        assert replayed(bad, [good], racing, task, good) <= 128
        assert replayed(good, [good], racing, task, good) == 2000, "nobody is worse than himself"
        assert replayed(good, [bad], racing, task, good) == 2000, "better is not worse"
        assert replayed(bad, [], racing, task, good) == 2000, "nobody to race against"
        assert replayed(bad, [close, good, bad], racing, task, good) <= 128
        assert replayed(bad, [bad, bad, good], racing, task, good) <= 256, "the worst incumbents do not hide a good one"


def test_the_tolerance_is_in_units_of_the_metric() -> None:
    rng, task = np.random.default_rng(1), Loss()
    good = rng.gamma(2.0, 0.5, 2000)
    bad = good + rng.normal(0.2, 0.2, 2000)
    assert replayed(bad, [good], Racing(tolerance=0.1), task, good) < 2000
    assert replayed(bad, [good], Racing(tolerance=0.3), task, good) == 2000

    task.reduce = lambda scores: float(np.exp(scores.mean()))  # type: ignore[method-assign]
    drop = task.reduce(bad) - task.reduce(good)
    assert drop > 0.4
    assert replayed(bad, [good], Racing(tolerance=0.8 * drop), task, good) < 2000
    assert replayed(bad, [good], Racing(tolerance=1.2 * drop), task, good) == 2000


@pytest.mark.parametrize("tolerance", [0.0, 0.02])
@pytest.mark.parametrize("kind", ["accuracy", "loss"])
def test_policies_that_are_not_worse_are_rarely_stopped(kind: str, tolerance: float) -> None:
    """Just as bad as the tolerance allows, against three incumbents: at most one in twenty orders stops it."""
    rng = np.random.default_rng(2)
    if kind == "accuracy":
        task, policy = TinyTask(), drawn(rng, 0.9)
        wrong = rng.permutation(np.flatnonzero(policy == 0))
        incumbents = []
        for _ in range(3):  # right where the policy is wrong a few times more often than the other way round
            other = policy.copy()
            other[rng.choice(wrong, 100, replace=False)] = 1
            other[rng.choice(np.flatnonzero(policy), 100 - round(2000 * tolerance), replace=False)] = 0
            incumbents.append(other)
    else:
        task, policy = Loss(), rng.gamma(2.0, 0.5, 2000)
        noise = [rng.normal(0, 0.3, 2000) for _ in range(3)]
        incumbents = [policy - tolerance + (part - part.mean()) for part in noise]
    stops = [replayed(policy, incumbents, Racing(tolerance, seed=seed), task, policy) < 2000 for seed in range(100)]
    assert np.mean(stops) <= 0.05


def test_scores_out_of_bounds_are_refused() -> None:
    good = np.ones(2000)
    with pytest.raises(DataError, match=r"task tiny gives a score of 3; an accuracy.*turn racing off"):
        replayed(good * 3, [good], RACING, TinyTask(), good)
    bench = racing_bench(Percent())
    with pytest.raises(DataError, match="score of 100"):
        bench.evaluator.race(uniform(bench, "int8/uint8"), [bench.evaluator.float_scores("selection")])


def test_scores_that_are_no_numbers_are_measured_to_the_end() -> None:
    good = np.ones(2000)
    assert replayed(np.where(np.arange(2000) % 7 == 0, np.nan, 0.0), [good], RACING, TinyTask(), good) == 2000


# --- on a network ---


@pytest.mark.parametrize("task", [TinyTask(), Loss(), Uneven()], ids=["accuracy", "loss", "whole batches"])
@pytest.mark.parametrize("precision", ["int8/uint8", "int2/uint4"])
def test_a_finished_race_is_a_full_measurement(task: TinyTask, precision: str) -> None:
    bench = racing_bench(task)
    policy = uniform(bench, precision)
    finish = bench.evaluator.race(policy, [])
    quality, scores = bench.evaluator.measure(policy, "selection"), bench.evaluator.scores(policy, "selection")
    assert finish.fidelity == 1
    assert finish.scores == pytest.approx(scores, rel=1e-5, abs=1e-6)
    if task.metric == "accuracy":
        assert finish.quality == quality
        assert np.array_equal(finish.scores, scores)
    else:
        assert finish.quality.drop == pytest.approx(quality.drop, abs=1e-6)
        assert finish.quality.samples == quality.samples


def test_every_sample_is_measured_at_most_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    incumbents, bad = [bench.evaluator.float_scores("selection")], uniform(bench, "int2/uint4")
    bench.evaluator.race(bad, [])  # has dealt out the split
    forwards: list[int] = []
    outputs = bench.task.outputs
    monkeypatch.setattr(
        bench.task, "outputs", lambda model, batch: forwards.append(len(batch[1])) or outputs(model, batch)
    )
    finish = bench.evaluator.race(bad, incumbents)
    assert sum(forwards) == finish.quality.samples < 120
    forwards.clear()
    bench.evaluator.race(uniform(bench, "int8/uint8"), incumbents)
    assert sum(forwards) == 120
    assert max(forwards) <= 40


@pytest.mark.parametrize("task", [TinyTask(), Loss(), Uneven()], ids=["accuracy", "loss", "whole batches"])
def test_a_stopped_race_says_what_it_saw(task: TinyTask) -> None:
    bench = racing_bench(task)
    reference, policy = bench.evaluator.float_scores("selection"), uniform(bench, "int2/uint4")
    better = reference + (0 if task.higher_is_better else -0.5)
    finish = bench.evaluator.race(policy, [better])
    assert finish.scores is None
    quality = finish.quality
    assert finish.fidelity == quality.samples / 120 < 1
    seen = bench.evaluator._track.split.order[: quality.samples]
    scores = bench.evaluator.scores(policy, "selection")[seen]
    assert quality.value == pytest.approx(scores.mean(), rel=1e-5)
    sign = 1 if task.higher_is_better else -1
    assert quality.drop == pytest.approx(sign * (reference[seen].mean() - scores.mean()), rel=1e-4)
    whole = bench.evaluator.measure(policy, "selection")
    assert quality.drop_low <= whole.drop <= quality.drop_high
    assert quality.drop_high - quality.drop_low > whole.drop_high - whole.drop_low, "less was seen, at any time"


def test_only_tasks_with_scores_race(bench: Bench) -> None:
    bench.task.per_sample = False
    assert Evaluator(bench.task, bench.simulated, racing=RACING).racing is None


# --- incumbents ---


def test_incumbents_are_the_front(tmp_path: Path) -> None:
    measured: list[str] = []
    bench = make_bench()
    policies = {name: uniform(bench, name) for name in ("int2/uint4", "int4/uint4", "int4/uint8", "int8/uint8")}
    small, middle, other, large = policies.values()

    def measure(policy: Policy) -> np.ndarray:
        measured.append(policy.digest)
        return np.full(3, 9.0)

    incumbents = Incumbents(measure, tmp_path)
    incumbents.add(large, 8.0, 0.0, np.zeros(3))
    incumbents.add(small, 2.0, 0.5, np.full(3, 2.0))
    incumbents.add(middle, 4.0, 0.2, np.full(3, 4.0))
    incumbents.add(other, 5.0, 0.3, np.full(3, 5.0))
    assert [scores[0] for scores in incumbents.scores(8.0)] == [0.0, 4.0, 2.0], "best first; one was beaten"
    assert [scores[0] for scores in incumbents.scores(4.0)] == [4.0, 2.0], "costs no greater"
    assert incumbents.scores(1.9) == []
    incumbents.add(other, 4.0, 0.1, np.full(3, 1.0))
    assert [scores[0] for scores in incumbents.scores(8.0)] == [0.0, 1.0, 2.0]
    assert sorted(file.stem for file in tmp_path.iterdir()) == sorted(p.digest for p in (large, small, other))

    again = Incumbents(measure, tmp_path)
    again.add(small, 2.0, 0.5)
    again.add(middle, 3.0, 0.4)
    assert [scores[0] for scores in again.scores(3.0)] == [9.0, 2.0], "read from disk, or measured"
    again.scores(3.0)
    assert measured == [middle.digest], "once"
    in_memory = Incumbents(measure)
    in_memory.add(small, 2.0, 0.5, np.ones(3))
    assert in_memory.scores(2.0)[0][0] == 1.0


# --- in a search ---


def test_a_stopped_trial_is_marked_and_spends_its_share(bench: Bench, tmp_path: Path) -> None:
    objective = bench.objective(tmp_path / "trials.jsonl", {}, allow(), primary_cost="bit_ops")
    policies = [uniform(bench, name) for name in ("int4/uint8", "int8/uint8", "int2/uint4")]
    incumbent, *_ = objective.map(policies)
    assert incumbent.state == "complete"
    bad = next(p for p in bench.space if is_bad(bench, p, incumbent))
    trial = objective(bad)
    assert trial.state == "stopped"
    assert trial.is_measured
    assert trial.metrics["samples"] < 120
    assert trial.fidelity == trial.metrics["samples"] / 120
    before = objective.spent_evaluations
    assert objective(bad) is trial, "known"
    assert objective.spent_evaluations == pytest.approx(before + trial.fidelity), "and paid again"
    assert objective.rank(trial) == (np.inf,) * 4, "it never wins"
    assert Trial.from_dict(trial.to_dict()) == trial


def is_bad(bench: Bench, policy: Policy, incumbent: Trial) -> bool:
    """Costs more than the incumbent and is much worse."""
    costs, drop = bench.pricing.costs(policy), bench.evaluator.measure(policy, "selection").drop
    return costs["bit_ops"] >= incumbent.cost["bit_ops"] and drop > incumbent.drop + 0.3


def searched(
    bench: Bench, folder: Path, strategy: Strategy, seed: int = 0, **options: Any
) -> tuple[list[Trial], Objective]:
    folder.mkdir(exist_ok=True)
    bench.evaluator.directory = folder
    objective = bench.objective(folder / "trials.jsonl", options.pop("limits", {}), strategy, **options)
    with suppress(SpentError):
        strategy.search(bench.space, objective, np.random.default_rng(seed))
    return TrialLog(folder / "trials.jsonl").trials, objective


def test_racing_tries_more_policies_and_finds_no_worse_winner(tmp_path: Path) -> None:
    """The same allowance, the same stream: what was measured in full without racing is seen with it, and more."""
    for seed in range(3):
        plain, raced = make_bench(TinyTask(seed)), racing_bench(TinyTask(seed))
        trials, _ = searched(plain, tmp_path / f"plain{seed}", RandomSearch(30), seed)
        others, objective = searched(raced, tmp_path / f"raced{seed}", RandomSearch(30), seed)
        assert [t.digest for t in others[: len(trials)]] == [t.digest for t in trials]
        assert len(others) > len(trials)
        assert 29 < objective.spent_evaluations <= 30
        assert {"complete", "stopped"} == {t.state for t in others}
        assert best_trial(objective, others).drop <= min(t.drop for t in trials)
        full = {t.digest: t.drop for t in trials}
        for trial in others[: len(trials)]:
            if trial.state == "complete":
                assert trial.drop == full[trial.digest]


def test_the_front_holds_no_stopped_trial(tmp_path: Path) -> None:
    bench = racing_bench()
    trials, objective = searched(bench, tmp_path / "run", RandomSearch(20))
    winner = best_trial(objective, trials)
    members = compose_front(objective, trials, winner, bench.network, ["uint4", "uint8"])
    states = [member.trial.state for member in members if member.trial]
    assert states
    assert set(states) == {"complete"}


def test_a_search_is_the_same_every_time(tmp_path: Path) -> None:
    runs = [searched(racing_bench(), tmp_path / str(number), RandomSearch(10))[0] for number in range(2)]
    first, second = map(what, runs)
    assert first == second
    other = searched(racing_bench(racing=Racing(first=16, growth=1.5, seed=1)), tmp_path / "other", RandomSearch(10))[0]
    assert [t.metrics for t in other] != [t["metrics"] for t in first], "another order of the samples"


@pytest.mark.parametrize("after", range(1, 12))
def test_an_interrupted_search_measures_nothing_again(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = searched(racing_bench(), tmp_path / "whole", RandomSearch(8))

    def interrupt(trial: Trial, known: bool) -> None:
        if trial.number == after:
            raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        searched(racing_bench(), tmp_path / "run", RandomSearch(8), on_trial=interrupt)
    raced: list[str] = []
    race = Evaluator.race
    monkeypatch.setattr(Evaluator, "scores", lambda *_: pytest.fail("scores of incumbents are on disk"))
    monkeypatch.setattr(Evaluator, "race", lambda self, *given: raced.append(given[0].digest) or race(self, *given))
    again, _ = searched(racing_bench(), tmp_path / "run", RandomSearch(8))
    assert what(again) == what(whole)
    assert raced == [trial.digest for trial in whole[after + 1 :]]


def test_parts_of_the_split_do_not_race(bench: Bench, tmp_path: Path) -> None:
    objective = bench.objective(tmp_path / "trials.jsonl", {}, allow(2))
    objective(uniform(bench, "int8/uint8"))
    part = objective(uniform(bench, "int2/uint4"), 0.3)
    assert (part.state, part.fidelity, objective.spent_evaluations) == ("complete", 0.3, 1.3)
    with pytest.raises(SpentError):
        objective(uniform(bench, "int4/uint4"))
    assert objective(uniform(bench, "int4/uint4"), 0.5).fidelity == 0.5, "what is left is enough for a part"


def test_tpe_learns_from_stopped_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import optuna

    told: list[float] = []
    tell = optuna.study.Study.tell
    monkeypatch.setattr(
        optuna.study.Study, "tell", lambda self, trial, losses: told.extend(losses) or tell(self, trial, losses)
    )
    trials, _ = searched(racing_bench(), tmp_path / "run", Tpe(10))
    stopped = [t for t in trials if t.state == "stopped"]
    assert stopped
    assert told == [t.drop for t in trials]


@pytest.mark.parametrize("quality_drop", [None, 0.1])
def test_the_solver_copes_with_stopped_trials(quality_drop: float | None, tmp_path: Path) -> None:
    bench = racing_bench(input=("uint8",))
    limits = {} if quality_drop else {"weight_bytes": float(np.median(bench.costs("weight_bytes")))}
    trials, objective = searched(
        bench, tmp_path / "run", Solver(40), limits=limits, quality_drop=quality_drop, primary_cost="weight_bytes"
    )
    plain, reference = searched(
        make_bench(input=("uint8",)), tmp_path / "plain", Solver(40), limits=limits, quality_drop=quality_drop
    )
    best, expected = best_trial(objective, trials), best_trial(reference, plain)
    assert objective.rank(best)[:2] <= reference.rank(expected)[:2]
    assert all(t.state != "infeasible" for t in trials)


class RacedContract(StrategyContract):
    """The contract of strategies holds with racing as without it."""

    @pytest.fixture(scope="class")
    @classmethod
    def search_bench(cls) -> Bench:
        return racing_bench()

    def test_resumes_to_the_same_trials(self, run, tmp_path: Path, search_bench: Bench, monkeypatch) -> None:
        """Also where the scores of incumbents are lost: they are measured again, and nothing else is."""
        whole = run(tmp_path / "whole")
        lines = (tmp_path / "whole" / "trials.jsonl").read_text().splitlines(keepends=True)
        raced: list[str] = []
        race = search_bench.evaluator.race
        monkeypatch.setattr(
            search_bench.evaluator, "race", lambda policy, rivals: raced.append(policy.digest) or race(policy, rivals)
        )
        for cut in range(0, len(lines) + 1, 3):
            folder = tmp_path / f"cut{cut}"
            folder.mkdir()
            (folder / "trials.jsonl").write_text("".join(lines[:cut]))
            raced.clear()
            assert what(run(folder)) == what(whole), f"cut after {cut} trials"
            assert raced == [trial.digest for trial in whole[cut:] if trial.state != "infeasible"]


class TestRandomRaced(RacedContract):
    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: RandomSearch(evaluations)


class TestTpeRaced(RacedContract):
    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: Tpe(evaluations)


class TestSolverRaced(RacedContract):
    @pytest.fixture
    def make_strategy(self):
        return lambda evaluations: Solver(evaluations)
