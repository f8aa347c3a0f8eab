"""How sure a latency is, and which of two is the smaller: intervals, probabilities and ties.

A latency is a sum over paths, `sum_p T_p exp(e_p)`: predicted seconds, each times an error that all operations of the
path share, `e_p ~ N(0, sigma_p^2)`, independent between paths. Two policies on one device share the errors, so what
they have in common cancels; on two devices they are independent. A sum of log-normals is taken as the log-normal of the
same mean and variance (Fenton, "The sum of log-normal probability distributions in scatter transmission systems", IRE
Transactions on Communications Systems, 1960), which is exact where there is one path, and otherwise makes intervals a
little too wide: with sigmas of 0.2 and 0.7 one of 80% holds 87%.

Errors of single operations are not in this: of two policies that differ in one path alone, the one with the fewer
seconds is faster for certain, however near they are.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from statistics import NormalDist
from typing import Literal, TypeVar

from hwmodels.cost import Bound, CostReport, Tier

Key = TypeVar("Key", bound=str)

NORMAL = NormalDist()
LEVEL = 0.8
"""Share of latencies that an interval holds, unless another is asked for."""

SAME = 1e-12
"""Relative difference up to which the seconds of two policies in one path are the same: what rounding leaves."""


def latency_interval(report: CostReport, level: float = LEVEL) -> tuple[float, float]:
    """The interval that holds a latency with probability `level`, as likely below it as above.

    Args:
        report: What is asked about.
        level: In (0, 1).

    Returns:
        Seconds, the lower and the upper end.

    Raises:
        ValueError: If the latency or the error of a path is not known, or `level` is no probability.
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    parts = {path: seconds for path, seconds in known_seconds(report).items() if seconds}
    if not parts:
        return 0.0, 0.0
    middle, sigma = _log_normal([(seconds, _sigma(path, report)) for path, seconds in parts.items()])
    reach = NORMAL.inv_cdf((1 + level) / 2) * sigma
    return math.exp(middle - reach), math.exp(middle + reach)


def knows_error(report: CostReport) -> bool:
    """Whether a latency and the error of every path that it is made of are known."""
    used = [path for path, seconds in report.path_seconds.items() if seconds]
    errors = [report.sigmas.get(path, math.nan) for path in used]
    return bool(used) and not any(map(math.isnan, (report.total.latency_s, *errors)))


def probability_faster(one: CostReport, other: CostReport, same_device: bool | None = None) -> float:
    """The probability that `one` takes less time than `other`; a half where they are the same.

    The paths in which `one` takes longer are held against those in which `other` does, each side as a log-normal:
    exact where each side has one path.

    Args:
        one: A policy on a device.
        other: Another policy, or another device.
        same_device: Whether both share their errors. By default they do if their `source` is the same.

    Raises:
        ValueError: If a latency or the error of a path in which they differ is not known.
    """
    losses, gains = _sides(one, other, one.source == other.source if same_device is None else same_device)
    if not losses or not gains:
        return 0.5 if losses == gains else float(not losses)
    (loss, loss_sigma), (gain, gain_sigma) = _log_normal(losses), _log_normal(gains)
    sigma = math.hypot(loss_sigma, gain_sigma)
    if not sigma:
        return 0.5 if loss == gain else float(loss < gain)
    return NORMAL.cdf((gain - loss) / sigma)


def is_tie(one: CostReport, other: CostReport, same_device: bool | None = None) -> bool:
    """Whether the difference of two latencies is under its own standard deviation, in logarithms.

    That is where neither is faster with a probability of 84% or more.

    Raises:
        ValueError: As `probability_faster`.
    """
    certain = NORMAL.cdf(1.0)
    return 1 - certain < probability_faster(one, other, same_device) < certain


def tier_seconds(report: CostReport) -> Mapping[Tier | Literal[""], float]:
    """Tier to the seconds of the latency that can be trusted so far: the histogram of tiers, most seconds first.

    What is no layer (other operations, conversions, starting the network), and layers that name no tier, count to the
    latency's tier, which is the worst of all; empty where the report names none.

    Raises:
        ValueError: If the latency is not known.
    """
    worst: Tier | Literal[""] = report.tiers.get("latency_s", "")
    return _histogram(report, {name: layer.tier or worst for name, layer in report.layers.items()}, worst)


def bound_seconds(report: CostReport) -> Mapping[Bound, float]:
    """Bound to the seconds of the layers it limits, most seconds first; what is no layer counts as not known, empty.

    Raises:
        ValueError: If the latency is not known.
    """
    return _histogram(report, {name: layer.bound for name, layer in report.layers.items()}, "")


def known_seconds(report: CostReport) -> Mapping[str, float]:
    """The seconds of each path.

    Raises:
        ValueError: If the latency is not known, or not divided among paths.
    """
    source = report.source or "the cost model"
    if math.isnan(report.total.latency_s):
        raise ValueError(f"the latency is not known to {source}, so there is nothing to compare")
    if report.total.latency_s and not report.path_seconds:
        raise ValueError(f"{source} does not say which paths its latency is made of, so its error is not known")
    return report.path_seconds


def _histogram(report: CostReport, keys: Mapping[str, Key], rest: Key) -> dict[Key, float]:
    """Seconds by the key of their layer, those outside of layers at `rest`."""
    total = report.total.latency_s
    if math.isnan(total):
        known_seconds(report)
    seconds: defaultdict[Key, float] = defaultdict(float)
    for name, layer in report.layers.items():
        seconds[keys[name]] += layer.cost.latency_s
    left = total - sum(seconds.values())
    if left > SAME * total:
        seconds[rest] += left
    return dict(sorted(seconds.items(), key=lambda item: -item[1]))


def _sides(
    one: CostReport, other: CostReport, same_device: bool
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Seconds and sigma of every path in which `one` takes longer, and of every path in which `other` does."""
    ours, theirs = known_seconds(one), known_seconds(other)
    losses, gains = [], []
    if not same_device:
        losses = [(seconds, _sigma(path, one)) for path, seconds in ours.items() if seconds]
        gains = [(seconds, _sigma(path, other)) for path, seconds in theirs.items() if seconds]
        return losses, gains
    for path in dict.fromkeys((*ours, *theirs)):
        mine, its = ours.get(path, 0.0), theirs.get(path, 0.0)
        if abs(mine - its) <= SAME * max(one.total.latency_s, other.total.latency_s):
            continue
        (losses if mine > its else gains).append((abs(mine - its), _sigma(path, one, other)))
    return losses, gains


def _sigma(path: str, *reports: CostReport) -> float:
    """Standard deviation of the logarithm of a path's error: the largest that the reports state."""
    found = [report.sigmas[path] for report in reports if path in report.sigmas]
    if not found or any(math.isnan(sigma) for sigma in found):
        where = reports[0].source or "the cost model"
        raise ValueError(f"the error of path {path!r} is not known to {where}, so neither is that of the latency")
    return max(found)


def _log_normal(parts: list[tuple[float, float]]) -> tuple[float, float]:
    """Mean and standard deviation of the logarithm of `sum T exp(e)`, by its mean and variance.

    Args:
        parts: T and the sigma of e, at least one; T above 0.
    """
    largest = max(seconds for seconds, _ in parts)  # squares of times underflow
    mean = sum(seconds / largest * math.exp(sigma**2 / 2) for seconds, sigma in parts)
    variance = sum((seconds / largest) ** 2 * math.exp(sigma**2) * math.expm1(sigma**2) for seconds, sigma in parts)
    squared = math.log1p(variance / mean**2)
    return math.log(largest) + math.log(mean) - squared / 2, math.sqrt(squared)
