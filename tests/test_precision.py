"""Formats and precisions: names, codes and stored bits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import FLOAT, Format, Precision
from hwmodels.precision import INTEGER_BITS

formats = st.builds(Format, st.sampled_from(INTEGER_BITS), signed=st.booleans()) | st.just(FLOAT)


@given(formats, formats)
def test_names_can_be_read_back(weight: Format, input: Format) -> None:
    assert Format.parse(str(weight)) == weight
    precision = Precision(weight, input)
    assert Precision.parse(str(precision)) == precision
    assert hash(Precision.parse(str(precision))) == hash(precision)


@pytest.mark.parametrize(
    ("name", "lowest", "highest"),
    [("int2", -1, 1), ("int8", -127, 127), ("uint2", 0, 3), ("uint8", 0, 255), ("int16", -32767, 32767)],
)
def test_codes(name: str, lowest: int, highest: int) -> None:
    format = Format.parse(name)
    assert (format.lowest, format.highest) == (lowest, highest)


def test_stored_bits_count_scales_and_zero_points() -> None:
    assert Format.parse("int4").storage_bits(100, groups=10) == 400 + 10 * 32
    assert Format.parse("uint4").storage_bits(100, groups=10) == 400 + 10 * (32 + 4)
    assert FLOAT.storage_bits(100, groups=10) == 3200
    assert Format.parse("int4").effective_bits(100, groups=10) == 7.2


def test_a_lone_weight_format_leaves_the_input_in_float() -> None:
    assert Precision.parse("int4") == Precision(Format(4), FLOAT)
    assert str(Precision.parse("int4")) == "int4/float"


@pytest.mark.parametrize("name", ["int1", "int9", "int08", "INT8", "uint", "8", "", "fp8", "float32", "int8 "])
def test_other_names_are_refused_with_the_allowed_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no format; allowed: float, intN and uintN with N in 2, 3"):
        Format.parse(name)
    with pytest.raises(ValueError, match="is no format"):
        Precision.parse(f"int8/{name}")
