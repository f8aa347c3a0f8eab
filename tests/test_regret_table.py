"""The table of all policies stands in for evaluations: it must say what they say."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from search.errors import UnsupportedError
from search.quality.evaluate import Evaluator
from search.strategies.base import Strategy
from search.tasks.fashion_mnist import FashionMNIST
from search.trace import trace

STUDY = Path(__file__).parent.parent / "experiments" / "regret"
CODES = ("2248", "4444", "8822", "8888")
MODULES = ("contenders", "goals", "measure", "summary", "table", "trajectories", "truth", "units")


@pytest.fixture(scope="module")
def study() -> Any:
    """The modules of the study."""
    sys.path.insert(0, str(STUDY))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(STUDY))
        for name in {path.stem for path in STUDY.glob("*.py")}:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def measured(study: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The smallest network, measured on half-batches under some policies."""
    table, truth, units = study.table, study.truth, study.units
    bench = units.make_bench("digits", "none")
    bench.task.batch_size = 175  # two batches
    policies = [table.policies_of(bench)[code] for code in CODES]
    folder = tmp_path_factory.mktemp("truth")
    for index, batch in enumerate(bench.task.batches("selection")):
        found = truth.measure_batch(bench, batch, policies, memory=10**8, label="")
        np.savez(folder / f"batch_{index}.npz", **found)
    path = folder / "truth.csv.gz"
    truth.merge(folder, 2, table.identity(bench), CODES, path)
    return bench, dict(zip(CODES, policies, strict=True)), table.Truth.load(path), table


@pytest.mark.parametrize("fidelity", [0.5, 1.0])
def test_what_is_looked_up_is_what_an_evaluation_finds(measured: Any, fidelity: float) -> None:
    bench, policies, truth, table = measured
    real, looked_up = Evaluator(bench.task, bench.simulated), table.TableEvaluator(bench, truth)
    for policy in policies.values():
        assert looked_up.measure(policy, "selection", fidelity) == real.measure(policy, "selection", fidelity)


def test_divergence_is_the_tasks(measured: Any) -> None:
    bench, policies, truth, _ = measured
    for code, policy in policies.items():
        found = []
        for batch in bench.task.batches("selection"):
            reference = bench.task.outputs(bench.simulated.apply({}), batch).detach().clone()
            outputs = bench.task.outputs(bench.simulated.apply(policy), batch).detach()
            found += bench.task.divergence(reference, outputs).tolist()
        assert truth.divergence[code] == pytest.approx(np.mean(found), rel=1e-4)


def test_accuracy_is_that_of_the_whole_split(measured: Any) -> None:
    _, policies, truth, _ = measured
    for code, policy in policies.items():
        scores, _ = truth.scores(policy)
        assert truth.accuracy[code] == scores.mean()


def test_scores_per_sample_and_other_splits_are_refused(measured: Any) -> None:
    bench, policies, truth, table = measured
    evaluator = table.TableEvaluator(bench, truth)
    with pytest.raises(UnsupportedError, match="no scores per sample"):
        evaluator.scores(policies["8888"], "selection")
    with pytest.raises(UnsupportedError, match="selection"):
        evaluator.measure(policies["8888"], "report")


def test_measurements_are_charged_by_the_batches_they_take(measured: Any) -> None:
    bench, policies, truth, table = measured
    evaluator = table.TableEvaluator(bench, truth, evaluation_s=6.0)
    evaluator.measure(policies["8888"], "selection")
    assert evaluator.seconds == 6.0
    evaluator.measure(policies["8888"], "selection", 0.1)  # one of the two batches
    assert evaluator.seconds == 9.0


def test_prices_are_remembered_as_they_are(measured: Any) -> None:
    bench, policies, _, table = measured
    known = bench.pricing
    pricing = table.TablePricing(known.network, known.space, known.cost_model, known.workload)
    for policy in (*policies.values(), *policies.values()):
        costs = pricing.costs(policy)
        np.testing.assert_equal(costs, known.costs(policy))  # of which some are not known
        costs.clear()  # as whoever asked may do


def test_units_are_runs_of_about_equal_compute(study: Any) -> None:
    units = study.units
    task = FashionMNIST("resnet20")
    network = trace(task.network(), torch.zeros(2, 1, 28, 28))
    runs = units.equal_compute(network, 7)
    assert [name for run in runs for name in run] == list(network.names)
    shares = [sum(network[name].macs for name in run) for run in runs]
    assert max(shares) < 1.6 * min(shares)


POLICIES = pd.DataFrame(
    {
        "bits": [2.0, 4.0, 4.0, 6.0, 8.0],
        "drop": [0.06, 0.02, 0.01, 0.005, 0.0],
        "certain_drop": [0.07, 0.03, 0.015, 0.009, 0.004],
    },
    index=["22", "26", "44", "66", "88"],
)
"""What policies cost and are worth, made up."""


@pytest.fixture
def run(study: Any) -> Any:
    """Half an evaluation of the best policy, then four whole ones, one of them repeated."""
    run, spent = study.trajectories.Run({}), 0.0
    for code, fidelity in (("44", 0.5), ("22", 1.0), ("26", 1.0), ("26", 1.0), ("44", 1.0)):
        spent += fidelity
        run.add(code, fidelity, spent, 10 * spent)
    return run


def test_regret_within_a_budget_is_followed_by_whole_evaluations(study: Any, run: Any) -> None:
    # After 1 evaluation there is only the half of 44, so the plan without a search counts: all in the fewest bits.
    # After 2, 22 is whole; after 3, 26: at 2.5 evaluations; the run ends after 4.5 with the best there is.
    found = study.trajectories.follow(run, study.goals.Goal(bits=5.0), POLICIES)
    assert found["evaluations"].tolist() == [1, 2, 3, 4.5]
    assert found["seconds"].tolist() == [5, 15, 25, 45]
    assert found["regret"].tolist() == pytest.approx([5.0, 5.0, 1.0, 0.0])
    # Below 5 bits and 0.05: 44 alone covers 1 x 0.04, as much as there is; 26 covers 1 x 0.03; 22 is beyond.
    assert found["hypervolume"].tolist() == pytest.approx([0, 0, 0.75, 1])


def test_regret_under_a_floor_is_in_bits_and_holds_the_intervals_end_against_it(study: Any, run: Any) -> None:
    for drop, expected in ((0.03, [4, 4, 0, 0]), (0.02, [4, 4, 4, 0]), (0.01, [2, 2, 2, 2])):
        found = study.trajectories.follow(run, study.goals.Goal(drop=drop), POLICIES)
        assert found["regret"].tolist() == pytest.approx(expected)  # all in 8 bits until a policy keeps the floor
    # Below 8 bits and 0.05: 44 covers 4 x 0.04, 66 2 x 0.005 more.
    assert found["hypervolume"].iloc[-1] == pytest.approx(0.16 / 0.17)


def test_a_run_without_a_measurement_leaves_the_plan_without_a_search(study: Any) -> None:
    found = study.trajectories.follow(study.trajectories.Run({}), study.goals.Goal(bits=5.0), POLICIES)
    assert found.to_numpy().tolist() == [[0, 0, pytest.approx(5.0), 0]]


def test_a_run_reads_back(study: Any, run: Any, tmp_path: Path) -> None:
    run.save(tmp_path / "run.json")
    assert study.trajectories.Run.load(tmp_path / "run.json") == run


def test_what_a_run_found_stays_when_it_has_ended(study: Any) -> None:
    rows = [("a", "3 bits", 0, 1, 2.0), ("a", "3 bits", 0, 3, 1.0), ("a", "3 bits", 1, 1, 4.0)]
    rows += [("a", "4 bits", 0, 1, 6.0)]
    table = pd.DataFrame(rows, columns=["strategy", "goal", "seed", "evaluations", "regret"])
    found = study.summary.at(table, [2, 600])
    assert found.loc["a", "3 bits"].to_numpy().tolist() == [[2, 1], [4, 4]]
    assert found.loc["a", "4 bits"].to_numpy().tolist() == [[6, 6]]
    over = study.summary.over_budgets(found)  # seed 1 did not run for all
    assert over[600].to_dict() == {("a", "all budgets", 0): (1 + 6) / 2}


def test_pairs_and_ranks_of_an_aim(study: Any) -> None:
    summary = study.summary
    assert summary.worse_than(np.zeros(5), np.zeros(5)) == 1
    assert summary.worse_than(np.arange(8.0) + 9, np.arange(8.0)) < 0.001
    assert summary.worse_than(np.arange(8.0), np.arange(8.0) + 9) > 0.999
    rows = [("auto (20)", "3 bits", seed, 20, regret) for seed, regret in enumerate((0.0, 0.1, 0.3))]
    rows += [("haq (600)", "3 bits", seed, 600, regret) for seed, regret in enumerate((0.1, 0.2, 0.2))]
    text = summary.aims(pd.DataFrame(rows, columns=["strategy", "goal", "seed", "evaluations", "regret"]))
    line = next(line for line in text.splitlines() if "| 3 bits |" in line)
    assert "| 0.100 [0.050, 0.200] | 0.200 [0.150, 0.200] | 67% |" in line  # 6 of 9 pairs
    assert line.endswith("| yes |")


def test_marked_sections_are_filled(study: Any) -> None:
    text = "a\n<!-- x -->\nold\n<!-- end of x -->\nb\n"
    assert study.summary.fill(text, "x", "new") == "a\n<!-- x -->\nnew\n<!-- end of x -->\nb\n"
    with pytest.raises(ValueError, match="<!-- y -->"):
        study.summary.fill(text, "y", "new")


def test_every_strategy_of_the_configuration_competes_or_says_why_not(study: Any) -> None:
    contenders = study.contenders
    competing = {contender.settings[0].removeprefix("strategy=") for contender in contenders.CONTENDERS.values()}
    assert set(contenders.strategies()) <= competing | set(contenders.LEFT_OUT)


def test_shards_share_all_runs_out(study: Any) -> None:
    entries = study.measure.entries(["random", "superposition"], ["3 bits", "front"], seeds=3)
    named = [(entry.name, entry.goal.name, entry.seed) for entry in entries]
    assert named == [
        *(("random", goal, seed) for goal in ("3 bits", "front") for seed in range(3)),
        ("superposition", "3 bits", 0),
    ]


def test_a_search_on_the_table_is_recorded_with_its_repeats_and_seconds(study: Any) -> None:
    bench = study.units.make_bench("digits", "none")
    codes = list(study.table.policies_of(bench))
    zeros = np.zeros((len(codes), 2), dtype=int)
    lost = zeros + np.array([code.count("2") for code in codes])[:, None]
    about = study.table.identity(bench) | {"samples": [100, 100], "right": [90, 90]}
    truth = study.table.Truth(about, pd.Series(0.0, codes), lost, zeros)
    studied = sys.modules["study"].Study(bench, truth, evaluation_s=6.0, scoring_s=100.0)

    class Twice(Strategy):
        name = "twice"

        def search(self, space: Any, objective: Any, rng: Any) -> None:
            for code in ("8888", "2222", "4222", "2222"):  # the first is over the budget
                objective(study.table.policies_of(bench)[code])

    run = study.contenders.compete(studied, Twice(3), study.goals.Goal(bits=5.0), seed=0)
    assert run.codes == ["2222", "4222", "2222"]
    assert run.evaluations == [1, 2, 3]
    assert run.seconds == pytest.approx([6, 12, 18], abs=2)  # and what the proposals took; no scores were asked for
    found = study.trajectories.follow(run, study.goals.Goal(bits=5.0), studied.policies)
    assert found["regret"].tolist() == pytest.approx([4.0, 3.0, 3.0])  # samples of 100 lost
