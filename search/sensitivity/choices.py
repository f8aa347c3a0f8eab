"""Choices as positions of one flat vector: what scores, interactions and output changes are indexed by.

A policy of the space is a 0/1 vector over them, with a one for the format that each decision takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from hwmodels import Format, Precision
from hwmodels.precision import FLOAT_PRECISION
from search.space import Decision, SearchSpace

Base = Mapping[str, Precision]
"""The precisions from which choices are told apart, layer by layer; a layer that it does not name is in float."""


@dataclass(frozen=True)
class Choice:
    """One decision in one of its formats.

    Attributes:
        decision: The decision.
        format: The format it takes.
    """

    decision: Decision
    format: Format

    def __str__(self) -> str:
        return f"the {self.decision.side} of {', '.join(self.decision.layers)} in {self.format}"

    def on(self, base: Base) -> dict[str, Precision]:
        """Returns the base with this choice made."""
        made = {}
        for layer in self.decision.layers:
            held = base.get(layer, FLOAT_PRECISION)
            is_weight = self.decision.side == "weight"
            made[layer] = Precision(self.format, held.input) if is_weight else Precision(held.weight, self.format)
        return {**base, **made}

    def is_in(self, base: Base) -> bool:
        """Whether the base makes this choice already, so that it changes nothing."""
        held = (getattr(base.get(layer, FLOAT_PRECISION), self.decision.side) for layer in self.decision.layers)
        return all(format == self.format for format in held)


def choices_of(space: SearchSpace) -> tuple[Choice, ...]:
    """Lists the choices of a space: decision by decision, in the order of its formats."""
    return tuple(Choice(decision, format) for decision in space.decisions for format in decision.formats)


def starts_of(space: SearchSpace) -> np.ndarray:
    """Returns the position of every decision's first choice, shape `(decisions,)`."""
    return np.array([0, *accumulate(len(decision.formats) for decision in space.decisions)][:-1])


def positions(space: SearchSpace, point: Sequence[int]) -> np.ndarray:
    """Returns the positions of the choices that a point of the space makes, shape `(decisions,)`."""
    found: np.ndarray = starts_of(space) + np.asarray(point)
    return found
