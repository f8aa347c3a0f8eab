"""The x86inductor backend: a quantized PyTorch program whose integer kernels TorchInductor picks on x86 processors.

`X86InductorQuantizer` places quantizers by the exact names of layers, and what they do is the plan's (see
`search.backends.pt2e`). Compiled, convolutions and linear layers between int8 weights and 8-bit inputs become oneDNN's
integer operations, with the ReLU and the addition behind them. From torchao 0.18,
`torchao/quantization/pt2e/quantizer/x86_inductor_quantizer.py` and `torch/_inductor/fx_passes/quantization.py`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from hwmodels import FLOAT, Format, Layer, Precision
from search.backends import pt2e
from search.backends.base import Backend
from search.backends.outcome import ExportReport, Fidelity, LayerExport, Verification
from search.backends.realize import simulate
from search.backends.torch_process import run_in_fresh_process
from search.backends.verify import compare, record, replay, uniform_int8
from search.plan import Plan
from search.quantize.simulate import QuantizedModel
from search.quiet import quietly
from search.tasks.task import Task

PROGRAM = "model.pt2"
KINDS = {"conv2d", "linear"}  # that X86InductorQuantizer looks for
UINT8 = Format.parse("uint8")


class X86Inductor(Backend):
    """Writes `model.pt2`, a program that loads without the model's classes."""

    name = "x86inductor"
    header_bytes = 12288  # a line of program text for every operation, with shapes and where it came from
    proof = "executed"
    packages = ("torch", "torchao")
    recalibrates = True
    usage = """
    import torch, torchao.quantization.pt2e.quantizer.x86_inductor_quantizer
    torch._inductor.config.freezing = True  # or integer kernels are not used
    model = torch.compile(torch.export.load("model.pt2").module())
    with torch.no_grad(): outputs = model(batch)
    """

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Convolutions and linear layers multiply int8 with uint8; other weights keep their values in float32."""
        return express(self.name, layer, precision, torch.uint8)

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes `model.pt2`."""
        layers = tuple(self.express(plan.network[name], precision) for name, precision in plan.policy.items())
        runs = ExportReport(self.name, (), layers).policy
        simulated = simulate(plan, task, runs)
        calibration = [task.inputs(batch) for batch in task.batches("calibration")] if recalibrate else []
        program = _program(simulated, runs, task, calibration)
        pt2e.save_program(program, folder / PROGRAM)
        return tuple(map(_recalibrated, layers)) if recalibrate else layers

    def check(self, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...]) -> Verification:
        """Runs the compiled program over the report split, beside the float network's and that at 8 bits everywhere.

        Without a C++ compiler the reference runs, which multiplies the same values in float, and is named so.
        """
        simulated = simulate(plan, task, ExportReport(self.name, (), layers).policy)
        recording = record(task, simulated.model)
        int8 = uniform_int8(plan, task, simulated)
        shown = {name: self.express(simulated.network[name], precision) for name, precision in int8.items()}
        policies = {"float": {}, "int8": ExportReport(self.name, (), tuple(shown.values())).policy}
        with tempfile.TemporaryDirectory() as temporary:
            programs = {"plan": folder / PROGRAM}
            for name, policy in policies.items():
                programs[name] = Path(temporary) / f"{name}.pt2"
                pt2e.save_program(_program(simulated, policy, task), programs[name])
            compiles = has_compiler()
            load = f"{__name__}:load_compiled" if compiles else f"{pt2e.__name__}:load_module"
            models = {
                name if compiles else f"{name} (reference)": str(path.resolve()) for name, path in programs.items()
            }
            returned, seconds = run_in_fresh_process(load, models, recording.calls, Path(temporary))
        outputs = replay(task, recording, returned)
        return compare(plan, task, recording, outputs, folder, seconds, layers, self.name)


def express(backend: str, layer: Layer, precision: Precision, input_type: torch.dtype) -> LayerExport:
    """Says what a quantized program makes of a layer whose inputs are stored as `input_type`, uint8 or int8."""
    weight, input_ = precision.weight, precision.input
    running = running_input(layer, input_)
    weight_became, weight_note = _weight_outcome(layer, weight)
    input_became, input_note = _input_outcome(backend, layer, input_, running, input_type)
    is_integer = pt2e.is_weight(weight) and not running.is_float and layer.kind in KINDS
    return LayerExport(
        layer.name,
        str(precision),
        weight_became,
        input_became,
        "int8" if is_integer else "fp32",
        "; ".join(filter(None, (weight_note, input_note))),
        "" if running == input_ else str(Precision(weight, running)),
    )


def running_input(layer: Layer, input_: Format) -> Format:
    """Returns the input format that runs: static integers of up to 8 bits as planned, those found at run time as uint8.

    Programs that quantize at run time take the range of a whole batch, which the simulation never does.
    """
    if layer.kind not in KINDS:
        return FLOAT
    if input_.is_dynamic and input_.grid == "int" and input_.scale == "fp32" and input_.bits <= 8:
        return UINT8
    return input_ if pt2e.is_input(input_) else FLOAT


def layer_codes(simulated: QuantizedModel, policy: Mapping[str, Precision], input_type: torch.dtype) -> pt2e.Layers:
    """Returns how the tensors of every layer are quantized, of policies that run; nothing of those in float."""
    found = {}
    for name, precision in policy.items():
        is_stored = simulated.network[name].kind in KINDS and pt2e.is_weight(precision.weight)
        weight = pt2e.weight_codes(simulated, name, precision.weight) if is_stored else None
        input_ = None
        if not precision.input.is_float:
            input_ = pt2e.input_codes(simulated, name, precision.input, input_type)
        found[name] = (weight, input_)
    return found


def load_compiled(path: str) -> Callable[..., Any]:
    """Reads a program and compiles it with TorchInductor, for each shape of inputs when it first comes."""
    with quietly(*pt2e.LOGGERS):
        # Registers the passes that find integer operations, and sets the options they need.
        import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401
    from torch._inductor import config

    config.freezing = True
    compiled: Callable[..., Any] = torch.compile(pt2e.load_module(path), dynamic=False)

    def run(*args: Any, **kwargs: Any) -> Any:
        # Weights are frozen into compiled code in no_grad mode, not in inference mode.
        with torch.inference_mode(False), torch.no_grad():
            return compiled(*args, **kwargs)

    return run


def has_compiler() -> bool:
    """True where TorchInductor finds a C++ compiler."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError):
        return False
    return True


def _program(
    simulated: QuantizedModel, policy: Mapping[str, Precision], task: Task, calibration: Sequence[Any] = ()
) -> Any:
    codes = layer_codes(simulated, policy, torch.uint8)
    return pt2e.quantized_program(simulated, policy, codes, task.example_input, _quantizer, calibration)


def _quantizer(configs: Mapping[str, Any]) -> Any:
    """Returns X86InductorQuantizer with an entry for every layer, None for one that stays in float."""
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import X86InductorQuantizer

    quantizer = X86InductorQuantizer()
    for name, config in configs.items():
        is_float = config.weight is None and config.input_activation is None
        quantizer.set_module_name_qconfig(name, None if is_float else config)
    return quantizer


def _recalibrated(layer: LayerExport) -> LayerExport:
    quantized = {side: not format.is_float and became != "float" for side, format, became in layer.sides}
    if not any(quantized.values()):
        return layer
    return replace(
        layer,
        weight="altered" if quantized["weight"] else layer.weight,
        input="altered" if quantized["input"] else layer.input,
        note="; ".join(
            filter(None, (layer.note, "its ranges are torchao's own, by minimum and maximum and by histogram"))
        ),
        runs=layer.runs or layer.precision,
    )


def _weight_outcome(layer: Layer, weight: Format) -> tuple[Fidelity, str]:
    if weight.is_float:
        return "float", ""
    if layer.kind not in KINDS or not pt2e.is_weight(weight):
        return "contained", f"programs hold no {weight} weight of {layer.kind}: its values are stored as float32"
    return ("exact", "") if weight.bits == 8 else ("contained", f"{weight} codes are stored as int8")


def _input_outcome(
    backend: str, layer: Layer, input_: Format, running: Format, storage: torch.dtype
) -> tuple[Fidelity, str]:
    if input_.is_float:
        return "float", ""
    if running.is_float:
        why = f"{backend} takes no {input_} input" + ("" if layer.kind in KINDS else f" of {layer.kind}")
        return "float", f"{why}: it stays in float"
    if running != input_:
        return (
            "altered",
            f"{backend} finds no range per token or sample: the input becomes {running}, with a static one",
        )
    stored = str(storage).removeprefix("torch.")
    moved = "" if input_.signed == storage.is_signed else f", {'plus' if input_.signed else 'less'} 128"
    if input_.bits == 8 and not (input_.signed and not input_.span):
        return "exact", f"{input_} codes are stored as {stored}{moved}" if moved else ""
    fidelity: Fidelity = "exact" if input_.bits == 8 else "contained"
    return fidelity, f"{input_} codes are stored as {stored}{moved}, and values clipped to their range before"
