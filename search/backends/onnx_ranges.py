"""Ranges that onnxruntime finds by itself, in place of the plan's: its own calibration, by smallest and largest value.

`onnxruntime.quantization` (1.32.0: `calibrate.MinMaxCalibrater`, `quant_utils.compute_scale_zp`) observes the tensors
that the plan quantizes, on the task's calibration batches, and turns their ends into scales and zero points for the
plan's formats; weights take the ends of every channel or group. It is what its `quantize_static` does for the types
that it knows; the plan's other widths go the same way.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hwmodels import Format, Precision
from search.backends.onnx_capture import INPUT, TENSOR, WEIGHT, call_arguments, marked, markers
from search.backends.onnx_nodes import replace
from search.quantize.affine import Range
from search.quantize.formats import Parameters
from search.quantize.grouping import to_groups
from search.quantize.placement import formats_of
from search.quantize.simulate import QuantizedModel
from search.quiet import quietly
from search.tasks.task import tensors_in

Ends = tuple[float, float]


def takes_own_range(format: Format) -> bool:
    """True for integers whose scale is free: int1 has no zero to calibrate around, mxint8 powers of two."""
    return format.grid == "int" and format.scale == "fp32" and not (format.bits == 1 and format.signed)


def find_ranges(
    captured: Any, simulated: QuantizedModel, policy: Mapping[str, Precision], inputs: Sequence[Any]
) -> None:
    """Puts onnxruntime's ranges in the place of the plan's, for all that a policy quantizes in a graph.

    Args:
        captured: What `capture` returned.
        simulated: Whose ranges are replaced.
        policy: Of which inputs are in formats that a graph can state.
        inputs: The calibration batches, as the model takes them.
    """
    layers, tensors = _observed(captured, inputs)
    for name, precision in policy.items():
        if takes_own_range(precision.weight):
            found = _weight_parameters(simulated, name, precision.weight)
            simulated.ranges.weights[name, precision.weight] = found
        if takes_own_range(precision.input):
            simulated.ranges.inputs[name, precision.input] = own_range(*layers[name], precision.input)
    operation_format = Format.parse(simulated.settings.operation_format)
    for tensor, format in formats_of(simulated.points, simulated.network, policy, operation_format).items():
        if tensor in tensors and takes_own_range(format):
            simulated.ranges.tensors[tensor, format] = own_range(*tensors[tensor], format)


def own_range(low: float, high: float, format: Format) -> Range:
    """Returns the range that onnxruntime gives to values between two ends."""
    from onnxruntime.quantization.quant_utils import compute_scale_zp

    is_around_zero = format.signed and not format.has_zero_point
    low = low if format.has_zero_point or is_around_zero else 0.0
    ends = (np.array(low, np.float32), np.array(high, np.float32))
    codes = (np.array(format.lowest), np.array(format.highest))
    zero_point, scale = compute_scale_zp(*ends, *codes, symmetric=is_around_zero)
    return Range(float(scale), int(zero_point))


def _weight_parameters(simulated: QuantizedModel, layer: str, format: Format) -> Parameters:
    rows = to_groups(simulated.float_weight(layer), format, simulated.network[layer].channel_axis).rows
    ranges = [own_range(float(row.min()), float(row.max()), format) for row in rows]
    parameters = {"scale": torch.tensor([range_.scale for range_ in ranges], dtype=torch.float32)}
    if format.has_zero_point:
        parameters["zero_point"] = torch.tensor([range_.zero_point for range_ in ranges], dtype=torch.int32)
    return parameters


def _observed(captured: Any, inputs: Sequence[Any]) -> tuple[dict[str, Ends], dict[str, Ends]]:
    """The smallest and largest values of the inputs of layers, and of the tensors that may be placed."""
    import onnx_ir as ir
    from onnxruntime.quantization.calibrate import MinMaxCalibrater

    model = captured.clone()
    graph = model.graph
    values: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for kind in (TENSOR, INPUT, WEIGHT):
        for marker in markers(graph, kind):
            if kind != WEIGHT:
                values[kind, marked(marker)].append(marker.inputs[0])
            replace(graph, marker, marker.inputs[0])
    names = [value.name for value in graph.inputs]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "float.onnx"
        ir.save(model, file)
        calibrater = MinMaxCalibrater(file, augmented_model_path=str(Path(folder) / "augmented.onnx"))
        with quietly("root"):
            calibrater.augment_graph()
            calibrater.create_inference_session()
            calibrater.collect_data(_feeds(names, inputs))
            found = calibrater.compute_data()

    def ends(kind: str) -> dict[str, Ends]:
        seen = {}
        for (of, name), observed in values.items():
            if of == kind:
                lows, highs = zip(*(found[value.name].range_value for value in observed), strict=True)
                seen[name] = (float(np.min(lows)), float(np.max(highs)))
        return seen

    return ends(INPUT), ends(TENSOR)


def _feeds(names: Sequence[str], inputs: Sequence[Any]) -> Any:
    """The batches as onnxruntime's calibration reads them."""

    def feeds() -> Iterator[dict[str, Any]]:
        for batch in inputs:
            args, kwargs = call_arguments(batch)
            tensors = tensors_in([args, kwargs])
            yield {name: x.cpu().numpy() for name, x in zip(names, tensors, strict=True)}

    from onnxruntime.quantization import CalibrationDataReader

    class Feeds(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self._left = feeds()

        def get_next(self) -> dict[str, Any] | None:
            return next(self._left, None)

    return Feeds()
