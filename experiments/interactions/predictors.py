"""What is compared: every way to foretell a policy's loss, what its scoring takes, and what its solver proposes."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from networks import Bench

from search.budget import Budget
from search.files import write_json
from search.policy import Policy
from search.sensitivity.choices import choices_of, starts_of
from search.sensitivity.scoring import TABLE, score_space
from search.sensitivity.settings import SensitivitySettings
from search.sensitivity.table import SensitivityTable
from search.space import SearchSpace
from search.strategies.forecaster import Forecaster


def _settings(
    scores: Iterable[str], interactions: Iterable[str] = (), superposition: bool = False
) -> SensitivitySettings:
    return SensitivitySettings(scores=[*scores], interactions=[*interactions], superposition=superposition)


SCORINGS: dict[str, SensitivitySettings] = {
    "sweep": _settings(["kl", "loss", "drop"], ["forward"], superposition=True),
    "backward": _settings(["fisher", "fisher_diagonal"], ["backward"]),
    "weight_error": _settings(["weight_error"]),
    "sqnr": _settings(["sqnr_db"]),
    "output_error": _settings(["output_error"]),
    "hessian": _settings(["hessian_trace"]),
}
"""What is scored in one go; each is timed on its own."""

PREDICTORS: dict[str, tuple[str, ...]] = {
    "weight_error": ("weight_error",),
    "sqnr_db": ("sqnr",),
    "output_error": ("output_error",),
    "hessian_trace": ("hessian",),
    "fisher_diagonal": ("backward",),
    "fisher": ("backward",),
    "drop": ("sweep",),
    "loss": ("sweep",),
    "kl": ("sweep",),
    "backward": ("backward",),
    "backward_scaled": ("backward", "sweep"),
    "forward": ("sweep",),
    "forward_scaled": ("sweep",),
    "superposition": ("sweep",),
}
"""The predictors, from scores that add up to those that know interactions, and the scorings each needs."""

ADDITIVE = tuple(PREDICTORS)[:9]
MEAN_BITS = "mean_bits"
"""The baseline: fewer bits, more loss."""


@dataclass(frozen=True)
class Scores:
    """All scores of a space.

    Attributes:
        table: All of them in one table.
        seconds: Seconds of one thread's processor time that each of `SCORINGS` took.
        pass_seconds: The same for a float forward and backward pass over the calibration split.
    """

    table: SensitivityTable
    seconds: Mapping[str, float]
    pass_seconds: float

    def passes(self, predictor: str) -> float:
        """What a predictor takes, in float forward and backward passes over the calibration split."""
        return sum(self.seconds[name] for name in PREDICTORS[predictor]) / self.pass_seconds


def score(bench: Bench, space: SearchSpace, folder: Path) -> Scores:
    """Scores a space and keeps everything in a folder; what was interrupted starts anew, so that its seconds are right.

    All weights are quantized before, so that no scoring pays for it.
    """
    path = folder / "seconds.json"
    seconds: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {"pass": pass_seconds(bench)}
    missing = [name for name in SCORINGS if name not in seconds]
    for choice in choices_of(space) if missing else ():
        bench.simulated.apply(choice.on({}))
    for name in missing:
        shutil.rmtree(folder / name, ignore_errors=True)
        started = time.process_time()
        score_space(bench.task, bench.simulated, space, SCORINGS[name], folder / name)
        seconds[name] = time.process_time() - started
        write_json(path, seconds)
        print(f"{bench.label}: scored {name} in {seconds[name]:.1f} s", flush=True)
    tables = [SensitivityTable.load(folder / name / TABLE) for name in SCORINGS]
    table = SensitivityTable(
        columns={name: column for table in reversed(tables) for name, column in table.columns.items()},
        interactions={name: form for table in tables for name, form in table.interactions.items()},
        superposition=tables[0].superposition,
    )
    return Scores(table, seconds, seconds["pass"])


def pass_seconds(bench: Bench, repeats: int = 3) -> float:
    """Processor time of a float forward and backward pass over the calibration split, the least of some repeats."""
    model, task = bench.simulated.apply({}), bench.task
    found = []
    for _ in range(repeats):
        started = time.process_time()
        for batch in task.batches("calibration"):
            torch.autograd.backward(task.outputs(model, batch).square().mean())
        found.append(time.process_time() - started)
    model.zero_grad(set_to_none=True)
    return min(found)


def predict(table: SensitivityTable, space: SearchSpace, policies: Iterable[Policy], predictor: str) -> np.ndarray:
    """Foretells the losses of policies, shape `(policies,)`."""
    positions = starts_of(space) + np.array([space.encode(policy) for policy in policies])
    return table.predict(positions, predictor)


def propose(bench: Bench, space: SearchSpace, table: SensitivityTable, predictor: str, bits: float) -> Policy:
    """The plan that a predictor's solver proposes within a budget of average weight bits."""
    pricing = bench.pricing(space)
    limits = Budget(average_weight_bits=bits).limits(pricing.reference("float"))
    (point,) = Forecaster(predictor, table, pricing).best(limits, 1)
    return space.decode(point.tolist())
