"""The matmulnbits backend: weights of linear layers and embeddings in blocks of 2, 4 or 8 bits, inputs in float.

It is how onnxruntime runs language models: weights are small, and everything is computed in float32. Of the widths,
onnxruntime 1.32 multiplies 4 bits directly on x86-64; it unpacks 2 and 8 bits to float32 whenever a layer runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hwmodels import Layer, Precision
from search.backends.base import Backend
from search.backends.onnx_capture import WEIGHT, capture, markers
from search.backends.onnx_nbits import blocks_of, place_blocks
from search.backends.onnx_qdq import slimmed
from search.backends.onnx_quantize import quantized, save, weight_storage
from search.backends.onnxruntime import MODEL, check_model
from search.backends.outcome import Fidelity, LayerExport, Verification
from search.plan import Plan
from search.quantize.simulate import QuantizedModel
from search.tasks.task import Task


class MatMulNBits(Backend):
    """Writes `model.onnx`, with onnxruntime's MatMulNBits and GatherBlockQuantized in the place of layers.

    What they cannot hold, such as the weights of convolutions, is stored as codes behind `DequantizeLinear`, or as
    values.
    """

    name = "matmulnbits"
    proof = "executed"
    packages = ("onnx", "onnxscript", "onnxruntime")
    usage = """
    import onnxruntime
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    outputs = session.run(None, {session.get_inputs()[0].name: batch})  # samples first
    """

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Weights keep their codes where blocks can hold them, and their values everywhere; inputs stay in float."""
        weight, note = _weight(layer, precision)
        notes, runs = [note], ""
        if not precision.input.is_float:
            notes.append(f"MatMulNBits takes no {precision.input} input: the input stays in float")
            runs = str(Precision(precision.weight))
        note = "; ".join(filter(None, notes))
        return LayerExport(layer.name, str(precision), weight, "float", "fp32", note, runs)

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes `model.onnx`."""
        simulated = plan.simulate(task.model)
        simulated.apply({})
        captured = capture(simulated.model, plan.network, task.example_input)
        save(with_blocks(captured, simulated, plan.policy), folder / MODEL)
        return [self.express(plan.network[name], precision) for name, precision in plan.policy.items()]

    def check(self, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...]) -> Verification:
        """Runs `model.onnx` over the report split, beside the float network and the one with 8-bit weights."""
        return check_model(self.name, plan, task, folder, layers, with_blocks)


def with_blocks(captured: Any, simulated: QuantizedModel, policy: Mapping[str, Precision]) -> Any:
    """Returns a copy of a captured graph with the weights of `policy`, and inputs in float."""
    weights = {name: Precision(precision.weight) for name, precision in policy.items()}
    placed = place_blocks(captured, simulated, weights)
    left = {name for marker in markers(placed.graph, WEIGHT) for name in marker.attributes["layers"].as_strings()}
    return slimmed(quantized(placed, simulated, {name: weights[name] for name in weights if name in left}))


def _weight(layer: Layer, precision: Precision) -> tuple[Fidelity, str]:
    """What becomes of a weight, and why it is not plainly exact."""
    format = precision.weight
    if format.is_float:
        return "float", ""
    blocks = blocks_of(layer, format)
    if blocks is None:
        storage, missing = weight_storage(format), f"MatMulNBits holds no {format} weight of {layer.kind}"
        if storage.is_float:
            return "contained", f"{missing}: its values are stored as float32"
        return ("exact" if storage == format else "contained"), f"{missing}: its codes are stored as {storage}"
    notes = []
    if blocks.bits != format.bits or format.grid != "int":
        notes.append(f"{format} codes are stored in {blocks.bits} bits")
    if blocks.repeats_scales:
        notes.append(f"every block of {blocks.size} values has its own copy of the scale")
    elif format.scale != "fp32":
        notes.append("scales are stored as float32")
    return ("contained" if notes else "exact"), "; ".join(notes)
