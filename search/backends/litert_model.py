"""From a float .tflite model to a quantized one under the plan's own scales, by ai-edge-quantizer.

Operations are found by their constants: the plan's weights are in the float model, so an operation is a layer's if it
reads just those values. The recipe names operations by their outputs, as ai-edge-quantizer calls their scope.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from hwmodels import Precision
from search.backends.litert_convert import silence
from search.backends.litert_storage import Stored, input_ends, op_config, operation_of, stored_as, weight_ends
from search.errors import UnsupportedError, one_line
from search.quantize.simulate import QuantizedModel

SIGNATURE, THREADS = "serving_default", 2
LAYOUT = {"CONV_2D": (0, 2, 3, 1), "DEPTHWISE_CONV_2D": (1, 2, 3, 0)}
OPERATIONS = ("FULLY_CONNECTED", "EMBEDDING_LOOKUP", "CONV_2D", "DEPTHWISE_CONV_2D")
CHANNEL_AXIS = {"DEPTHWISE_CONV_2D": 3}


@dataclass(frozen=True)
class Operation:
    """One operation of a .tflite model that is a layer's.

    Attributes:
        layer: The layer.
        scope: What ai-edge-quantizer searches a recipe's expressions in.
        weight: Name of its weight.
        input: Name of what it reads.
        input_rank: Axes of what it reads.
    """

    layer: str
    scope: str
    weight: str
    input: str
    input_rank: int


class Bound(NamedTuple):
    """A float .tflite model whose tensors have the layers' names.

    Attributes:
        content: The file.
        operations: The layers' operations, in the order of execution.
        missing: The layers that have none.
    """

    content: bytes
    operations: list[Operation]
    missing: list[str]


class Made(NamedTuple):
    """A quantized model.

    Attributes:
        content: The .tflite file.
        recipe: What ai-edge-quantizer was told.
        unfound: Layers without an operation of their own, as those computed ahead of time: the model holds their
            quantized values, or what follows from them, in float32.
    """

    content: bytes
    recipe: list[Any]
    unfound: tuple[str, ...] = ()


def bound(content: bytes, simulated: QuantizedModel, policy: Mapping[str, Precision]) -> Bound:
    """Finds the layers' operations in a float .tflite model that `converted` made, and names its tensors after them.

    The converter's names are paths of classes and attributes, longer than the codes of a small layer.

    Args:
        content: The file.
        simulated: The network, with the weights of `policy` applied.
        policy: What the model was converted with.
    """
    from ai_edge_litert.tools import flatbuffer_utils
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils as flatbuffer

    model = flatbuffer.read_model(memoryview(content))
    graph = model.subgraphs[0]
    weights = {name: values for name in policy if (values := _values(simulated, name)) is not None}
    found: list[tuple[str, Any]] = []
    for node in graph.operators:
        kind = str(flatbuffer.TFL_OP_CODE_TO_NAME.get(model.operatorCodes[node.opcodeIndex].builtinCode, ""))
        kind = kind.rpartition(".")[2]
        if kind not in OPERATIONS:
            continue
        tensor = graph.tensors[node.inputs[1]]
        data = flatbuffer.get_tensor_data(tensor, model.buffers)
        same = [name for name in weights if operation_of(simulated.network[name]) == kind]
        same = [name for name in same if data is not None and np.array_equal(weights[name], data)]
        taken = {layer for layer, _ in found}
        same.sort(key=lambda layer: (not _names(flatbuffer.get_tensor_name(tensor), layer), layer in taken))
        found += [(layer, node) for layer in same[:1]]
    _rename(graph, found)
    operations = [
        Operation(
            layer,
            flatbuffer.get_op_scope(node, graph.tensors),
            flatbuffer.get_tensor_name(graph.tensors[node.inputs[1]]),
            flatbuffer.get_tensor_name(graph.tensors[node.inputs[0]]),
            len(graph.tensors[node.inputs[0]].shape),
        )
        for layer, node in found
    ]
    taken = {layer for layer, _ in found}
    renamed = bytes(flatbuffer_utils.convert_object_to_bytearray(model))
    return Bound(renamed, operations, [name for name in policy if name not in taken])


def _rename(graph: Any, found: Sequence[tuple[str, Any]]) -> None:
    """Names weights and results of operations after their layers, a repeated one with its number, others by number."""
    names = {position: f"tensor{position}" for position in range(len(graph.tensors))}
    names |= {position: graph.tensors[position].name.decode() for position in graph.inputs}
    calls: Counter[str] = Counter()
    for layer, node in found:
        suffix = f":{calls[layer]}" if calls[layer] else ""
        calls[layer] += 1
        names |= {node.inputs[1]: f"{layer}.weight{suffix}", node.outputs[0]: f"{layer}{suffix}"}
    for position, name in names.items():
        graph.tensors[position].name = name.encode()


def _names(tensor: str, layer: str) -> bool:
    """Whether a constant's name ends in the last part of a layer's."""
    return re.search(rf"_{re.escape(layer.rpartition('.')[2])};", tensor) is not None


def _values(simulated: QuantizedModel, layer: str) -> np.ndarray[Any, Any] | None:
    """A layer's weight as applied, in LiteRT's layout; None if no operation of LiteRT is such a layer."""
    operation = operation_of(simulated.network[layer])
    if not operation:
        return None
    values = simulated.weight(layer).detach().cpu()
    return values.permute(LAYOUT.get(operation, tuple(range(values.dim())))).numpy()


def recipe_of(found: Sequence[Operation], stored: Mapping[str, Stored], policy: Mapping[str, Precision]) -> list[Any]:
    """Returns ai-edge-quantizer's recipe: one entry per operation, anchored at both ends."""
    recipe = []
    for operation in found:
        kept = stored[operation.layer]
        entry: dict[str, Any] = {"regex": f"^{re.escape(operation.scope)}$", "operation": kept.operation}
        if kept.mode == "float":
            entry |= {"algorithm_key": "no_quantize", "op_config": {}}
        else:
            algorithm = "float_casting" if kept.mode == "cast" else "min_max_uniform_quantize"
            entry |= {"algorithm_key": algorithm, "op_config": op_config(kept, policy[operation.layer])}
        recipe.append(entry)
    return recipe


def quantized(
    content: bytes, simulated: QuantizedModel, policy: Mapping[str, Precision], samples: Sequence[Mapping[str, Any]]
) -> Made:
    """Quantizes a float .tflite model.

    Args:
        content: What `converted` returned for this policy.
        simulated: Holds the ranges.
        policy: The precisions.
        samples: Calibration samples, which place the outputs of layers that are integer throughout.

    Raises:
        UnsupportedError: If a layer whose input is quantized became another operation, or the quantizer did not do as
            told.
    """
    stored = {name: stored_as(simulated.network[name], precision) for name, precision in policy.items()}
    simulated.apply(policy)
    content, found, missing = bound(content, simulated, policy)
    simulated.apply({})
    lost = [name for name in missing if stored[name].mode != "float"]
    for name in lost:
        if stored[name].mode in ("dynamic", "static"):
            raise UnsupportedError(
                f"litert-torch made no {stored[name].operation} of layer {name}, so its input cannot be quantized; "
                f"leave it in float with space.pins.{name}=WEIGHT/float"
            )
    recipe = recipe_of(found, stored, policy)
    if all(stored[operation.layer].mode == "float" for operation in found):
        return Made(content, recipe, tuple(lost))
    with silence():
        from ai_edge_quantizer import quantizer

        made = quantizer.Quantizer(bytearray(content), recipe)
        statistics = _calibrated(content, recipe, samples) if made.need_calibration else {}
        statistics |= _plan_statistics(found, stored, simulated, policy)
        try:
            result: bytes = bytes(made.quantize(statistics, enable_progress_report=False).quantized_model)
        except (ValueError, RuntimeError) as error:
            raise UnsupportedError(f"ai-edge-quantizer refuses the plan: {one_line(error)}") from error
    check(result, found, stored, simulated, policy)
    return Made(result, recipe, tuple(lost))


def _calibrated(content: bytes, recipe: list[Any], samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The smallest and largest value of every tensor; by default the quantizer averages them, and clips the rest."""
    from ai_edge_quantizer import calibrator, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    manager = recipe_manager.RecipeManager()
    manager.load_quantization_recipe(recipe)
    watching = calibrator.Calibrator(bytearray(content), num_threads=THREADS, qsv_update_func=qsv_utils.min_max_update)
    watching.calibrate({SIGNATURE: samples}, manager)
    return {name: value for name, value in watching.get_model_qsvs().items() if value}


def _plan_statistics(
    found: Sequence[Operation],
    stored: Mapping[str, Stored],
    simulated: QuantizedModel,
    policy: Mapping[str, Precision],
) -> dict[str, dict[str, np.ndarray[Any, Any]]]:
    """The plan's ranges as ai-edge-quantizer takes statistics: by tensor, in float64, so that scales come out exact."""
    statistics = {}
    for operation in found:
        kept, precision = stored[operation.layer], policy[operation.layer]
        if kept.mode in ("weight", "dynamic", "static"):
            low, high = _weight_ends(operation.layer, kept, simulated, precision)
            statistics[operation.weight] = {"min": low, "max": high}
        if kept.mode == "static":
            range_ = simulated.input_range(operation.layer, precision.input)
            ends = input_ends(kept, precision.input, range_.scale, range_.zero_point)
            low, high = (np.full((1,) * operation.input_rank, end) for end in ends)
            statistics[operation.input] = {"min": low, "max": high}
    return statistics


def _weight_ends(layer: str, kept: Stored, simulated: QuantizedModel, precision: Precision) -> tuple[Any, Any]:
    parameters = {name: x.double().numpy() for name, x in simulated.stored_parameters(layer, precision).items()}
    ends = weight_ends(kept, precision.weight, parameters["scale"], parameters.get("zero_point"))
    shape = [1] * simulated.weight(layer).dim()
    if precision.weight.granularity == "group":
        shape = [simulated.network[layer].channels, -1]
    elif precision.weight.granularity != "tensor":
        shape[CHANNEL_AXIS.get(kept.operation, 0)] = -1
    low, high = (end.reshape(shape) for end in ends)
    return low, high


def check(
    content: bytes,
    found: Sequence[Operation],
    stored: Mapping[str, Stored],
    simulated: QuantizedModel,
    policy: Mapping[str, Precision],
) -> None:
    """Checks the types and scales of every layer's weight in a quantized model against the plan's.

    Raises:
        UnsupportedError: If one is not as planned.
    """
    from ai_edge_quantizer.utils import tfl_flatbuffer_utils as flatbuffer

    types = {code: name for name, code in vars(_tensor_type()).items() if not name.startswith("_")}
    graph = flatbuffer.read_model(memoryview(content)).subgraphs[0]
    tensors = {flatbuffer.get_tensor_name(tensor): tensor for tensor in graph.tensors}
    for operation in found:
        kept, tensor = stored[operation.layer], tensors[operation.weight]
        wanted = {"float": "FLOAT32", "cast": "FLOAT16"}.get(kept.mode, f"INT{kept.bits}")
        if types[tensor.type] != wanted:
            raise UnsupportedError(
                f"ai-edge-quantizer stored the weight of {operation.layer} as {types[tensor.type]}, not as {wanted}"
            )
        if wanted.startswith("INT") and kept.weight != "altered":
            scale = simulated.stored_parameters(operation.layer, policy[operation.layer])["scale"].flatten().numpy()
            if not np.array_equal(np.asarray(tensor.quantization.scale, np.float32), scale.astype(np.float32)):
                raise UnsupportedError(f"ai-edge-quantizer did not keep the scales of {operation.layer}")


def _tensor_type() -> Any:
    from ai_edge_quantizer import qtyping

    return qtyping.TensorType
