"""Packed weights have the bits that formats promise, and hold all that is needed to get the values back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from tensors import WEIGHT_FORMATS, gaussian, parameters_for, weights
from torch import Tensor

from hwmodels import Format
from search.quantize.formats import quantize_weight
from search.quantize.packing import Packed, pack, unpack


def packed(weight: Tensor, name: str, axis: int = 0) -> Packed:
    format = Format.parse(name)
    return pack(weight, format, axis, parameters_for(weight, format, axis))


@pytest.mark.parametrize("name", WEIGHT_FORMATS)
@given(drawn=weights())
@settings(max_examples=20)
def test_packed_weights_have_the_bits_that_formats_promise(name: str, drawn: tuple[Tensor, int]) -> None:
    weight, axis = drawn
    assume(name != "fp16" or weight.abs().amax() < 65504)
    format = Format.parse(name)
    parameters = parameters_for(weight, format, axis)
    stored = pack(weight, format, axis, parameters)
    groups = format.groups(weight.shape, axis)
    assert stored.bits == format.storage_bits(weight.numel(), groups)
    assert stored.bits / weight.numel() == format.effective_bits(weight.numel(), groups)
    assert stored.data.dtype == torch.uint8
    assert len(stored.data) == -(-stored.bits // 8)
    assert torch.equal(unpack(stored), quantize_weight(weight, format, axis, parameters))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        ("float", 4096 * 32),
        ("bf16", 4096 * 16),
        ("int1", 4096 + 4 * 32),
        ("int4", 4096 * 4 + 4 * 32),
        ("int4-tensor", 4096 * 4 + 32),
        ("int3-g128", 4096 * 3 + 32 * 32),
        ("uint4-g128", 4096 * 4 + 32 * (32 + 4)),
        ("int8-asym", 4096 * 8 + 4 * (32 + 8)),
        ("binary", 4096 + 4 * 32),
        ("ternary", 4096 * 2 + 4 * 32),
        ("ttq", 4096 * 2 + 4 * 64),
        ("mxfp4", 4096 * 4 + 128 * 8),
        ("mxint8", 4096 * 8 + 128 * 8),
        ("nvfp4", 4096 * 4 + 256 * 8 + 32),
        ("nf4", 4096 * 4 + 64 * 32),
        ("codebook3", 4096 * 3 + 8 * 32),
        ("codebook3-channel", 4096 * 3 + 4 * 8 * 32),
        ("fp6_e3m2", 4096 * 6 + 4 * 32),
    ],
)
def test_bits_by_hand(name: str, bits: int) -> None:
    assert packed(gaussian((4, 1024)), name).bits == bits


def test_the_stream_by_hand() -> None:
    """Codes -1, 0, 1, 1 counted from the lowest are 0, 1, 2, 2 at two bits each; then 0.5 as a float32."""
    stored = pack(torch.tensor([[-0.5, 0.1, 0.6, 0.4]]), Format.parse("int2"), 0, {"scale": torch.tensor([0.5])})
    assert stored.data.tolist() == [0b10_10_01_00, 0, 0, 0, 0x3F]
    assert unpack(stored).tolist() == [[-0.5, 0.0, 0.5, 0.5]]


def test_scales_of_blocks_take_a_byte() -> None:
    stored = packed(torch.full((1, 32), 4.0), "mxint8")
    assert stored.data[-1] == 127 + 2  # 2**2, with e8m0's bias
    stored = packed(torch.full((1, 16), 6.0), "nvfp4")
    assert stored.data[8] == 0x7E  # 448, the largest e4m3 value


@pytest.mark.parametrize("name", ["int4-g32", "codebook4", "mxfp4", "bf16"])
def test_type_and_shape_come_back(name: str) -> None:
    weight = gaussian((6, 5, 3, 3)).bfloat16()
    format = Format.parse(name)
    parameters = parameters_for(weight, format, 1)
    found = unpack(pack(weight, format, 1, parameters))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, quantize_weight(weight, format, 1, parameters))
