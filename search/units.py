"""Numbers as people read them: units that fit the size of a cost, and sensible significant digits."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

NONE = "–"


class Unit(NamedTuple):
    """A unit of a cost: its symbol, empty for a bare number, and how many SI units it is."""

    symbol: str
    size: float


SECONDS = (Unit("ns", 1e-9), Unit("µs", 1e-6), Unit("ms", 1e-3), Unit("s", 1.0))
JOULES = (Unit("nJ", 1e-9), Unit("µJ", 1e-6), Unit("mJ", 1e-3), Unit("J", 1.0))
BYTES = (Unit("B", 1.0), Unit("KiB", 2.0**10), Unit("MiB", 2.0**20), Unit("GiB", 2.0**30))
COUNTS = (Unit("", 1.0), Unit("k", 1e3), Unit("M", 1e6), Unit("G", 1e9), Unit("T", 1e12))
BITS = (Unit("", 1.0),)

COST_UNITS: dict[str, tuple[Unit, ...]] = {
    "latency_s": SECONDS,
    "energy_j": JOULES,
    "weight_bytes": BYTES,
    "activation_bytes": BYTES,
    "bit_ops": COUNTS,
    "average_weight_bits": BITS,
    "effective_bits": BITS,
}
COST_NAMES = {
    "latency_s": "latency",
    "energy_j": "energy",
    "weight_bytes": "stored size",
    "activation_bytes": "peak activations",
    "bit_ops": "bit operations",
    "average_weight_bits": "average weight bits",
    "effective_bits": "effective weight bits",
}


def unit_for(cost: str, values: Iterable[float]) -> Unit:
    """Returns the largest unit of a cost that the largest of `values`, in SI units, reaches."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    units = COST_UNITS[cost]
    return next((unit for unit in reversed(units) if unit.size <= largest), units[0])


def axis_label(cost: str, unit: Unit) -> str:
    """What an axis of a cost says, such as `stored size (KiB)`."""
    return f"{COST_NAMES[cost]} ({unit.symbol})" if unit.symbol else COST_NAMES[cost]


def quantity(cost: str, value: float | None, digits: int = 3) -> str:
    """A cost in the unit that fits, such as `24.1 KiB`; a dash where it is not known."""
    if value is None or math.isnan(value):
        return NONE
    unit = unit_for(cost, [value])
    return f"{significant(value / unit.size, digits)} {unit.symbol}".rstrip()


def significant(value: float | None, digits: int = 3) -> str:
    """A number with that many significant digits and no exponent, all digits before the point kept; a dash for none."""
    if value is None or not math.isfinite(value):
        return NONE
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits - 1}e}")
    decimals = max(digits - 1 - math.floor(math.log10(abs(rounded))), 0)
    return f"{value:,.{decimals}f}".replace("-", "−")


def interval(value: float, low: float | None, high: float | None, signed: bool = False, decimals: int = 4) -> str:
    """A number with its 95% interval, such as `+0.0029 [−0.0051, +0.0109]`, or alone where it has none."""
    style = f"{'+' * signed}.{decimals}f"
    text = format(value, style)
    if low is not None and high is not None and math.isfinite(low) and math.isfinite(high):
        text += f" [{low:{style}}, {high:{style}}]"
    return text.replace("-", "−")


def log_ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: round numbers, the fewer to a power of ten the wider the range.

    Args:
        low: Smallest value, above 0.
        high: Largest value.
    """
    width = math.log10(high / low)
    steps = (1, 1.5, 2, 3, 5, 7) if width < 1.5 else (1, 2, 5) if width < 3 else (1,)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{step * 10.0**decade:g}") for decade in decades for step in steps]
    return [tick for tick in ticks if low <= tick <= high]
