"""Which torchao tensors hold a layer's precision, and those tensors made of the plan's own codes and scales.

`Int8Tensor` multiplies int8 weights, one scale per row, with int8 inputs; their range is given or found for each token.
`IntxUnpackedToInt8Tensor` holds weights of 1 to 8 bits in groups and with zero points, and dequantizes them in front of
a float kernel; its inputs may take a range for every token. Both store one byte per code. From the sources of torchao
0.18, `torchao/quantization/quantize_/workflows/{int8,intx}`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hwmodels import FLOAT, Format, Layer, Precision
from search.quantize.affine import Range
from search.quantize.formats import encode
from search.quantize.grouping import to_groups
from search.quantize.simulate import QuantizedModel
from search.quiet import quietly

KINDS = {"linear", "conv2d", "embedding"}  # modules whose weight may be a torchao integer tensor


def torchao() -> Any:
    """Imports torchao's quantization without its remarks on extensions for other machines."""
    with quietly("torchao", "torch"):
        import torchao.quantization

    return torchao.quantization


def is_expressible(layer: Layer, format: Format) -> bool:
    """True where torchao has a tensor for the weight of a layer in that format."""
    is_module = layer.kind in KINDS and layer.channel_axis == 0
    return is_module and _is_integer(format) and blocks(layer.weight_shape, format) is not None


def multiplies_in_int8(layer: Layer, precision: Precision) -> bool:
    """True where an `Int8Tensor` holds a precision that runs: weight and input are multiplied as int8."""
    return not precision.input.is_float and layer.kind == "linear" and _is_row_weight(precision.weight)


def running_input(layer: Layer, precision: Precision) -> Format:
    """Returns the input format that torchao runs in place of the planned one: that, a wider one, or float.

    Integers of up to 8 bits on linear layers become 8-bit ones, and symmetric codes take the most negative one too.
    Ranges found at run time are found for every token. Beside weights in groups or with zero points they have a zero
    point, and static ranges cannot be had.
    """
    input_ = precision.input
    if layer.kind != "linear" or not _is_integer(input_) or not is_expressible(layer, precision.weight):
        return FLOAT
    wide = replace(input_.base, bits=8, span="full" if input_.signed and not input_.span else input_.span)
    asymmetric = wide if wide.has_zero_point else replace(wide, span="asym" if wide.signed else "")
    if not input_.is_dynamic:
        static = replace(wide, granularity=input_.granularity)
        return static if _is_row_weight(precision.weight) else FLOAT
    has_range = _is_row_weight(precision.weight) and wide.signed
    return replace(wide if has_range else asymmetric, granularity="token")


def tensor_of(simulated: QuantizedModel, name: str, precision: Precision, input_dims: int) -> Tensor:
    """Returns the torchao tensor of a layer's weight, under the scales of the simulation.

    Args:
        simulated: Knows the float weights and the ranges.
        name: The layer.
        precision: One that torchao runs.
        input_dims: Dimensions of the layer's input; a static range is shaped like it.
    """
    layer, weight, input_ = simulated.network[name], precision.weight, precision.input
    groups = to_groups(simulated.float_weight(name), weight, layer.channel_axis)
    parameters = simulated.weight_parameters(name, weight)
    codes = groups.restore(encode(groups.rows, weight, parameters))
    scale, zero_point = parameters["scale"], parameters.get("zero_point", torch.zeros(1, dtype=torch.int32))
    if multiplies_in_int8(layer, precision):
        range_ = simulated.input_range(name, input_) if input_.has_static_range else None
        return int8_tensor(codes, scale, input_, range_, input_dims)
    return intx_tensor(codes, scale, zero_point, weight, takes_tokens=not input_.is_float)


def int8_tensor(codes: Tensor, scale: Tensor, input_: Format, range_: Range | None, input_dims: int) -> Tensor:
    """Returns torchao's tensor of int8 codes, `(rows, features)`, which quantizes its inputs to int8 itself.

    Args:
        codes: Of the weight, symmetric.
        scale: One per row, or one for all of them.
        input_: Static or per token, 8 bits.
        range_: Of a static input.
        input_dims: Dimensions of the input.
    """
    from torchao.quantization.granularity import PerRow, PerTensor
    from torchao.quantization.quant_primitives import MappingType
    from torchao.quantization.quantize_.workflows import QuantizeTensorToInt8Kwargs

    has_zero = input_.has_zero_point or not input_.signed
    mapping = MappingType.ASYMMETRIC if has_zero else MappingType.SYMMETRIC_NO_CLIPPING_ERR
    given = {}
    if range_ is not None:
        shape = [1] * input_dims
        zero_point = range_.zero_point - _offset(input_)
        given = {"act_quant_scale": torch.full(shape, range_.scale)}
        given["act_quant_zero_point"] = torch.full(shape, zero_point, dtype=torch.int8)
    tensor: Tensor = torchao().Int8Tensor(
        qdata=codes.to(torch.int8),
        scale=scale.expand(len(codes)).reshape(-1, 1).clone(),
        block_size=[1, codes.shape[1]],
        dtype=torch.float32,
        act_quant_kwargs=QuantizeTensorToInt8Kwargs(PerTensor() if given else PerRow(), mapping),
        **given,
    )
    return tensor


def intx_tensor(codes: Tensor, scale: Tensor, zero_point: Tensor, format: Format, takes_tokens: bool = False) -> Tensor:
    """Returns torchao's tensor of given codes, which it dequantizes in front of a float kernel.

    Unsigned codes and their zero points move down by half their number, which changes no value; int1, whose codes are
    -1 and 1, is stored as int2.

    Args:
        codes: In the weight's shape.
        scale: One per group, or one for all of them.
        zero_point: Likewise.
        format: Of the weight.
        takes_tokens: Whether inputs are quantized to 8 bits, with a range for every token.
    """
    block, offset = blocks(codes.shape, format), _offset(format)
    assert block is not None, "the format has no blocks in this shape"
    counts = [size // inner for size, inner in zip(codes.shape, block, strict=True)]
    tensor_type = torchao().IntxUnpackedToInt8Tensor
    from torchao.quantization.quantize_.workflows.intx import intx_unpacked_to_int8_tensor as intx

    per_token = intx.IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN
    tensor: Tensor = tensor_type(
        qdata=(codes - offset).to(torch.int8),
        scale=scale.expand(math.prod(counts)).reshape(counts).clone(),
        zero_point=(zero_point - offset).to(torch.int8).expand(math.prod(counts)).reshape(counts).clone(),
        target_dtype=stored_type(format),
        block_size=block,
        dtype=torch.float32,
        activation_quantization=per_token if takes_tokens else None,
    )
    return tensor


def stored_type(format: Format) -> torch.dtype:
    """The torch type whose codes hold those of a weight format."""
    kind: torch.dtype = getattr(torch, f"int{max(format.bits, 2)}" if format.signed else f"int{format.bits}")
    return kind


def blocks(shape: Sequence[int], format: Format) -> tuple[int, ...] | None:
    """Returns the block of values of one channel that shares a scale; None where groups are no blocks of one size."""
    values = math.prod(shape[1:])
    left = min(format.group, values) if format.granularity == "group" else values
    if not left or values % left:
        return None
    inner: list[int] = []
    for size in reversed(shape[1:]):
        if left % size and size % left:
            return None
        inner.insert(0, min(size, left))
        left = max(left // size, 1)
    return (1, *inner)


def _is_integer(format: Format) -> bool:
    return format.grid == "int" and format.scale == "fp32" and format.bits <= 8


def _is_row_weight(format: Format) -> bool:
    """True of weights that `Int8Tensor` multiplies: around zero, without groups."""
    return _is_integer(format) and format.is_static_integer and format.signed and not format.has_zero_point


def _offset(format: Format) -> int:
    return 0 if format.signed else 1 << (format.bits - 1)
