"""A number with its unit and its source, or the admission that it is not known."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias

Unit = Literal["s", "Hz", "W", "J", "J/byte", "byte", "byte/s", "op/s", "1"]
Confidence = Literal["primary", "secondary", "derived", "measured", "fitted", "assumed", "recalled", "none"]
"""Where a number stands, best first: the maker's document or code; a page that quotes it; arithmetic on such numbers;
timed on the device; fitted to timings; a reasoned guess; memory of an expert, to be verified; none, for what is
unknown."""

UNKNOWN: Literal["unknown"] = "unknown"
SHAKY: tuple[Confidence, ...] = ("secondary", "assumed", "recalled")
"""What a reader should be told a number rests on."""


@dataclass(frozen=True)
class Quantity:
    """A number with its unit and where it comes from.

    Attributes:
        value: The number, in `unit`; `unknown` where nobody has published it.
        unit: An SI unit: `s`, `Hz`, `W`, `J`, `J/byte`, `byte`, `byte/s`, `op/s`, or `1` for ratios and counts.
        source: Publication, or the measurement or assumption that the number stands on; for what is unknown, where it
            was looked for.
        confidence: What kind of source that is.
    """

    value: float | Literal["unknown"]
    unit: Unit
    source: str
    confidence: Confidence
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.value != UNKNOWN and not 0 <= self.value < math.inf:
            raise ValueError(f"value must be finite and not negative, or the word unknown, got {self.value}")
        if not self.source.strip():
            raise ValueError("source is empty; say where the number comes from")
        if (self.value == UNKNOWN) != (self.confidence == "none"):
            raise ValueError("confidence is none where, and only where, the value is unknown")

    @property
    def is_known(self) -> bool:
        """Whether there is a number."""
        return self.value != UNKNOWN

    @property
    def number(self) -> float:
        """The value, NaN where it is unknown: whatever is computed with it is then unknown as well."""
        return math.nan if self.value == UNKNOWN else self.value


Rate: TypeAlias = Quantity | Mapping[int, Quantity]
"""What a device reaches: one quantity, or on CPUs the number of threads to what they reach together."""


def quantities(rate: Rate) -> tuple[Quantity, ...]:
    """The quantities of a rate."""
    return (rate,) if isinstance(rate, Quantity) else tuple(rate.values())


def rate_at(rate: Rate, threads: int) -> float:
    """What `threads` threads reach together, NaN where unknown.

    Between two numbers of threads that are given, rates grow as the power of threads through both. The caller makes
    sure that `threads` lies within them.
    """
    if isinstance(rate, Quantity):
        return rate.number
    if threads in rate:
        return rate[threads].number
    below = max(count for count in rate if count < threads)
    above = min(count for count in rate if count > threads)
    share = math.log(threads / below) / math.log(above / below)
    between: float = rate[below].number ** (1 - share) * rate[above].number ** share
    return between


def expect(name: str, unit: Unit, *given: Quantity) -> None:
    """Raises ValueError unless all are in `unit`."""
    for quantity in given:
        if quantity.unit != unit:
            raise ValueError(f"{name} must be in {unit}, got {quantity.unit}")


def expect_positive(name: str, *given: Quantity) -> None:
    """Raises ValueError if a known one is zero."""
    if any(quantity.value == 0 for quantity in given):
        raise ValueError(f"{name} must be above 0")
