"""What each figure shows, in words and numbers, for those who cannot see it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np

from hwmodels import Format
from search.figures.bits import AllocationInfo, MembersInfo
from search.figures.convergence import ConvergenceInfo
from search.figures.front import FrontInfo, Point
from search.figures.layer_costs import OTHER, LayerCostsInfo
from search.figures.sensitivity import SensitivityInfo
from search.units import COST_NAMES, quantity, significant

MOST_NAMED = 3
"""Layers that a text names."""


def front_words(infos: Sequence[FrontInfo]) -> str:
    """Says where the front begins and ends, and where the winner and the baselines lie."""
    return " ".join(_plane_words(info) for info in infos)


def _plane_words(info: FrontInfo) -> str:
    def at(point: Point) -> str:
        return f"{info.metric} {point.quality:.4f} at {quantity(info.cost, point.cost * info.unit.size)}"

    ends = f"from {at(info.steps[0])} to {at(info.steps[-1])}" if len(info.steps) > 1 else f"{at(info.steps[0])}"
    baselines = "; ".join(f"{point.name} {at(point)}" for point in info.baselines)
    return (
        f"{COST_NAMES[info.cost].capitalize()} against {info.metric}: {_count(len(info.steps), 'plan')} on the front, "
        f"{ends}. The winner has {at(info.winner)}. To compare: {baselines}."
    )


def allocation_words(info: AllocationInfo) -> str:
    """Says how many layers have how many bits."""
    text = f"Bits of {_count(len(info.layers), 'layer')}. Weights: {_bits(info.weights)}."
    inputs = [format for format in info.inputs if format is not None]
    return f"{text} Inputs: {_bits(inputs)}." if inputs else text


def members_words(info: MembersInfo) -> str:
    """Says how the front's members and the winner spread their bits."""
    means = [np.mean([format.bits for format in row]) for row in info.weights]
    return (
        f"Weight bits of {_count(len(info.layers), 'layer')} in {_count(len(info.members), 'plan')}, "
        f"on average over layers from {min(means):.1f} to {max(means):.1f} bits. "
        f"The winner: {_bits(info.weights[info.winner])}."
    )


def sensitivity_words(info: SensitivityInfo) -> str:
    """Says which decisions move the outputs most."""
    sentences = []
    for panel in info.panels:
        known = [
            (float(panel.scores[row, column]), decision, format)
            for row, format in enumerate(panel.formats)
            for column, decision in enumerate(panel.decisions)
            if np.isfinite(panel.scores[row, column])
        ]
        worst = sorted(known, reverse=True)[:MOST_NAMED]
        named = ", ".join(f"{decision} in {format} ({significant(score)})" for score, decision, format in worst)
        sentences.append(
            f"Divergence from the float outputs of {_count(len(panel.decisions), f'{panel.side} decision')} in "
            f"{_count(len(panel.formats), 'format')}. The largest: {named}."
        )
    return " ".join(sentences)


def layer_costs_words(info: LayerCostsInfo) -> str:
    """Says which layers cost most."""
    sentences = []
    for cost, shares in info.shares.items():
        largest = sorted(zip([*info.layers, OTHER], shares, strict=True), key=lambda pair: -pair[1])[:MOST_NAMED]
        named = ", ".join(f"{name} {share:.0f}%" for name, share in largest)
        sentences.append(f"{COST_NAMES[cost].capitalize()} of {quantity(cost, info.totals[cost])}: {named}.")
    return " ".join(["The largest shares of each cost.", *sentences])


def convergence_words(info: ConvergenceInfo) -> str:
    """Says where the best so far and the hypervolume began and ended."""
    if not info.evaluations:
        return "Nothing was measured."
    spent = f"{info.evaluations[-1]:g} evaluations and {significant(info.seconds[-1])} seconds"
    sentences = [f"The search spent {spent}."]
    for name, values in (("Best so far", info.best), ("Hypervolume", info.hypervolume)):
        known = [(at, value) for at, value in zip(info.evaluations, values, strict=False) if np.isfinite(value)]
        if known:
            (first, start), end = known[0], known[-1][1]
            reached = next(at for at, value in known if value == end)
            sentences.append(
                f"{name}: {start:.4f} after {first:g}, {end:.4f} in the end, reached after {reached:g} evaluations."
            )
    return " ".join(sentences)


def _bits(formats: Iterable[Format]) -> str:
    """Counts of layers by bits, such as `3 at 8 bits, 7 at 4 bits, 1 in float`."""
    counts = Counter((format.is_float, format.bits) for format in formats)
    return ", ".join(
        f"{count} in float" if is_float else f"{count} at {bits} bits"
        for (is_float, bits), count in sorted(counts.items(), key=lambda item: (not item[0][0], -item[0][1]))
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"
