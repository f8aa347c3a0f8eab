"""The table of all policies stands in for evaluations: it must say what they say."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from search.errors import UnsupportedError
from search.quality.evaluate import Evaluator
from search.tasks.fashion_mnist import FashionMNIST
from search.trace import trace

STUDY = Path(__file__).parent.parent / "experiments" / "regret"
CODES = ("2248", "4444", "8822", "8888")


@pytest.fixture(scope="module")
def study() -> Any:
    """The modules of the study, and its smallest network measured on half-batches under some policies."""
    sys.path.insert(0, str(STUDY))
    try:
        table, truth, units = map(importlib.import_module, ("table", "truth", "units"))
        yield table, truth, units
    finally:
        sys.path.remove(str(STUDY))
        for name in ("table", "truth", "units"):
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def measured(study: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    table, truth, units = study
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


def test_units_are_runs_of_about_equal_compute(study: Any) -> None:
    _, _, units = study
    task = FashionMNIST("resnet20")
    network = trace(task.network(), torch.zeros(2, 1, 28, 28))
    runs = units.equal_compute(network, 7)
    assert [name for run in runs for name in run] == list(network.names)
    shares = [sum(network[name].macs for name in run) for run in runs]
    assert max(shares) < 1.6 * min(shares)
