"""How one tensor is stored (a format) and how one layer is computed (a precision)."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

SCALE_BITS = 32  # a float32 scale per channel or tensor
FLOAT_BITS = 32
INTEGER_BITS = (2, 3, 4, 5, 6, 7, 8, 16)

_INTEGER = re.compile(r"(u?)int([1-9][0-9]*)")


@dataclass(frozen=True, order=False)
class Format:
    """How one tensor is stored: `float`, a symmetric `intN`, or an asymmetric `uintN`.

    `intN` is symmetric around zero without its most negative code, so `int2` is {-1, 0, 1} times a scale; `uintN`
    holds N-bit codes with a zero point. The two classes of a bit width therefore differ in range, not in storage.

    Attributes:
        bits: Bits per stored value, 32 for `float`.
        signed: Whether codes are signed.
        is_float: True for `float`.
    """

    bits: int
    signed: bool = True
    is_float: bool = False

    def __str__(self) -> str:
        return "float" if self.is_float else f"{'' if self.signed else 'u'}int{self.bits}"

    @property
    def lowest(self) -> int:
        """The smallest code."""
        return -self.highest if self.signed else 0

    @property
    def highest(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1 if self.signed else self.bits)) - 1

    def storage_bits(self, values: int, groups: int = 1) -> int:
        """Bits that `values` take with the scale, and the zero point where there is one, of each of `groups`."""
        if self.is_float:
            return values * self.bits
        zero_point = 0 if self.signed else self.bits
        return values * self.bits + groups * (SCALE_BITS + zero_point)

    def effective_bits(self, values: int, groups: int = 1) -> float:
        """Bits per value with scales and zero points counted."""
        return self.storage_bits(values, groups) / values

    @staticmethod
    @lru_cache(maxsize=256)
    def parse(name: str) -> Format:
        """Reads a format from its short name.

        Raises:
            ValueError: If the name is no format; the message lists the allowed ones.
        """
        if name == "float":
            return FLOAT
        found = _INTEGER.fullmatch(name)
        if not found or int(found[2]) not in INTEGER_BITS:
            widths = ", ".join(map(str, INTEGER_BITS))
            raise ValueError(f"{name!r} is no format; allowed: float, intN and uintN with N in {widths}")
        return Format(int(found[2]), signed=not found[1])


FLOAT = Format(FLOAT_BITS, is_float=True)


@dataclass(frozen=True)
class Precision:
    """A layer's weight format and input format, written `int4/uint8`."""

    weight: Format = FLOAT
    input: Format = FLOAT

    def __str__(self) -> str:
        return f"{self.weight}/{self.input}"

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(name: str) -> Precision:
        """Reads `weight/input`; a lone `weight` leaves the input in float.

        Raises:
            ValueError: If either part is no format.
        """
        weight, slash, input_ = name.partition("/")
        return Precision(Format.parse(weight), Format.parse(input_) if slash else FLOAT)


FLOAT_PRECISION = Precision()
