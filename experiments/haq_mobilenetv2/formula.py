"""Synthetic scores for a search on HAQ's table: a formula, so they say nothing about how good any network is.

Quantizing decision d (a layer's weights, or the tensor it reads) to b bits leaves an error `e_d = a_d 2^-b`. A policy's
loss is `sum_d e_d^2 + sum_d c_d e_d e_(d+1)`, over decisions in the order they act: a layer's input, its weights, the
next layer's input, and so on. Amplitudes squared are drawn log-normal (sigma 1), couplings uniform from [-0.5, 1), so
that errors of neighbours add up more often than they cancel, and the optimum of what adds up is not that of the whole.
The quality of a policy is `exp(-loss)`, 1 for the float network.

Strategies that solve on sensitivities are given each choice's own loss `e_d^2`, off by a factor `exp(0.2 N(0, 1))`, and
nothing about couplings.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NoReturn, cast

import numpy as np
from torch import Tensor

from hwmodels import Precision
from search.errors import UnsupportedError
from search.quality.evaluate import Evaluator, Quality
from search.quantize.simulate import QuantizedModel
from search.sensitivity.choices import choices_of, starts_of
from search.sensitivity.table import SensitivityTable
from search.space import SearchSpace
from search.tasks.task import Split, Task

LOSS_AT_4_BITS = 0.2
"""Sum of the choices' own losses where everything has 4 bits: sets the scale."""

SPREAD = 1.0
COUPLINGS = (-0.5, 1.0)  # within [-1, 1] the loss is never negative
PREDICTOR_ERROR = 0.2
SEED = 0


@dataclass(frozen=True)
class Formula:
    """The loss of every policy of a space.

    Attributes:
        space: The space.
        amplitudes: Error of every decision at 0 bits, shape `(decisions,)`.
        couplings: What the errors of two decisions add, symmetric, shape `(decisions, decisions)`.
    """

    space: SearchSpace
    amplitudes: np.ndarray
    couplings: np.ndarray

    @classmethod
    def draw(cls, space: SearchSpace, seed: int = SEED) -> Formula:
        """Draws amplitudes and couplings."""
        rng = np.random.default_rng(seed)
        count = len(space.decisions)
        squares = rng.lognormal(0.0, SPREAD, count)
        amplitudes = np.sqrt(squares / squares.sum() * LOSS_AT_4_BITS * 4.0**4)
        order = [decision for unit in space.units for decision in (unit.input, unit.weight)]
        couplings = np.zeros((count, count))
        couplings[order[:-1], order[1:]] = rng.uniform(*COUPLINGS, count - 1)
        return cls(space, amplitudes, couplings + couplings.T)

    def loss(self, policy: Mapping[str, Precision]) -> float:
        """The loss of a policy."""
        errors = self.errors[starts_of(self.space) + self.space.encode(policy)]
        return float(errors @ errors + errors @ self.couplings @ errors / 2)

    @property
    def scores(self) -> np.ndarray:
        """What adds up: each choice's own loss, shape `(choices,)`."""
        return self.errors**2

    @property
    def form(self) -> np.ndarray:
        """The whole loss as a quadratic form: half the sum over all ordered pairs of choices, `(choices, choices)`."""
        couplings = self.couplings + 2 * np.eye(len(self.couplings))
        form: np.ndarray = couplings[np.ix_(self._decision, self._decision)] * np.outer(self.errors, self.errors)
        return form

    @cached_property
    def errors(self) -> np.ndarray:
        """The error of every choice of every decision, shape `(choices,)`."""
        bits = np.array([choice.format.bits for choice in choices_of(self.space)])
        errors: np.ndarray = self.amplitudes[self._decision] * 2.0**-bits
        return errors

    def sensitivity(self, seed: int = SEED) -> SensitivityTable:
        """What strategies are told: each choice's own loss, with an error."""
        noise = np.random.default_rng([seed, 1]).normal(0.0, PREDICTOR_ERROR, len(self.errors))
        return SensitivityTable({"kl": self.scores * np.exp(noise)})

    @cached_property
    def _decision(self) -> np.ndarray:
        """Which decision each choice is of."""
        return np.repeat(np.arange(len(self.space.decisions)), [len(d.formats) for d in self.space.decisions])


class FormulaTask(Task):
    """Stands where a task is expected: there is neither model nor data."""

    name = "haq_mobilenetv2"
    metric = "synthetic score"
    per_sample = False

    def batches(self, split: Split) -> Iterable[Any]:
        return ()

    def score(self, outputs: Tensor, batch: Any) -> NoReturn:
        raise UnsupportedError("scores here are a formula of the policy; there are no outputs")


class FormulaEvaluator(Evaluator):
    """Puts policies into the formula; nothing is run, and nothing is uncertain."""

    def __init__(self, formula: Formula) -> None:
        super().__init__(FormulaTask(), cast(QuantizedModel, None))  # all that would run it is overridden below
        self._formula = formula

    def float_quality(self, split: Split) -> Quality:
        return Quality(1.0, 1, 0.0, 0.0, 0.0)

    def measure(self, policy: Mapping[str, Precision], split: Split, fidelity: float = 1.0) -> Quality:
        if fidelity < 1:  # would be exact, for a sixteenth of the price
            raise UnsupportedError("the formula has no samples to measure a part of; give strategy.fidelities=[]")
        quality = float(np.exp(-self._formula.loss(policy)))
        return Quality(quality, 1, 1 - quality, 1 - quality, 1 - quality)

    def scores(self, policy: Mapping[str, Precision], split: Split, fidelity: float = 1.0) -> NoReturn:
        raise UnsupportedError("the formula gives no scores per sample; use strategies that do not race")
