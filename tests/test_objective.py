"""The objective: what is measured, what is counted, what is logged, and what a second one finds in the log."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import Bench, TinyTask, make_bench

from hwmodels import Precision
from search.objective import PROPOSALS_PER_EVALUATION, Objective, SpentError
from search.policy import Policy
from search.quality.evaluate import Evaluator
from search.sensitivity.choices import positions
from search.trials import Trial, TrialLog


@pytest.fixture
def policies(bench: Bench) -> dict[str, Policy]:
    names = ("int2/uint4", "int4/uint4", "int4/uint8", "int8/uint8")
    return {name: Policy.uniform(bench.network, Precision.parse(name)) for name in names}


@pytest.fixture
def measured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Digests in the order they are measured."""
    digests: list[str] = []
    measure = Evaluator.measure

    def counted(self, policy, *arguments):
        digests.append(policy.digest)
        return measure(self, policy, *arguments)

    monkeypatch.setattr(Evaluator, "measure", counted)
    return digests


def allow(evaluations: int = 10, seconds: float | None = None) -> SimpleNamespace:
    return SimpleNamespace(evaluations=evaluations, seconds=seconds)


def test_measures_what_the_evaluator_says(bench: Bench, policies, tmp_path: Path) -> None:
    objective = bench.objective(tmp_path / "trials.jsonl", {}, allow())
    trial = objective(policies["int4/uint8"])
    quality = bench.evaluator.measure(policies["int4/uint8"], "selection")
    assert (trial.number, trial.state, trial.fidelity) == (0, "complete", 1.0)
    assert trial.quality == quality.value
    assert trial.drop == quality.drop
    assert trial.metrics["drop_high"] == quality.drop_high
    assert trial.cost["weight_bytes"] == bench.pricing.costs(policies["int4/uint8"])["weight_bytes"]
    assert trial.cost["latency_s"] is None, "unknown costs are None, as JSON knows no NaN"
    assert trial.seconds > 0


def test_over_budget_is_logged_and_not_measured(bench: Bench, policies, measured, tmp_path: Path) -> None:
    limit = bench.pricing.costs(policies["int4/uint8"])["weight_bytes"]
    objective = bench.objective(tmp_path / "trials.jsonl", {"weight_bytes": limit}, allow())
    over, exact = objective(policies["int8/uint8"]), objective(policies["int4/uint8"])
    assert (over.state, exact.state) == ("infeasible", "complete")
    assert measured == [exact.digest]
    assert over.cost["weight_bytes"] > limit
    assert objective.spent_evaluations == 1
    assert [t.state for t in TrialLog(tmp_path / "trials.jsonl").trials] == ["infeasible", "complete"]
    assert objective.is_feasible(exact.policy)
    assert not objective.is_feasible(over.policy)
    assert objective.excess(exact.policy) == {"weight_bytes": 0.0}
    assert objective.violations(over)["weight_bytes"] == pytest.approx(over.cost["weight_bytes"] / limit - 1)
    for name in ("quality", "drop"):
        with pytest.raises(ValueError, match=f"trial 0 is infeasible and has no {name}"):
            getattr(over, name)


def test_a_policy_is_measured_once_and_paid_each_time(bench: Bench, policies, measured, tmp_path: Path) -> None:
    seen = []
    objective = bench.objective(tmp_path / "trials.jsonl", {}, allow(3), on_trial=lambda *a: seen.append(a))
    policy = policies["int4/uint8"]
    shuffled = Policy(dict(reversed(list(policy.items()))))
    first, *others = objective.map([policy, shuffled, policy])
    assert all(other is first for other in others)
    assert measured == [policy.digest]
    assert seen == [(first, False), (first, True), (first, True)]
    assert objective.spent_evaluations == 3
    assert objective.spent_seconds == pytest.approx(3 * (first.seconds + first.proposing_seconds))
    assert objective.remaining == 0
    with pytest.raises(SpentError):
        objective(policy)


def test_fidelities_are_trials_of_their_own(bench: Bench, policies, tmp_path: Path) -> None:
    objective = bench.objective(tmp_path / "trials.jsonl", {}, allow())
    part, whole = objective(policies["int2/uint4"], 0.3), objective(policies["int2/uint4"])
    assert (part.metrics["samples"], whole.metrics["samples"]) == (40, 120)
    assert (part.number, whole.number) == (0, 1)
    assert objective(policies["int2/uint4"], 0.3) is part


def test_seconds_of_proposing_are_spent(bench: Bench, policies, tmp_path: Path, monkeypatch) -> None:
    now = [0.0]
    monkeypatch.setattr("search.objective.time.perf_counter", lambda: now[0])
    log = tmp_path / "trials.jsonl"
    objective = bench.objective(log, {}, allow(10, seconds=100.0))
    now[0] = 10.0
    first = objective(policies["int8/uint8"])
    assert first.proposing_seconds == 10.0
    assert objective.spent_seconds == 10.0 + first.seconds
    now[0] = 20.0
    assert objective.sensitivity.columns  # scored while the clock stands still
    assert not objective.is_out_of_time
    now[0] = 200.0
    assert objective.is_out_of_time
    with pytest.raises(SpentError):
        objective(policies["int4/uint8"])
    again = bench.objective(log, {}, allow(10, seconds=100.0))
    now[0] = 400.0
    assert again(policies["int8/uint8"]) == first, "what the log knows is replayed however late it is"


def test_seconds_run_out(bench: Bench, policies, tmp_path: Path) -> None:
    objective = bench.objective(tmp_path / "trials.jsonl", {}, allow(10, seconds=1e-9))
    objective(policies["int8/uint8"])
    with pytest.raises(SpentError):
        objective(policies["int4/uint8"])


def test_proposals_over_budget_run_out(bench: Bench, policies, tmp_path: Path) -> None:
    objective = bench.objective(tmp_path / "trials.jsonl", {"weight_bytes": 1.0}, allow(2))
    for _ in range(2 * PROPOSALS_PER_EVALUATION):
        objective(policies["int8/uint8"])
    with pytest.raises(SpentError):
        objective(policies["int8/uint8"])
    assert len(TrialLog(tmp_path / "trials.jsonl").trials) == 1


def test_what_is_within_budget_may_be_measured_when_proposals_have_run_out(
    bench: Bench, policies, tmp_path: Path
) -> None:
    limits = {"weight_bytes": bench.pricing.costs(policies["int4/uint8"])["weight_bytes"]}
    objective = bench.objective(tmp_path / "trials.jsonl", limits, allow(2))
    for _ in range(2 * PROPOSALS_PER_EVALUATION):
        objective(policies["int8/uint8"])
    with pytest.raises(SpentError):
        objective(policies["int8/uint8"])
    assert objective(policies["int4/uint8"]).state == "complete"


@pytest.mark.parametrize("kept", [0, 1, 3, 4])
def test_resuming_answers_from_the_log(bench: Bench, policies, measured, tmp_path: Path, kept: int) -> None:
    limits = {"weight_bytes": bench.pricing.costs(policies["int4/uint8"])["weight_bytes"]}
    log = tmp_path / "trials.jsonl"
    trials = bench.objective(log, limits, allow()).map(policies.values())
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:kept]))
    measured.clear()
    again = bench.objective(log, limits, allow())
    found = again.map(policies.values())
    assert measured == [trial.digest for trial in trials[kept:] if trial.state == "complete"]
    assert found[:kept] == trials[:kept], "also their seconds"
    untimed = {"seconds": 0, "proposing_seconds": 0}
    assert [t.to_dict() | untimed for t in found] == [t.to_dict() | untimed for t in trials]
    assert TrialLog(log).trials == found
    assert again.spent_evaluations == 3


def test_sensitivity_is_scored_when_first_asked_for(bench: Bench, policies, tmp_path: Path) -> None:
    calls = []
    table = bench.scores()
    log = TrialLog(tmp_path / "trials.jsonl")
    objective = Objective(bench.evaluator, bench.pricing, {}, log, allow(), lambda: calls.append(1) or table)
    assert "predicted" not in objective(policies["int8/uint8"]).metrics
    assert not calls
    predicted = objective.predict(policies["int4/uint8"])
    assert predicted == table.predict(positions(bench.space, bench.space.encode(policies["int4/uint8"]))[None])[0]
    assert objective(policies["int4/uint8"]).metrics["predicted"] == predicted
    assert calls == [1]


def made(policy: Policy, drop: float | None, cost: float, predicted: float = 0.0, state: str = "complete") -> Trial:
    metrics = {"quality": 1.0, "drop": drop, "predicted": predicted}
    return Trial(0, policy, 1.0, metrics, {"weight_bytes": cost}, 0.1, state)


def test_rank(bench: Bench, policies, tmp_path: Path) -> None:
    """Within budget first, then by loss, then by prediction, then by cost; what was not measured comes last."""
    small, large = policies["int4/uint8"], policies["int8/uint8"]
    limits = {"weight_bytes": bench.pricing.costs(small)["weight_bytes"]}
    rank = bench.objective(tmp_path / "trials.jsonl", limits, allow()).rank
    ordered = [
        made(small, -0.01, 90),
        made(small, 0.01, 90, predicted=0.1),
        made(small, 0.01, 95, predicted=0.1),
        made(small, 0.01, 90, predicted=0.2),
        made(small, 0.02, 80),
        made(large, 0.0, 1e9),
        made(small, None, 1, state="infeasible"),
    ]
    assert sorted(reversed(ordered), key=rank) == ordered
    assert rank(made(small, None, 1, state="failed")) == rank(ordered[-1])


def test_rank_by_cost_where_the_drop_is_limited(bench: Bench, policies, tmp_path: Path) -> None:
    policy = policies["int4/uint8"]
    objective = bench.objective(tmp_path / "trials.jsonl", {}, allow(), quality_drop=0.02)
    ordered = [
        made(policy, 0.02, 80),
        made(policy, -0.5, 90),
        made(policy, 0.03, 10),
        made(policy, 0.04, 5),
        made(policy, None, 1, state="infeasible"),
    ]
    assert sorted(reversed(ordered), key=objective.rank) == ordered
    assert objective.violations(ordered[2]) == {"quality_drop": pytest.approx(0.01)}
    assert objective.violations(ordered[-1]) == {"quality_drop": 1.0}


class Broken(TinyTask):
    """Its metric is not a number from some moment on."""

    factor = 1.0

    def score(self, outputs, batch):
        return super().score(outputs, batch) * self.factor


def test_a_metric_that_is_no_number_is_a_failed_trial(tmp_path: Path) -> None:
    bench = make_bench(Broken())
    bench.evaluator.float_scores("selection")
    bench.task.factor = np.nan
    objective = bench.objective(tmp_path / "trials.jsonl", {}, allow())
    trial = objective(Policy.uniform(bench.network, Precision.parse("int2/uint4")))
    assert trial.state == "failed"
    assert objective.spent_evaluations == 1
    assert TrialLog(tmp_path / "trials.jsonl").trials == [trial]
    assert objective.rank(trial) == (np.inf,) * 4
