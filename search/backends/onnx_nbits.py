"""Weights as blocks of 2, 4 or 8 bits in onnxruntime's own operators, MatMulNBits and GatherBlockQuantized.

The first multiplies, the second looks embeddings up. Both hold one row of codes per output channel, cut into blocks
that have a scale and a zero point each. Codes are unsigned; without zero points, the middle of their range stands for
zero. Checked against the operators' schemas and kernels in onnxruntime 1.32.0
(`onnxruntime_pybind11_state.get_all_operator_schema`, domain `com.microsoft`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hwmodels import Format, Layer, Precision
from search.backends.onnx_capture import WEIGHT, markers
from search.backends.onnx_nodes import constant, insert
from search.quantize.formats import encode
from search.quantize.grouping import to_groups
from search.quantize.simulate import QuantizedModel

DOMAIN = "com.microsoft"
WIDTHS = (2, 4, 8)
SMALLEST_BLOCK, LARGEST_BLOCK_OF_2_BITS = 16, 256
KINDS = {"linear", "embedding"}


@dataclass(frozen=True)
class Blocks:
    """How a weight is laid out.

    Attributes:
        bits: Of a stored code.
        size: Values in a block, a power of two.
        count: Blocks in a row; the last may be padded.
        group: Values of a row that share a scale in the plan.
    """

    bits: int
    size: int
    count: int
    group: int

    @property
    def repeats_scales(self) -> bool:
        """Whether a scale of the plan is stored for more than one block."""
        return self.size < self.group and self.count > 1


def blocks_of(layer: Layer, format: Format) -> Blocks | None:
    """Returns the layout of a layer's weight in a format, the one that takes the fewest bytes; None if there is none.

    A group of the plan has to be whole blocks, unless it is a whole row.
    """
    is_matrix = layer.kind in KINDS and len(layer.weight_shape) == 2 and layer.channel_axis == 0
    if not is_matrix or format.grid not in ("int", "binary", "ternary") or format.bits > WIDTHS[-1]:
        return None
    values = layer.weight_shape[1]
    bits = next(width for width in WIDTHS if width >= (format.bits if format.grid == "int" else 2))
    group = min(format.group, values) if format.granularity == "group" else values
    largest = SMALLEST_BLOCK
    while largest < values:
        largest *= 2
    largest = min(largest, LARGEST_BLOCK_OF_2_BITS) if bits == 2 else largest
    sizes = [size for size in _powers(largest) if group == values or group % size == 0]
    beside = 32 + (bits if _stores_zero_points(format) else 0)
    made = [Blocks(bits, size, -(-values // size), group) for size in sizes]
    if layer.kind == "embedding":  # whose codes are not padded
        made = [blocks for blocks in made if values * bits % 8 == 0]
    return min(made, key=lambda blocks: (blocks.count * (blocks.size * bits + beside), -blocks.size), default=None)


def _powers(largest: int) -> list[int]:
    return [1 << power for power in range(4, largest.bit_length())]


def _stores_zero_points(format: Format) -> bool:
    """Whether zero is another code than the middle one."""
    return format.has_zero_point or not format.signed


def place_blocks(captured: Any, simulated: QuantizedModel, policy: Mapping[str, Precision]) -> Any:
    """Returns a copy of a captured graph in which weights that can be are blocks; other markers stay.

    Args:
        captured: What `search.backends.onnx_capture.capture` returned.
        simulated: Holds the weights and their ranges.
        policy: The precisions; inputs are not looked at.
    """
    model = captured.clone()
    for marker in markers(model.graph, WEIGHT):
        name = marker.attributes["layers"].as_strings()[-1]  # which of a shared weight's the simulation applies last
        format = policy.get(name, Precision()).weight
        blocks = None if format.is_float else blocks_of(simulated.network[name], format)
        if blocks:
            _place(model.graph, marker, _Stored(model.graph, marker, simulated, name, format, blocks))
    model.opset_imports[DOMAIN] = 1
    return model


class _Stored:
    """The constants of one weight, added to the graph when first needed: readers may share them."""

    def __init__(
        self, graph: Any, marker: Any, simulated: QuantizedModel, layer: str, format: Format, blocks: Blocks
    ) -> None:
        self.blocks, self.shape = blocks, tuple(simulated.network[layer].weight_shape)
        self._graph, self._name = graph, marker.inputs[0].name
        self._codes, self._scale, self._zero = block_values(simulated, layer, format, blocks)
        self._made: dict[str, Any] = {}

    def _constant(self, name: str, values: Any, kind: str) -> Any:
        if name not in self._made:
            self._made[name] = constant(self._graph, f"{self._name}/{name}", values, kind)
        return self._made[name]

    def inputs(self, is_matrix: bool) -> list[Any]:
        """Codes, scales and zero points; the codes in blocks for MatMulNBits, else in rows without padding."""
        bits, size, rows = self.blocks.bits, self.blocks.size, len(self._codes)
        if is_matrix:
            codes = packed(self._codes.reshape(rows, self.blocks.count, size), bits)
        else:
            codes = packed(self._codes[:, : self.shape[1]], bits)
        found = [
            self._constant("blocks" if is_matrix else "rows", codes, "UINT8"),
            self._constant("scale", self._scale, "FLOAT"),
        ]
        if self._zero is not None:
            found.append(self._constant("zero_point", packed(self._zero, bits), "UINT8"))
        return found


def block_values(
    simulated: QuantizedModel, layer: str, format: Format, blocks: Blocks
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8] | None]:
    """Returns the codes `(rows, padded)`, the scales and zero points `(rows, blocks)` of a weight, not packed.

    No zero points where the middle code stands for zero in all blocks.
    """
    weight, parameters = simulated.float_weight(layer), simulated.weight_parameters(layer, format)
    groups = to_groups(weight, format, 0)
    middle = 1 << (blocks.bits - 1) if format.signed else 0
    codes = groups.restore(encode(groups.rows, format, parameters)).cpu().numpy() + middle
    padded = np.pad(codes, ((0, 0), (0, blocks.count * blocks.size - codes.shape[1])))
    which = np.arange(blocks.count) * blocks.size // blocks.group

    def by_block(values: Any) -> Any:
        """One value per group, or one for all, as `(rows, blocks)`."""
        given = values.cpu().numpy()
        per_row = np.broadcast_to(given, (len(codes),)) if given.size == 1 else given
        return per_row.reshape(len(codes), -1)[:, which]

    scale = by_block(parameters["scale"].float())
    zero = None
    if _stores_zero_points(format):
        zero = np.zeros_like(scale, dtype=np.uint8)
        if format.has_zero_point:
            zero = (by_block(parameters["zero_point"]) + middle).astype(np.uint8)
    return padded.astype(np.uint8), np.ascontiguousarray(scale), zero


def packed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Returns codes as bytes along the last axis, the first in the lowest bits; the end is filled up with zeros."""
    per_byte = 8 // bits
    filled = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % per_byte)])
    parts = filled.reshape(*filled.shape[:-1], -1, per_byte) << np.arange(0, 8, bits, dtype=np.uint8)
    found: NDArray[np.uint8] = np.bitwise_or.reduce(parts, axis=-1).astype(np.uint8)
    return found


def _place(graph: Any, marker: Any, stored: _Stored) -> None:
    """Has the readers of a marked weight read its blocks; the marker stays for those that cannot."""
    for node, index in list(marker.outputs[0].uses()):
        if node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [1, 0]:
            for reader, position in list(node.outputs[0].uses()):
                if reader.op_type == "MatMul" and position == 1:
                    _multiply(graph, reader, stored)
            if not node.outputs[0].uses():
                graph.remove(node, safe=True)
        elif node.op_type == "Gemm" and index == 1 and _is_plain(node):
            _multiply(graph, node, stored)
        elif node.op_type == "Gather" and index == 0 and _number(node, "axis", 0) == 0:
            _look_up(graph, node, stored)
    if not marker.outputs[0].uses():
        graph.remove(marker, safe=True)


def _is_plain(gemm: Any) -> bool:
    """Whether a Gemm is `x @ weight.T`, plus a bias for every output channel."""
    factors = [_number(gemm, name, 1) for name in ("alpha", "beta")]
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    is_bias = bias is None or (bias.shape is not None and len(bias.shape) == 1)
    return factors == [1, 1] and _number(gemm, "transA", 0) == 0 and _number(gemm, "transB", 0) == 1 and is_bias


def _number(node: Any, name: str, default: float) -> float:
    return float(node.attributes[name].value) if name in node.attributes else default


def _multiply(graph: Any, node: Any, stored: _Stored) -> None:
    """Puts MatMulNBits in the place of a Gemm or MatMul; `accuracy_level` 0 keeps inputs and sums in float32."""
    rows, values = stored.shape
    inputs = [node.inputs[0], *stored.inputs(is_matrix=True)]
    if len(node.inputs) > 2 and node.inputs[2] is not None:
        inputs += [None] * (5 - len(inputs)) + [node.inputs[2]]
    sizes = {"K": values, "N": rows, "bits": stored.blocks.bits, "block_size": stored.blocks.size}
    _put(graph, node, "MatMulNBits", inputs, **sizes, accuracy_level=0)


def _look_up(graph: Any, node: Any, stored: _Stored) -> None:
    data, *beside = stored.inputs(is_matrix=False)
    sizes = {"bits": stored.blocks.bits, "block_size": stored.blocks.size, "gather_axis": 0, "quantize_axis": 1}
    _put(graph, node, "GatherBlockQuantized", [data, node.inputs[1], *beside], **sizes)


def _put(graph: Any, node: Any, operation: str, inputs: list[Any], **attributes: int) -> None:
    """Puts an operation in the place of a node, under the node's name."""
    made = insert(graph, node, operation, inputs, **attributes)
    producer = made.producer()
    producer.domain, producer.name = DOMAIN, node.name
    made.name, made.type, made.shape = node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape
    node.outputs[0].replace_all_uses_with(made, replace_graph_outputs=True)
    graph.remove(node, safe=True)
