"""The torchao backend: a state dict whose weights are torchao tensors under the plan's own scales.

torchao's `quantize_` would choose scales anew, by minimum and maximum; so the tensors are made from the plan's codes
directly, and the ranges of inputs go with them. What torchao cannot express stays in float and is reported so: inputs
of everything but linear layers, and weights of modules other than `Linear`, `Conv2d` and `Embedding`.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwmodels import Format, Layer, Precision
from search.backends.artifact import check_folder
from search.backends.base import Backend
from search.backends.outcome import ExportReport, Fidelity, LayerExport, Verification
from search.backends.realize import simulate
from search.backends.torch_process import run_in_fresh_process
from search.backends.torchao_tensors import (
    is_expressible,
    multiplies_in_int8,
    running_input,
    stored_type,
    tensor_of,
    torchao,
)
from search.backends.verify import compare, record, replay, uniform_int8
from search.plan import Plan
from search.quantize.observe import first_tensor
from search.quantize.simulate import QuantizedModel, exact_inference
from search.tasks.task import Task, call
from search.trace import parameter_of

STATE, CONFIG = "model.pt", "torchao.json"


class TorchAO(Backend):
    """Writes `model.pt`, the state dict, and `torchao.json`, the configuration torchao calls such weights by."""

    name = "torchao"
    proof = "executed"
    packages = ("torchao",)
    usage = """
    import search; from pathlib import Path
    from search.backends.torchao import load
    model = load(search.Plan.load("plan.json"), float_model, Path("this folder"))
    """

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Weights keep their codes where torchao has a tensor for them; inputs of linear layers are 8-bit integers."""
        weight, input_ = precision.weight, precision.input
        running = running_precision(layer, precision)
        weight_became, weight_note = _weight_outcome(layer, weight)
        input_became, input_note = _input_outcome(layer, precision, running.input)
        return LayerExport(
            layer.name,
            str(precision),
            weight_became,
            input_became,
            "int8" if multiplies_in_int8(layer, running) else "fp32",
            "; ".join(filter(None, (weight_note, input_note))),
            "" if running.input == input_ else str(running),
        )

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes state dict and configuration; `load` reads the first back."""
        layers = tuple(self.express(plan.network[name], precision) for name, precision in plan.policy.items())
        runs = ExportReport(self.name, (), layers).policy
        simulated = simulate(plan, task, runs)
        torch.save(state_of(simulated, runs, task.example_input), folder / STATE)
        config = {"plan": plan.digest, "config": configuration(plan, runs)}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        return layers

    def check(self, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...]) -> Verification:
        """Runs the artifact over the report split, beside the float network and the one at 8 bits everywhere."""
        simulated = simulate(plan, task, ExportReport(self.name, (), layers).policy)
        recording = record(task, simulated.model)
        int8 = {
            name: running_precision(simulated.network[name], precision)
            for name, precision in uniform_int8(plan, task, simulated).items()
        }
        with tempfile.TemporaryDirectory() as temporary:
            states = {"plan": folder / STATE}
            for name, policy in {"float": {}, "int8": int8}.items():
                states[name] = Path(temporary) / f"{name}.pt"
                torch.save(state_of(simulated, policy, task.example_input), states[name])
            simulated.apply({})
            models = {name: (simulated.model, str(path.resolve())) for name, path in states.items()}
            returned, seconds = run_in_fresh_process(f"{__name__}:with_state", models, recording.calls, Path(temporary))
        outputs = replay(task, recording, returned)
        return compare(plan, task, recording, outputs, folder, seconds, layers, self.name)


def load(plan: Plan, model: nn.Module, path: Path) -> nn.Module:
    """Returns a copy of `model` with the weights exported into the folder `path`.

    Raises:
        DataError: If the folder holds no export of this plan, or `model` is not the plan's.
    """
    check_folder(path, plan, TorchAO.name)
    simulated = plan.simulate(model)
    simulated.apply({})
    return with_state((simulated.model, path / STATE))


def with_state(given: tuple[nn.Module, str | Path]) -> nn.Module:
    """Returns a copy of a float network with the weights in a file."""
    model, path = given
    torchao()  # makes its tensors known to torch.load
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(torch.load(path, weights_only=True), assign=True)
    return loaded


def running_precision(layer: Layer, precision: Precision) -> Precision:
    """Returns what torchao runs in place of a precision."""
    return Precision(precision.weight, running_input(layer, precision))


def state_of(simulated: QuantizedModel, policy: Mapping[str, Precision], example_input: Any) -> dict[str, Tensor]:
    """Returns the network's state dict with the weights of `policy`: torchao tensors, or their values in float.

    Args:
        simulated: Knows the float weights and the ranges.
        policy: Precisions that torchao runs.
        example_input: Run once, since the shape of a static range is that of the input.
    """
    simulated.apply({})
    dims = input_dims(simulated, example_input)
    model, made = copy.deepcopy(simulated.model), {}
    for name, precision in policy.items():
        if precision.weight.is_float:
            continue
        layer = simulated.network[name]
        # Tied layers keep one tensor, stored once, where they multiply alike.
        key = (simulated.weight_name(name), str(precision.weight), name if not precision.input.is_float else "")
        if key not in made:
            weight = (
                tensor_of(simulated, name, precision, dims.get(name, 2))
                if is_expressible(layer, precision.weight)
                else simulated.quantized_weight(name, precision.weight)
            )
            made[key] = nn.Parameter(weight, requires_grad=False)
        owner, parameter = parameter_of(model, name)
        owner._parameters[parameter] = made[key]
    return model.state_dict()


def input_dims(simulated: QuantizedModel, example_input: Any) -> dict[str, int]:
    """Returns how many dimensions the input of every linear layer has, found by running the float network."""
    found: dict[str, int] = {}
    hooks = []
    for layer in simulated.network:
        if layer.kind == "linear" and layer.quantizes_input:

            def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = layer.name) -> None:
                found[name] = first_tensor(args, kwargs).dim()

            hooks.append(simulated.owner(layer.name).register_forward_pre_hook(look, with_kwargs=True))
    try:
        with exact_inference():
            call(simulated.model, example_input)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def configuration(plan: Plan, policy: Mapping[str, Precision]) -> dict[str, Any]:
    """Returns torchao's `FqnToConfig` as JSON holds it: one entry for every layer, null for one it leaves alone.

    It says which width and which kind of range a layer has; the scales are in the state dict.
    """
    with_names = torchao().FqnToConfig({name: _config(plan.network[name], policy[name]) for name in policy})
    from torchao.core.config import config_to_dict

    # Sorted: fields that are sets have no order of their own.
    as_dict: dict[str, Any] = json.loads(json.dumps(config_to_dict(with_names), sort_keys=True))
    return as_dict


def _config(layer: Layer, precision: Precision) -> Any:
    api = torchao()
    from torchao.quantization.granularity import PerAxis, PerGroup, PerRow, PerTensor
    from torchao.quantization.quant_primitives import MappingType

    weight, input_ = precision.weight, precision.input
    if not is_expressible(layer, weight):
        return None

    def mapping(format: Format) -> Any:
        return MappingType.ASYMMETRIC if format.has_zero_point or not format.signed else MappingType.SYMMETRIC

    if multiplies_in_int8(layer, precision):
        if input_.is_dynamic:
            return api.Int8DynamicActivationInt8WeightConfig(
                act_mapping_type=mapping(input_), granularity=PerRow(), set_inductor_config=False
            )
        return api.Int8StaticActivationInt8WeightConfig(
            act_mapping_type=mapping(input_), granularity=[PerTensor(), PerRow()], set_inductor_config=False
        )
    granularity = PerGroup(weight.group) if weight.granularity == "group" else PerAxis(0)
    if input_.is_float:
        return api.IntxWeightOnlyConfig(
            weight_dtype=stored_type(weight), granularity=granularity, mapping_type=mapping(weight)
        )
    return api.Int8DynamicActivationIntxWeightConfig(
        weight_dtype=stored_type(weight), weight_granularity=granularity, weight_mapping_type=mapping(weight)
    )


def _weight_outcome(layer: Layer, weight: Format) -> tuple[Fidelity, str]:
    if weight.is_float:
        return "float", ""
    if not is_expressible(layer, weight):
        return "contained", f"torchao has no {weight} weight of {layer.kind}: its values are stored as float32"
    if weight.bits < 8:
        return "contained", f"{weight} codes are stored as int8"
    return "exact", "" if weight.signed else f"{weight} codes are stored as int8, less 128"


def _input_outcome(layer: Layer, precision: Precision, running: Format) -> tuple[Fidelity, str]:
    input_ = precision.input
    if input_.is_float:
        return "float", ""
    if running == input_:
        return "exact", "torchao multiplies inputs by the inverse of their scale: halves may round to the other side"
    if not running.is_float:
        return "altered", f"torchao has no {input_} input here and quantizes it to {running}, over a range of its own"
    if layer.kind != "linear":
        why = f"torchao quantizes the inputs of linear layers only, not of {layer.kind}"
    else:
        an = "an" if str(precision.weight).startswith("int") else "a"
        why = f"torchao takes no {input_} input beside {an} {precision.weight} weight"
    return "float", f"{why}: the input stays in float"
