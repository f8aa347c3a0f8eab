"""Quantized `torch.export` programs (PT2E): a plan's ranges as the quantizers in front of and inside layers.

A quantizer of torchao or ExecuTorch says where quantizers go; observers that know their ranges beforehand say what they
do, so that nothing is calibrated anew. The program needs no model class: it is one file that any process loads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hwmodels import Format, Precision
from search.backends.onnx_capture import call_arguments
from search.errors import UnsupportedError
from search.quantize.simulate import QuantizedModel
from search.quiet import quietly
from search.tasks.task import call, tensors_in
from search.trace import parameter_of, slow_attention

LOGGERS = ("torch", "torchao")


@dataclass(frozen=True)
class Codes:
    """How a tensor is quantized: codes from `lowest` to `highest`, of which `zero_point` stands for zero.

    Attributes:
        scale: Shape `(channels,)` of a weight, without dimensions for an input.
        zero_point: The same for all.
        lowest: Smallest code.
        highest: Largest code.
        dtype: Type the codes are stored as.
    """

    scale: Tensor
    zero_point: int
    lowest: int
    highest: int
    dtype: torch.dtype


Layers = Mapping[str, tuple[Codes | None, Codes | None]]
"""Layer to the codes of its weight and of its input; None leaves a tensor in float."""


def is_weight(format: Format) -> bool:
    """True of weights that programs hold as int8 codes: integers around zero, one scale per channel or tensor."""
    return _is_integer(format) and format.signed and not format.has_zero_point


def is_input(format: Format) -> bool:
    """True of inputs that programs quantize: integers of 2 to 8 bits under one static range."""
    return _is_integer(format) and (format.bits > 1 or not format.signed)


def weight_codes(simulated: QuantizedModel, layer: str, format: Format) -> Codes:
    """Returns how a weight is quantized to int8 under the simulation's scales."""
    found = simulated.network[layer]
    scale = simulated.weight_parameters(layer, format)["scale"].expand(found.channels).clone()
    return Codes(scale, 0, format.lowest, format.highest, torch.int8)


def input_codes(simulated: QuantizedModel, layer: str, format: Format, dtype: torch.dtype) -> Codes:
    """Returns how an input is quantized to uint8 or int8 under the simulation's range.

    Codes of the other sign are moved by 128, and their zero point too, which changes no value.
    """
    range_ = simulated.input_range(layer, format)
    shift = 128 * (int(format.signed) - int(dtype.is_signed))
    ends = (format.lowest + shift, format.highest + shift)
    return Codes(torch.tensor(range_.scale), range_.zero_point + shift, *ends, dtype)


def quantized_program(
    simulated: QuantizedModel,
    policy: Mapping[str, Precision],
    layers: Layers,
    example_input: Any,
    quantizer: Callable[[Mapping[str, Any]], Any],
    calibration: Iterable[Any] = (),
) -> Any:
    """Returns a network as a quantized `torch.export.ExportedProgram`; the batch size stays free.

    Args:
        simulated: The folded network.
        policy: Its precisions; weights take their values before they are quantized, which then leaves them as they are.
        layers: What is quantized how.
        example_input: As the task has it.
        quantizer: Makes PT2E's quantizer of a `QuantizationConfig` per layer.
        calibration: Inputs to find other ranges with, in place of those in `layers`; none keeps them.

    Raises:
        UnsupportedError: If the model cannot be exported, or the quantizer passes over a layer.
    """
    with quietly(*LOGGERS):
        from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    batches = list(calibration)
    model = with_weights(simulated, policy) if not batches else simulated.apply({})
    arguments = two_samples(example_input)
    with quietly(*LOGGERS), torch.no_grad(), slow_attention(), _plain_outputs(model, arguments):
        exported = _export(model, arguments).module()
        configs = {name: _config(*codes, bool(batches)) for name, codes in layers.items()}
        try:
            prepared = prepare_pt2e(exported, quantizer(configs))
        except (AssertionError, RuntimeError, ValueError) as error:
            raise UnsupportedError(f"the quantizer refuses {type(model).__name__}: {_first_line(error)}") from error
        _check_seen(prepared, layers)
        for inputs in batches:
            call(prepared, inputs)
        program = _export(_without_unread(convert_pt2e(prepared)), arguments)
    for node in program.graph.nodes:  # where nodes come from: files of this machine, and numbers that change every time
        for key in ("stack_trace", "from_node", "torch_fn", "source_fn_stack"):
            node.meta.pop(key, None)
    program.example_inputs = None  # the user's data
    return program


def save_program(program: Any, path: Path) -> None:
    """Writes a program as `.pt2`, the same bytes every time."""
    written = BytesIO()  # a file's own name would become part of its content
    with quietly(*LOGGERS):
        torch.export.save(program, written)
    path.write_bytes(written.getvalue())


def load_program(path: str | Path) -> Any:
    """Reads a program, an `ExportedProgram`; nothing but torch and torchao is needed."""
    with quietly(*LOGGERS):
        import torchao.quantization.pt2e  # noqa: F401 - registers the operations that quantize

        return torch.export.load(path)


def load_module(path: str) -> nn.Module:
    """Reads a program as a module: the reference, which multiplies dequantized values in float."""
    module: nn.Module = load_program(path).module()
    return module


def with_weights(simulated: QuantizedModel, policy: Mapping[str, Precision]) -> nn.Module:
    """Returns a copy of the float network whose weights have the values of `policy`."""
    model = copy.deepcopy(simulated.apply({}))
    for name, precision in policy.items():
        if not precision.weight.is_float:
            owner, parameter = parameter_of(model, name)
            values = simulated.quantized_weight(name, precision.weight)
            owner.get_parameter(parameter).data = values.detach().clone()
    return model


def two_samples(example_input: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a call with at least two samples, for the exporter takes one for a fixed size."""
    arguments = call_arguments(example_input)
    size = len(tensors_in(list(arguments))[0])
    if size != 1:
        return arguments
    doubled: tuple[tuple[Any, ...], dict[str, Any]] = pytree.tree_map(
        lambda x: torch.cat([x, x]) if isinstance(x, Tensor) and x.dim() and len(x) == 1 else x, arguments
    )
    return doubled


def _export(model: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Any:
    args, kwargs = arguments
    batch = len(tensors_in([args, kwargs])[0])

    def free(x: Any) -> Any:
        return {0: torch.export.Dim.DYNAMIC} if isinstance(x, Tensor) and x.dim() and len(x) == batch else None

    shapes = pytree.tree_map(free, kwargs or args)
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
    except Exception as error:  # of many types, from the model's own to the exporter's
        reason = _first_line(error)
        raise UnsupportedError(f"{type(model).__name__} cannot be exported by torch.export: {reason}") from error


@contextmanager
def _plain_outputs(model: nn.Module, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Iterator[None]:
    """Lets a model that returns an object of a class of its own return that object's tensors, as a tuple."""
    args, kwargs = arguments
    if type(model(*args, **kwargs)) in (Tensor, tuple, list, dict):
        yield
        return
    hook = model.register_forward_hook(lambda module, args, output: tuple(tensors_in(output)))
    try:
        yield
    finally:
        hook.remove()


def _without_unread(module: nn.Module) -> nn.Module:
    """Drops the parameters and buffers that no operation reads, such as weights whose codes are stored."""
    graph: Any = module.graph
    read = {node.target for node in graph.nodes if node.op == "get_attr"}
    for name in [name for name, _ in (*module.named_parameters(), *module.named_buffers()) if name not in read]:
        owner, _, own = name.rpartition(".")
        delattr(module.get_submodule(owner), own)
    return module


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _config(weight: Codes | None, input_: Codes | None, recalibrates: bool) -> Any:
    """Returns PT2E's `QuantizationConfig` of a layer."""
    from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

    @dataclass(eq=True, frozen=True)
    class Spec(QuantizationSpec):  # type: ignore[misc]
        """With the range: `prepare_pt2e` gives readers of one tensor one observer, if their specs are the same."""

        scale: tuple[float, ...] = ()
        zero_point: int = 0

    def spec(codes: Codes | None, is_weight: bool) -> Any:
        if codes is None:
            return None
        return Spec(
            dtype=codes.dtype,
            observer_or_fake_quant_ctr=_observer(codes, is_weight, recalibrates),
            quant_min=codes.lowest,
            quant_max=codes.highest,
            qscheme=torch.per_channel_symmetric if is_weight else torch.per_tensor_affine,
            ch_axis=0,
            scale=tuple(codes.scale.reshape(-1).tolist()),
            zero_point=codes.zero_point,
        )

    return QuantizationConfig(spec(input_, False), None, spec(weight, True), None)


def _observer(codes: Codes, is_weight: bool, recalibrates: bool) -> Any:
    """Returns what makes observers of one tensor: such as know its range, or such as find one."""
    from torchao.quantization.pt2e import HistogramObserver, PerChannelMinMaxObserver
    from torchao.quantization.pt2e.observer import ObserverBase

    finder: Any = PerChannelMinMaxObserver if is_weight else HistogramObserver

    # prepare_pt2e gives an axis to classes with PerChannel in their names
    class FindingPerChannel(finder):  # type: ignore[misc]
        """Finds a range of its own."""

        def __init__(self, ch_axis: int | None, scale: Any, zero_point: Any, **other: Any) -> None:
            super().__init__(**other, **({"ch_axis": ch_axis} if is_weight else {}), eps=2**-12)

    class PlannedPerChannel(ObserverBase):  # type: ignore[misc]
        """Knows its range beforehand."""

        def __init__(
            self, dtype: Any, quant_min: int, quant_max: int, qscheme: Any, ch_axis: int | None, **other: Any
        ) -> None:
            super().__init__(dtype=dtype)
            self.quant_min, self.quant_max, self.qscheme, self.ch_axis = quant_min, quant_max, qscheme, ch_axis

        def forward(self, x: Tensor) -> Tensor:
            return x

        def calculate_qparams(self) -> tuple[Tensor, Tensor]:
            return codes.scale, torch.full_like(codes.scale, codes.zero_point, dtype=torch.int64)

    base = FindingPerChannel if recalibrates else PlannedPerChannel

    class ClippingPerChannel(base):  # type: ignore[misc,valid-type]
        """Clips values to fewer codes than their type has: kernels that quantize what they return do not."""

        def convert(self, model: Any, node: Any) -> None:
            scale, zero_point = self.calculate_qparams()
            _replace_by_clipped(model.graph, node, replace(codes, scale=scale, zero_point=int(zero_point)))

    fills_its_type = (codes.lowest, codes.highest) == _ends(codes.dtype)
    return base if is_weight or fills_its_type else ClippingPerChannel


def _replace_by_clipped(graph: Any, observer: Any, codes: Codes) -> None:
    """Replaces an observer's node by a clip, a quantizer to all codes of its type, and a dequantizer."""
    scale = float(codes.scale)
    ends = ((end - codes.zero_point) * scale for end in (codes.lowest, codes.highest))
    range_ = (scale, codes.zero_point, *_ends(codes.dtype), codes.dtype)
    quantize = torch.ops.quantized_decomposed.quantize_per_tensor.default
    dequantize = torch.ops.quantized_decomposed.dequantize_per_tensor.default
    with graph.inserting_before(observer):
        clipped = graph.call_function(torch.ops.aten.clamp.default, (observer.args[0], *ends))
        stored = graph.call_function(quantize, (clipped, *range_))
        values = graph.call_function(dequantize, (stored, *range_))
    observer.replace_all_uses_with(values)
    graph.erase_node(observer)


def _ends(dtype: torch.dtype) -> tuple[int, int]:
    limits = torch.iinfo(dtype)
    return limits.min, limits.max


def is_layer(node: Any) -> bool:
    """True of an operation that reads an input and a weight, both of which may be quantized."""
    return node.target in (torch.ops.aten.conv2d.default, torch.ops.aten.linear.default)


def modules_of(node: Any) -> list[str]:
    """Names of the modules that an operation of an exported program was called in, the innermost first."""
    stack = node.meta.get("nn_module_stack", {}).values()
    return [name.removeprefix("L['self'].") for name, _ in reversed(stack)]


def _check_seen(prepared: nn.Module, layers: Layers) -> None:
    """Raises UnsupportedError if the quantizer has put no observer on a tensor that is to be quantized."""
    calls: dict[str, list[Any]] = {}
    graph: Any = prepared.graph
    for node in filter(is_layer, graph.nodes):
        for name in modules_of(node):
            calls.setdefault(name, []).append(node)
    for layer, codes in layers.items():
        for side, place, wanted in (("weight", 1, codes[0]), ("input", 0, codes[1])):
            observed = [node.args[place].op == "call_module" for node in calls.get(layer, [])]
            if wanted is not None and not (observed and all(observed)):
                raise UnsupportedError(
                    f"the quantizer passes over the {side} of layer {layer}, as where its module is never called "
                    "itself; search with that layer in float"
                )


def _is_integer(format: Format) -> bool:
    return format.is_static_integer and format.bits <= 8
