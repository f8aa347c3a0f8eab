"""The graphs that are timed: copies of one operation between one input and tails that hand on next to nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hwmodels.precision import FLOAT_PRECISION, Format, Precision
from hwmodels.site import Site

OPSET, CONTRIB_OPSET, IR_VERSION = 21, 1, 10
CONTRIB = "com.microsoft"  # domain of the runtime's own operations

INT8 = Precision.parse("int8/uint8")
NBITS = (2, 4, 8)
"""Weight widths of `MatMulNBits`."""
BLOCKS = (16, 32, 64, 128, 256)
"""Weights that may share a scale there."""


def is_nbits(precision: Precision) -> bool:
    """Whether a precision is one of `MatMulNBits`: symmetric integers in groups, inputs in float."""
    group = precision.weight.group
    return (
        precision.input.is_float
        and group in BLOCKS
        and any(precision.weight == Format.parse(f"int{bits}-g{group}") for bits in NBITS)
    )


@dataclass(frozen=True)
class Graph:
    """A graph as ONNX Runtime reads it, and what it is fed."""

    model: bytes
    feed: np.ndarray


class Drawer:
    """Draws a graph, node by node."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self._rng = np.random.default_rng(seed)
        self._normal = self._rng.standard_normal(65_521).astype(np.float32)  # repeated: what is in them takes no time
        self._codes = self._rng.integers(0, 256, 65_521, dtype=np.uint8)

    def constant(self, name: str, value: Any) -> str:
        """Adds an initializer and returns its name."""
        from onnx import numpy_helper

        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def node(self, kind: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> str:
        """Adds a node and returns the name of its output."""
        from onnx import helper

        self.nodes.append(helper.make_node(kind, inputs, [output], domain=domain, **attributes))
        return output

    def normal(self, shape: Sequence[int]) -> np.ndarray:
        """Normal float32 values."""
        return np.resize(np.roll(self._normal, int(self._rng.integers(65_521))), shape)

    def codes(self, shape: Sequence[int], type: type = np.uint8) -> np.ndarray:
        """Bytes of any value but, as signed ones, the lowest."""
        drawn = np.resize(np.roll(self._codes, int(self._rng.integers(65_521))), shape)
        return drawn if type is np.uint8 else np.maximum(drawn.view(np.int8), -127)

    def model(self, outputs: Sequence[str], input_: np.ndarray, is_float: bool | None = None) -> Graph:
        """The graph of everything drawn; several outputs are `y0`, `y1`, ...; of the input's type if not told."""
        import onnx
        from onnx import helper

        types = {np.dtype(np.float32): onnx.TensorProto.FLOAT, np.dtype(np.uint8): onnx.TensorProto.UINT8}
        kind = types[input_.dtype]
        left = kind if is_float is None else types[np.dtype(np.float32 if is_float else np.uint8)]
        graph = helper.make_graph(
            self.nodes,
            "copies",
            [helper.make_tensor_value_info("x", kind, input_.shape)],
            [helper.make_tensor_value_info(name, left, None) for name in outputs],
            self.constants,
        )
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, CONTRIB_OPSET)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION)
        return Graph(model.SerializeToString(), input_)


X_SCALE, X_ZERO, WEIGHT_SCALE = np.float32(0.02), np.uint8(128), np.float32(0.01)


def output_scale(site: Site) -> np.float32:
    """Scale of a quantized output: three standard deviations of the sums reach its ends."""
    deviation = 74 * 74 * float(X_SCALE) * float(WEIGHT_SCALE) * site.gemm.k**0.5  # of uniform bytes each: 74
    return np.float32(3 * deviation / 128)


def build(
    site: Site,
    precision: Precision,
    count: int,
    accuracy_level: int = 4,
    has_tails: bool = True,
    leaves_floats: bool = False,
) -> Graph:
    """Draws a graph of `count` copies of a site at a precision.

    With tails, output `y` has one value of each copy's output (of a convolution one per channel); without, the copies'
    outputs are `y0`, `y1`, ... Integer copies leave integers, or floats with `leaves_floats`; all others leave floats.
    """
    drawer = Drawer()
    draw = partial(_draw_int8, leaves_floats=leaves_floats) if precision == INT8 else _draw_float
    if is_nbits(precision):
        draw = partial(_draw_nbits, format=precision.weight, level=accuracy_level)
    if precision == INT8:
        shared = {"x_scale": X_SCALE, "x_zero": X_ZERO, "y_scale": output_scale(site), "y_zero": X_ZERO}
        for name, value in shared.items():
            drawer.constant(name, value)
    outputs = [draw(drawer, site, number, f"y{number}") for number in range(count)]
    if has_tails:
        outputs = _tails(drawer, site, outputs, is_plain=precision == INT8 and leaves_floats)
    return drawer.model(outputs, _feed(drawer, site, precision), is_float=precision != INT8 or leaves_floats)


def build_frame(site: Site, precision: Precision, count: int, leaves_floats: bool = False) -> Graph:
    """Draws a graph of the tails of `count` copies without the copies: all that a run takes besides."""
    if leaves_floats:
        precision = FLOAT_PRECISION
    drawer, feed = Drawer(), _feed(Drawer(), site, precision)
    if precision == INT8 and site.kernel:
        return drawer.model(_channels_last_tails(drawer, site, count), feed)
    return drawer.model(_tails(drawer, site, ["x"] * count, is_plain=leaves_floats), feed)


def _feed(drawer: Drawer, site: Site, precision: Precision) -> np.ndarray:
    shape = (site.batch, site.in_channels, *site.in_size)
    return drawer.codes(shape) if precision == INT8 else drawer.normal(shape)


def _tails(drawer: Drawer, site: Site, outputs: Sequence[str], is_plain: bool) -> list[str]:
    """Reads one value of each output, or one per channel where a plain layout of the output is not certain."""
    last = []
    for number, output in enumerate(outputs):
        if site.kernel and not is_plain:
            last.append(drawer.node("MaxPool", [output], f"tail{number}", **_pooling(site, number)))
            continue
        column = number % (site.in_channels if output == "x" else site.out_channels)
        axes = len(site.kernel)
        first = drawer.constant(f"first{number}", np.array([0, column, *([0] * axes)]))
        behind = drawer.constant(f"behind{number}", np.array([1, column + 1, *([1] * axes)]))
        last.append(drawer.node("Slice", [output, first, behind], f"tail{number}"))
    return [drawer.node("Concat", last, "y", axis=1)]


def _channels_last_tails(drawer: Drawer, site: Site, count: int) -> list[str]:
    """The tails as the runtime makes them of those behind integer convolutions, whose channels lie together."""
    axes = len(site.kernel)
    turned = drawer.node("Transpose", ["x"], "turned", perm=[0, *range(2, 2 + axes), 1])
    names = [f"tail{number}" for number in range(count)]
    last = [
        drawer.node("NhwcMaxPool", [turned], name, CONTRIB, **_pooling(site, number))
        for number, name in enumerate(names)
    ]
    joined = drawer.node("Concat", last, "joined", axis=1 + axes)
    return [drawer.node("Transpose", [joined], "y", perm=[0, 1 + axes, *range(1, 1 + axes)])]


def _pooling(site: Site, number: int) -> dict[str, Any]:
    """Attributes of a pooling that reads the first value of each channel; one per number, so that none are merged."""
    step = max(*site.in_size, *site.out_size) + number
    return {"kernel_shape": [1] * len(site.kernel), "strides": [step] * len(site.kernel)}


def _convolution(site: Site) -> dict[str, Any]:
    """Attributes of a `Conv` that makes `out_size` of `in_size`."""
    sizes = zip(site.out_size, site.stride, site.kernel, site.in_size, strict=True)
    padding = [max((out - 1) * stride + kernel - in_, 0) for out, stride, kernel, in_ in sizes]
    pads = [*(size // 2 for size in padding), *(size - size // 2 for size in padding)]
    return {"kernel_shape": site.kernel, "strides": site.stride, "pads": pads, "group": site.groups}


def _apply(drawer: Drawer, site: Site, inputs: Sequence[str], output: str) -> str:
    """Adds the operation itself, on input, weight and bias."""
    if site.kind == "linear":
        return drawer.node("Gemm", inputs, output, transB=1)
    return drawer.node("Conv", inputs, output, **_convolution(site))


def _weight_shape(site: Site) -> tuple[int, ...]:
    return (site.out_channels, site.in_channels // site.groups, *site.kernel)


def _draw_float(drawer: Drawer, site: Site, number: int, output: str) -> str:
    weight = drawer.constant(f"w{number}", drawer.normal(_weight_shape(site)))
    bias = drawer.constant(f"b{number}", drawer.normal((site.out_channels,)))
    return _apply(drawer, site, ["x", weight, bias], output)


def _draw_int8(drawer: Drawer, site: Site, number: int, output: str, leaves_floats: bool = False) -> str:
    n = site.out_channels

    def dequantized(name: str, codes: np.ndarray, scale: np.float32) -> str:
        parts = [
            drawer.constant(f"{name}{number}", codes),
            drawer.constant(f"{name}_scale{number}", np.full(n, scale)),
            drawer.constant(f"{name}_zero{number}", np.zeros(n, codes.dtype)),
        ]
        return drawer.node("DequantizeLinear", parts, f"{name}_float{number}", axis=0)

    inputs = [
        drawer.node("DequantizeLinear", ["x", "x_scale", "x_zero"], f"x_float{number}"),
        dequantized("w", drawer.codes(_weight_shape(site), np.int8), WEIGHT_SCALE),
        dequantized("b", drawer.codes((n,), np.int8).astype(np.int32), X_SCALE * WEIGHT_SCALE),
    ]
    if leaves_floats:
        return _apply(drawer, site, inputs, output)
    sums = _apply(drawer, site, inputs, f"sum{number}")
    return drawer.node("QuantizeLinear", [sums, "y_scale", "y_zero"], output)


def _draw_nbits(drawer: Drawer, site: Site, number: int, output: str, format: Format, level: int) -> str:
    blocks = -(-site.in_channels // format.group)
    inputs = [
        "x",
        drawer.constant(f"w{number}", drawer.codes((site.out_channels, blocks, format.group * format.bits // 8))),
        drawer.constant(f"w_scale{number}", np.full((site.out_channels, blocks), WEIGHT_SCALE)),
    ]
    sizes = {"K": site.in_channels, "N": site.out_channels, "bits": format.bits, "block_size": format.group}
    return drawer.node("MatMulNBits", inputs, output, CONTRIB, **sizes, accuracy_level=level)
