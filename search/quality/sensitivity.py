"""Sensitivity: how far a single choice moves the network's outputs, everything else in float.

The score is the mean divergence from the float outputs over the calibration split, for logits the Kullback-Leibler
divergence in nats. Weight formats and input formats are scored apart, so a layer costs |W| + |A| forward passes over
the split, and a policy's predicted loss is the sum over its choices.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from hwmodels import Format, Precision
from search.errors import DataError
from search.files import JsonLines
from search.quantize.simulate import QuantizedModel, exact_inference
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
    if jobs:
        reference = _outputs(task, simulated, {})
    for done, (decision, format) in enumerate(jobs, total - len(jobs) + 1):
        outputs = _outputs(task, simulated, _single_choice(decision, format))
        distances = [task.divergence(p, q) for p, q in zip(reference, outputs, strict=True)]
        score = float(torch.cat(distances).mean())
        if not np.isfinite(score):
            raise DataError(
                f"the divergence is {score} with the {decision.side} of {', '.join(decision.layers)} in {format}; "
                "the model's outputs on the calibration split must be finite"
            )
        row: dict[str, Any] = {"decision": decision.name, "side": decision.side, "format": str(format), "score": score}
        known[decision.name, decision.side, str(format)] = score
        if log:
            log.append(row)
        progress(done, total)
    return SensitivityTable(
        tuple(
            np.array([known.get((decision.name, decision.side, str(format)), 0.0) for format in decision.formats])
            for decision in space.decisions
        )
    )


def _single_choice(decision: Decision, format: Format) -> Mapping[str, Precision]:
    precision = Precision(weight=format) if decision.side == "weight" else Precision(input=format)
    return dict.fromkeys(decision.layers, precision)


def _outputs(task: Task, simulated: QuantizedModel, policy: Mapping[str, Precision]) -> list[Tensor]:
    model = simulated.apply(policy)
    with exact_inference():
        return [task.outputs(model, batch) for batch in task.batches("calibration")]
