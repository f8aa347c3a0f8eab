"""Backward scores: what a choice does to the loss and, with any other choice, to the divergence, to leading order.

For a random vector `u` of the outputs with `E[u u'] = H`, such as the slope of the log-likelihood of a label drawn from
the model itself, let

    s[n, i] = < gradient of u . outputs at what choice i changes, the change >        of sample n

Then `G = mean_n s s'` is, over draws, the quadratic form of the divergence: `1/2 x' G x` predicts that of a policy `x`
in nats, interactions included. `H` is the Fisher metric of logits (Kunstner et al., 2019, arXiv 1905.12558), and the
second derivative of the task's divergence for other outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search.errors import DataError, UnsupportedError
from search.quality.subsets import is_regular, sample_count, select
from search.quantize.simulate import QuantizedModel
from search.sensitivity.choices import Base, Choice
from search.sensitivity.cotangents import Kind, draw_cotangents
from search.sensitivity.gram import Gram
from search.sensitivity.samples import Cotangents, SampleScorer, UnclearError
from search.tasks.task import Task


@dataclass(frozen=True)
class BackwardScores:
    """Scores over flat positions of choices; those of disjoint shards add up to the scores of all samples.

    Attributes:
        gram: Interactions: `1/2 x' gram.mean x` is in nats per sample.
        fisher: Mean of `<g, d>^2`, the diagonal of `gram.mean`: twice the predicted divergence, shape `(K,)`.
        fisher_diagonal: Mean of `sum g^2 d^2` over the values of weights and inputs, as if they did not interact.
        gradient: Mean of `<slope of the loss, d>`, signed: of the divergence from the float model at a quantized base,
            at the float base, where that is flat, of the task's loss with labels; None where there are none.
    """

    gram: Gram
    fisher: np.ndarray
    fisher_diagonal: np.ndarray
    gradient: np.ndarray | None

    @classmethod
    def of(cls, gram: Gram, squares: np.ndarray, slopes: np.ndarray | None) -> BackwardScores:
        """Returns scores from sums over the samples of `gram`."""
        gradient = None if slopes is None else slopes / gram.count
        return cls(gram, np.diagonal(gram.mean).copy(), squares / gram.count, gradient)

    def __add__(self, other: BackwardScores) -> BackwardScores:
        gram = self.gram + other.gram
        squares = self.fisher_diagonal * self.gram.count + other.fisher_diagonal * other.gram.count
        slopes = None
        if self.gradient is not None and other.gradient is not None:
            slopes = self.gradient * self.gram.count + other.gradient * other.gram.count
        return BackwardScores.of(gram, squares, slopes)


def backward_scores(
    task: Task,
    simulated: QuantizedModel,
    choices: Sequence[Choice],
    base: Base | None = None,
    *,
    draws: int = 4,
    seed: int = 0,
    kind: Kind = "labels",
    shard: tuple[int, int] = (0, 1),
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> BackwardScores:
    """Scores choices and all their pairs on the calibration split, by backward passes.

    Args:
        task: Gives data, divergence and loss.
        simulated: The network, calibrated; left in float.
        choices: What is scored.
        base: The precisions from which choices depart; float by default. Gradients pass its quantizers straight
            through.
        draws: Random vectors for every sample.
        seed: Of the random vectors; they do not depend on batches or shards.
        kind: What is drawn: `labels`, or `signs` of the metric's coordinates, which vary less where the model is
            confident. Outputs that are no logits take signs.
        shard: Index and number of shards: every so-manieth sample is taken.
        progress: Called with the number of samples scored and their total.

    Raises:
        DataError: If a shard has no sample, or a score is not finite.
        UnsupportedError: If samples cannot be taken out of batches, or the task's divergence cannot be differentiated.
    """
    scorer = SampleScorer(task, simulated, choices, base or {})

    def cotangents(numbers: np.ndarray) -> Cotangents:
        def send(outputs: Tensor, part: Any) -> list[Tensor]:
            return [*draw_cotangents(task, outputs, numbers, draws, seed, kind), *scorer.slopes(outputs, part)]

        return send

    batches = list(task.batches("calibration"))
    scorer.rehearse(batches, draws + 1)
    gram, squares, slopes = Gram.empty(len(choices)), np.zeros(len(choices)), np.zeros(len(choices))
    has_slope = True
    parts = list(_shard(batches, *shard))
    total = sum(len(rows) for _, rows, _ in parts)
    for batch, rows, first in parts:
        while len(rows):
            taken = rows[: scorer.samples_at_once]
            try:
                part = select([batch], [torch.from_numpy(taken)])
                scored = scorer.score(part, len(taken), cotangents(first + taken), draws)
            except UnclearError as error:
                scorer.give_up(str(error))
                continue
            drawn = scored.rows[:draws].reshape(-1, len(choices))
            gram += Gram(drawn.T @ drawn / draws, len(taken))
            squares += scored.squares / draws
            has_slope = len(scored.rows) > draws
            slopes += scored.rows[draws:].sum((0, 1))
            rows = rows[len(taken) :]
            progress(gram.count, total)
    simulated.apply({})
    if not gram.count:
        raise DataError(f"shard {shard[0]} of {shard[1]} has no calibration sample; use fewer shards")
    wrong = np.flatnonzero(~np.isfinite(np.diagonal(gram.total) + squares + slopes))
    if len(wrong):
        raise DataError(
            f"the gradient is not finite with {choices[wrong[0]]}; "
            "the model's outputs on the calibration split, and their derivatives, must be"
        )
    return BackwardScores.of(gram, squares, slopes if has_slope else None)


def _shard(batches: Sequence[Any], index: int, count: int) -> Iterator[tuple[Any, np.ndarray, int]]:
    """Yields every batch, the rows of it that belong to a shard, and the number of its first sample in the split."""
    first = 0
    for batch in batches:
        samples = sample_count(batch)
        if samples is None or not is_regular([batch]):
            raise UnsupportedError(
                "backward scores look at single samples, which cannot be taken out of the calibration batches; batches "
                "must be tensors in tuples, lists or mappings, all with the samples along the first axis"
            )
        rows = np.arange(samples)
        yield batch, rows[(first + rows) % count == index], first
        first += samples
