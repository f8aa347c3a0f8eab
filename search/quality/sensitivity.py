"""Sensitivity: how far a single choice moves the network's outputs, everything else in float.

The score is the mean divergence from the float outputs over the calibration split, for logits the Kullback-Leibler
divergence in nats. Weight formats and input formats are scored apart, so a layer costs |W| + |A| passes over the split,
each from that layer on, and a policy's predicted loss is the sum over its choices.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hwmodels import Format, Precision
from search.errors import DataError
from search.files import JsonLines
from search.quantize.prefix import PrefixRunner
from search.quantize.simulate import QuantizedModel
from search.space import Decision, SearchSpace
from search.tasks.task import Task

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class SensitivityTable:
    """One score per decision and format.

    Attributes:
        scores: For each decision of the space, one score per format, in their order; lower is better.
    """

    scores: tuple[np.ndarray, ...]

    def predict(self, point: Sequence[int]) -> float:
        """Predicted loss of a point of the space: the sum of its choices' scores."""
        return float(sum(scores[index] for scores, index in zip(self.scores, point, strict=True)))

    def to_frame(self, space: SearchSpace) -> pd.DataFrame:
        """One row per decision and format: `decision, side, layers, format, score`."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "decision": decision.name,
                    "side": decision.side,
                    "layers": " ".join(decision.layers),
                    "format": str(format),
                    "score": float(score),
                }
                for decision, scores in zip(space.decisions, self.scores, strict=True)
                for format, score in zip(decision.formats, scores, strict=True)
            ]
        )


def score_choices(
    task: Task,
    simulated: QuantizedModel,
    space: SearchSpace,
    log: JsonLines | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> SensitivityTable:
    """Scores every choice of every decision on the calibration split.

    Args:
        task: Gives the data and the divergence.
        simulated: The network, calibrated.
        space: What may be decided.
        log: Scores already known, and where new ones are added as they come; a resumed run measures only the rest.
        progress: Called with the number of scores known and their total.

    Raises:
        DataError: If the divergence of a choice is not a number.
    """
    known = {(row["decision"], row["side"], row["format"]): row["score"] for row in (log.read() if log else [])}
    jobs = [
        (decision, format)
        for decision in space.decisions
        for format in decision.formats
        if not format.is_float and (decision.name, decision.side, str(format)) not in known
    ]
    total = len(known) + len(jobs)
    for job, score in _scores(task, simulated, [_single_choice(*job) for job in jobs]):
        decision, format = jobs[job]
        if not np.isfinite(score):
            raise DataError(
                f"the divergence is {score} with the {decision.side} of {', '.join(decision.layers)} in {format}; "
                "the model's outputs on the calibration split must be finite"
            )
        row: dict[str, Any] = {"decision": decision.name, "side": decision.side, "format": str(format), "score": score}
        known[decision.name, decision.side, str(format)] = score
        if log:
            log.append(row)
        progress(len(known), total)
    return SensitivityTable(
        tuple(
            np.array([known.get((decision.name, decision.side, str(format)), 0.0) for format in decision.formats])
            for decision in space.decisions
        )
    )


def _single_choice(decision: Decision, format: Format) -> Mapping[str, Precision]:
    precision = Precision(weight=format) if decision.side == "weight" else Precision(input=format)
    return dict.fromkeys(decision.layers, precision)


def _scores(
    task: Task, simulated: QuantizedModel, policies: Sequence[Mapping[str, Precision]]
) -> Iterator[tuple[int, float]]:
    """Yields the index and the mean divergence of every policy, in an order that suits the network."""
    if not policies:
        return
    runner = PrefixRunner(simulated, task, list(task.batches("calibration")))
    reference = runner.run({}, lambda outputs, batch: outputs)

    def divergence(outputs: Tensor, batch: int) -> Tensor:
        return task.divergence(reference[batch], outputs)

    for index, distances in runner.sweep(policies, divergence):
        yield index, float(torch.cat(distances).mean())
