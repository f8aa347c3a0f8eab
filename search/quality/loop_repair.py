"""Which free repair within the loop is best for a network, decided once per run on part of the selection split.

A few policies of the space are measured with every repair on the same samples. The simplest repair stays unless the
next one is surely better: where the 95% interval of the paired difference, averaged over the policies, lies above zero.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from search.policy import Policy
from search.quality.evaluate import Evaluator
from search.quality.interval import drop, paired_interval, worse_by
from search.space import SearchSpace
from search.tasks.task import Task

REPAIRS = ("none", "bias", "batch_norm")  # from simple to complex
RANDOM_PROBES = 2


@dataclass(frozen=True)
class LoopRepair:
    """The repair that was chosen, and why.

    Attributes:
        repair: Its name, as `quantizer.repair` takes it.
        drops: Policy by what it is (`lowest`, `middle`, `random 1`, ...) to repair to the drop against the float
            network; empty where there was nothing to choose between. None stands for a drop that is no number.
        samples: How many samples of the selection split each was measured on.
        evaluations: What that cost, in measurements of the whole split.
        seconds: Time it took.
    """

    repair: str
    drops: dict[str, dict[str, float | None]]
    samples: int
    evaluations: float
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LoopRepair:
        """Reads what `to_dict` wrote."""
        return cls(**values)


def choose_repair(
    evaluator: Evaluator,
    space: SearchSpace,
    samples: int = 1000,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> LoopRepair:
    """Finds the best repair within the loop and has the evaluator's simulated network use it from then on.

    Args:
        evaluator: Its simulated network was calibrated with `quantizer.repair=auto`.
        space: Gives the policies that are measured.
        samples: Of the selection split, at least, if it has as many; whole batches are measured.
        seed: Of the random policies.
        progress: Called with the number of measurements done and their total.

    Raises:
        ConfigError: If calibration has not observed what repairs need.
    """
    started, simulated, task = time.perf_counter(), evaluator.simulated, evaluator.task
    if not simulated.repairable:
        simulated.repair_with("none")
        return LoopRepair("none", {}, 0, 0.0, 0.0)
    reference, policies = evaluator.float_scores("selection"), probes(space, seed)
    fidelity = min(1.0, samples / len(reference))
    scores: dict[str, list[np.ndarray]] = {}
    for number, repair in enumerate(REPAIRS):
        simulated.repair_with(repair)
        scores[repair] = []
        evaluator.order(policies.values(), "selection", fidelity)
        for policy in policies.values():
            scores[repair].append(evaluator.scores(policy, "selection", fidelity))
            progress(number * len(policies) + len(scores[repair]), len(REPAIRS) * len(policies))
    chosen = best_repair(task, scores)
    simulated.repair_with(chosen)
    measured = len(scores["none"][0])
    drops = {
        name: {repair: _or_none(drop(task, scores[repair][index], reference[:measured])) for repair in REPAIRS}
        for index, name in enumerate(policies)
    }
    evaluations = len(REPAIRS) * len(policies) * measured / len(reference)
    return LoopRepair(chosen, drops, measured, round(evaluations, 3), round(time.perf_counter() - started, 3))


def probes(space: SearchSpace, seed: int = 0) -> dict[str, Policy]:
    """Returns policies that stand for a space, by what they are: its lowest and middle formats, and random mixes."""
    rng = np.random.default_rng(seed)
    found = {
        "lowest": space.decode([0] * len(space.decisions)),
        "middle": space.decode([len(decision.formats) // 2 for decision in space.decisions]),
    }
    found |= {f"random {number}": space.sample(rng) for number in range(1, RANDOM_PROBES + 1)}
    known: dict[str, str] = {}
    return {name: policy for name, policy in found.items() if known.setdefault(policy.digest, name) == name}


def best_repair(task: Task, scores: Mapping[str, list[np.ndarray]]) -> str:
    """Returns the last repair, from simple to complex, that is surely better than the best one before it.

    For a task without a score per sample there is no interval: a repair has to be better on average over the policies,
    and worse on none of them.

    Args:
        task: Says which scores are better.
        scores: Of every policy, by repair, on the same samples.
    """
    chosen, *others = scores
    for repair in others:
        gains = np.stack([worse_by(task, *pair) for pair in zip(scores[chosen], scores[repair], strict=True)])
        if _is_sure(gains) if task.per_sample else bool((gains >= 0).all() and gains.mean() > 0):
            chosen = repair
    return chosen


def _is_sure(gains: np.ndarray) -> bool:
    """True if gains, shape `(policies, samples)`, surely have a positive mean; collapsed policies say nothing."""
    sound = gains[np.isfinite(gains).all(1)]
    return bool(len(sound)) and paired_interval(sound.mean(0))[1] > 0


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
