"""Formats and precisions: names, codes and stored bits."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hwmodels import FLOAT, Format, Precision
from hwmodels.precision import INTEGER_BITS

PLAIN = (
    *("float", "fp16", "bf16", "binary", "binary-stochastic", "ternary", "ttq", "nf4"),
    *("fp8_e4m3", "fp8_e5m2", "fp6_e2m3", "fp6_e3m2", "fp4_e2m1"),
    *("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8", "nvfp4"),
    *(f"int{bits}" for bits in INTEGER_BITS),
    *(f"uint{bits}" for bits in INTEGER_BITS),
    *(f"uint{bits}-sym" for bits in INTEGER_BITS),
    *(f"int{bits}-{span}" for bits in INTEGER_BITS[1:] for span in ("full", "asym")),
    *(f"codebook{bits}" for bits in range(1, 9)),
)
WITHOUT_SUFFIX = (
    "float",
    "fp16",
    "bf16",
    "mxfp8_e4m3",
    "mxfp8_e5m2",
    "mxfp6_e2m3",
    "mxfp6_e3m2",
    "mxfp4",
    "mxint8",
    "nvfp4",
)
WITH_SUFFIX = tuple(name for name in PLAIN if name not in WITHOUT_SUFFIX)
suffixes = st.sampled_from(["-tensor", "-channel", "-token", "-dynamic"]) | st.integers(1, 4096).map("-g{}".format)
names = st.sampled_from(PLAIN) | st.tuples(st.sampled_from(WITH_SUFFIX), suffixes).map("".join)


@given(names)
def test_names_can_be_read_back(name: str) -> None:
    format = Format.parse(name)
    assert str(format) == ("nf4" if name == "nf4-g64" else name)
    assert Format.parse(str(format)) == format
    assert hash(Format.parse(str(format))) == hash(format)


@given(names, names)
def test_two_names_are_one_precision_where_each_has_its_side(weight: str, input: str) -> None:
    try:
        Format.parse(weight).check("weight")
        Format.parse(input).check("input")
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error).split(";")[0]):
            Precision.parse(f"{weight}/{input}")
        return
    precision = Precision.parse(f"{weight}/{input}")
    assert Precision.parse(str(precision)) == precision
    assert (precision.weight, precision.input) == (Format.parse(weight), Format.parse(input))


@given(names, names)
def test_different_names_are_different_formats(one: str, other: str) -> None:
    if {one, other} != {"nf4", "nf4-g64"}:
        assert (Format.parse(one) == Format.parse(other)) == (one == other)


@pytest.mark.parametrize(
    ("name", "full_name"),
    [
        ("fp8", "fp8_e4m3"),
        ("fp6", "fp6_e2m3"),
        ("fp4", "fp4_e2m1"),
        ("mxfp8", "mxfp8_e4m3"),
        ("mxfp6", "mxfp6_e2m3"),
        ("fp4-g16", "fp4_e2m1-g16"),
    ],
)
def test_some_names_may_be_shortened(name: str, full_name: str) -> None:
    assert str(Format.parse(name)) == full_name


@pytest.mark.parametrize(
    ("name", "lowest", "highest", "has_zero_point"),
    [
        ("int1", -1, 1, False),
        ("int2", -1, 1, False),
        ("int8", -127, 127, False),
        ("int16", -32767, 32767, False),
        ("int2-full", -2, 1, False),
        ("int8-full", -128, 127, False),
        ("int4-asym", -8, 7, True),
        ("uint1", 0, 1, True),
        ("uint2", 0, 3, True),
        ("uint8", 0, 255, True),
        ("uint8-sym", 0, 255, False),
        ("uint16-sym", 0, 65535, False),
        ("mxint8", -127, 127, False),
    ],
)
def test_codes(name: str, lowest: int, highest: int, has_zero_point: bool) -> None:
    format = Format.parse(name)
    assert (format.lowest, format.highest, format.has_zero_point) == (lowest, highest, has_zero_point)


@pytest.mark.parametrize(
    ("name", "exponent_bits", "mantissa_bits", "largest"),
    [
        ("fp8_e4m3", 4, 3, 448.0),
        ("fp8_e5m2", 5, 2, 57344.0),
        ("fp6_e2m3", 2, 3, 7.5),
        ("fp6_e3m2", 3, 2, 28.0),
        ("fp4_e2m1", 2, 1, 6.0),
        ("nvfp4", 2, 1, 6.0),
    ],
)
def test_small_floats_are_those_of_ocp(name: str, exponent_bits: int, mantissa_bits: int, largest: float) -> None:
    """OFP8 1.0, table 1; MX 1.0, sections 5.3.1 to 5.3.3."""
    format = Format.parse(name)
    assert (format.exponent_bits, format.mantissa_bits, format.largest) == (exponent_bits, mantissa_bits, largest)


@pytest.mark.parametrize(
    ("name", "shape", "axis", "groups"),
    [
        ("int4", (8, 3, 5, 5), 0, 8),
        ("int4", (8, 3, 5, 5), 1, 3),
        ("int4-tensor", (8, 3, 5, 5), 0, 1),
        ("int4-g25", (8, 3, 5, 5), 0, 8 * 3),
        ("int4-g32", (8, 3, 5, 5), 0, 8 * 3),
        ("int4-g32", (8, 3, 5, 5), 1, 3 * 7),
        ("int4-g1000", (8, 3), 0, 8),
        ("codebook4", (8, 3), 0, 1),
        ("codebook4-channel", (8, 3), 0, 8),
        ("binary", (8, 3), 0, 8),
        ("nf4", (8, 130), 0, 8 * 3),
        ("mxfp4", (8, 32), 0, 8),
        ("nvfp4", (8, 32), 0, 16),
        ("int4", (), 0, 1),
    ],
)
def test_groups_are_counted_per_channel(name: str, shape: tuple[int, ...], axis: int, groups: int) -> None:
    assert Format.parse(name).groups(shape, axis) == groups


def test_stored_bits_count_scales_and_zero_points() -> None:
    assert Format.parse("int4").storage_bits(100, groups=10) == 400 + 10 * 32
    assert Format.parse("uint4").storage_bits(100, groups=10) == 400 + 10 * (32 + 4)
    assert Format.parse("ttq").storage_bits(100, groups=10) == 200 + 10 * 64
    assert Format.parse("codebook2").storage_bits(100) == 200 + 4 * 32
    assert Format.parse("mxfp6").storage_bits(96, groups=3) == 96 * 6 + 3 * 8
    assert Format.parse("nvfp4").storage_bits(96, groups=6) == 96 * 4 + 6 * 8 + 32
    assert Format.parse("bf16").storage_bits(100, groups=10) == 1600
    assert FLOAT.storage_bits(100, groups=10) == 3200
    assert Format.parse("int4").effective_bits(100, groups=10) == 7.2


def test_only_static_inputs_store_a_range() -> None:
    bits = {"uint8": 40, "int8": 32, "fp8": 32, "uint4-tensor": 36}
    bits |= dict.fromkeys(("int8-token", "int8-dynamic", "int8-g32", "mxfp8", "bf16", "float"), 0)
    assert {name: Format.parse(name).input_bits() for name in bits} == bits


def test_a_lone_weight_format_leaves_the_input_in_float() -> None:
    assert Precision.parse("int4") == Precision(Format(4), FLOAT)
    assert str(Precision.parse("int4")) == "int4/float"


@pytest.mark.parametrize(
    "name",
    [
        *("int0", "int9", "int08", "INT8", "uint", "8", "", "fp9", "float32", "int8 ", "int1-full", "int1-asym"),
        *("uint8-full", "uint8-asym", "int8-sym", "int8-", "int8-g", "int8-gx", "int8-row", "codebook0", "codebook9"),
        *("mxfp5", "mxfp4-g16", "nvfp4-token", "bf16-g32", "float-tensor", "int8-token-g32", "int8-g32-g32"),
    ],
)
def test_other_names_are_refused_with_the_allowed_ones(name: str) -> None:
    with pytest.raises(ValueError, match=r"is no format.*allowed: float, .*intN and uintN with N in 1, 2, 3"):
        Format.parse(name)
    with pytest.raises(ValueError, match="is no format"):
        Precision.parse(f"int8/{name}")


@pytest.mark.parametrize("name", ["int8-g0", "int8-g01"])
def test_a_group_needs_a_size(name: str) -> None:
    with pytest.raises(ValueError, match="a group has a positive number of values, such as -g128"):
        Format.parse(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("int8-token/float", "int8-token finds its scales at run time, which is for inputs; use int8 for weights"),
        ("uint4-dynamic", "uint4-dynamic finds its scales at run time"),
        ("int8/codebook4", "codebook4 is for weights; inputs take"),
        ("int8/binary", "binary is for weights"),
        ("int8/int8-channel", "would scale every input channel on its own"),
    ],
)
def test_formats_are_refused_on_the_wrong_side(name: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Precision.parse(name)


def test_precisions_need_no_torch() -> None:
    code = "import sys, hwmodels; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
