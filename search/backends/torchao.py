"""The torchao backend: a state dict whose weights are torchao tensors under the plan's own scales.

torchao's `quantize_` would choose scales anew, by minimum and maximum; so the tensors are made from the plan's codes
directly. What torchao cannot express stays in float and is reported so: inputs with a range of their own, weights of
modules other than `Linear`, `Conv2d` and `Embedding`, and widths beyond 8 bits.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwmodels import Format, Layer, Precision
from search.backends.artifact import check_folder
from search.backends.base import Backend, channel_scale
from search.backends.outcome import ExportReport, Fidelity, LayerExport, Verification
from search.backends.realize import simulate
from search.backends.verify import RUNS, THREADS, WARMUP, compare, record, replay, single, uniform_int8
from search.errors import UnsupportedError
from search.plan import Plan
from search.quantize.affine import weight_codes
from search.quantize.simulate import QuantizedModel, exact_inference
from search.quiet import quietly
from search.tasks.task import Task, tensors_in
from search.trace import parameter_of

STATE, CONFIG = "model.pt", "torchao.json"
KINDS = {"linear", "conv2d", "embedding"}  # modules whose weight may be a torchao integer tensor


class TorchAO(Backend):
    """Writes `model.pt`, the state dict, and `torchao.json`, the configuration torchao calls such weights by."""

    name = "torchao"
    proof = "executed"
    packages = ("torchao",)
    usage = """
    import torchao, torch
    from search.backends.torchao import load
    model = load(search.Plan.load("plan.json"), float_model, Path("this folder"))
    """

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Weights keep their codes where torchao has a tensor for them; inputs stay in float."""
        return _exported_layer(layer, precision)

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes state dict and configuration; `load` reads the first back."""
        simulated = plan.simulate(task.model)
        torch.save(state_of(simulated, plan.policy), folder / STATE)
        config = {"plan": plan.digest, "config": configuration(plan)}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        return exported_layers(plan)

    def check(self, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...]) -> Verification:
        """Runs the artifact over the report split, beside the float network and the one with 8-bit weights."""
        report = ExportReport(self.name, (), layers)
        simulated = simulate(plan, task, report.policy)
        recording = record(task, simulated.model)
        int8 = uniform_int8(plan, task, simulated)
        with tempfile.TemporaryDirectory() as temporary:
            states = {
                "plan": folder / STATE,
                "float": Path(temporary) / "float.pt",
                "int8": Path(temporary) / "int8.pt",
            }
            torch.save(state_of(simulated, {}), states["float"])
            torch.save(state_of(simulated, int8), states["int8"])
            simulated.apply({})
            returned, seconds = run_in_fresh_process(simulated.model, states, recording.calls, Path(temporary))
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
    return _with_state(simulated.model, path / STATE)


def is_expressible(layer: Layer, format: Format) -> bool:
    """True where torchao has a tensor for the weight of a layer in that format."""
    return layer.kind in KINDS and layer.channel_axis == 0 and format.is_symmetric_integer and format.bits <= 8


def state_of(simulated: QuantizedModel, policy: Mapping[str, Precision]) -> dict[str, Tensor]:
    """Returns the network's state dict with the weights of `policy`: torchao tensors, or their values in float."""
    simulated.apply({})
    model = copy.deepcopy(simulated.model)
    for name, precision in policy.items():
        if precision.weight.is_float:
            continue
        layer = simulated.network[name]
        if is_expressible(layer, precision.weight):
            scale = channel_scale(simulated, name, precision.weight)
            codes = weight_codes(simulated.float_weight(name), scale, precision.weight, layer.channel_axis)
            weight = integer_tensor(codes, scale, precision.weight)
        else:
            weight = simulated.quantized_weight(name, precision.weight)
        owner, parameter = parameter_of(model, name)
        owner._parameters[parameter] = nn.Parameter(weight, requires_grad=False)
    return model.state_dict()


def integer_tensor(codes: Tensor, scale: Tensor, format: Format) -> Tensor:
    """Returns torchao's tensor of given codes, with one scale per entry of the first axis."""
    blocks = (len(codes), *[1] * (codes.dim() - 1))
    tensor: Tensor = _torchao().IntxUnpackedToInt8Tensor(
        qdata=codes.to(torch.int8),
        scale=scale.reshape(blocks),
        zero_point=torch.zeros(blocks, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{format.bits}"),
        block_size=(1, *codes.shape[1:]),
        dtype=torch.float32,
        activation_quantization=None,
    )
    return tensor


def configuration(plan: Plan) -> dict[str, Any]:
    """Returns torchao's `FqnToConfig` of the plan as JSON holds it: which weight has which width."""
    torchao = _torchao()
    from torchao.core.config import config_to_dict
    from torchao.quantization.granularity import PerAxis

    named: dict[str, Any] = {
        name: torchao.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, f"int{precision.weight.bits}"), granularity=PerAxis(0)
        )
        for name, precision in plan.policy.items()
        if is_expressible(plan.network[name], precision.weight)
    }
    found: dict[str, Any] = config_to_dict(torchao.FqnToConfig(named))
    return found


def exported_layers(plan: Plan) -> tuple[LayerExport, ...]:
    """Says what becomes of each layer."""
    return tuple(_exported_layer(plan.network[name], precision) for name, precision in plan.policy.items())


def _exported_layer(layer: Layer, precision: Precision) -> LayerExport:
    fidelity: Fidelity = "float"
    notes = []
    if not precision.weight.is_float:
        exact = is_expressible(layer, precision.weight) and precision.weight.bits == 8
        fidelity = "exact" if exact else "contained"
        if not is_expressible(layer, precision.weight):
            notes.append(f"torchao has no {precision.weight} weight of {layer.kind}: its values are stored as float32")
        elif not exact:
            notes.append(f"{precision.weight} codes are stored as int8")
    if not precision.input.is_float:
        notes.append(f"torchao takes no {precision.input} input with a given range: the input stays in float")
    # torchao's weight-only tensors dequantize themselves in front of the float kernel.
    runs = "" if precision.input.is_float else str(Precision(precision.weight))
    return LayerExport(layer.name, str(precision), fidelity, "float", "fp32", "; ".join(notes), runs)


def run_in_fresh_process(
    model: nn.Module, states: Mapping[str, Path], calls: Sequence[Any], folder: Path
) -> tuple[list[list[Tensor]], dict[str, list[float]]]:
    """Runs a model with the first of `states` on every call, and times it with all of them on one sample.

    Args:
        model: The float network.
        states: Name to file of a state dict.
        calls: Positional and keyword arguments of every call.
        folder: A temporary folder, through which the processes talk.

    Returns:
        The tensors that every call returned, and the seconds of the timed runs by name.

    Raises:
        UnsupportedError: If the model cannot be sent to another process, or fails there.
    """
    paths = {name: str(path.resolve()) for name, path in states.items()}
    try:
        torch.save({"model": model, "states": paths, "calls": list(calls)}, folder / "job.pt")
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be sent to a fresh process: {error}; define its classes in a module"
        ) from error
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "search.backends.torchao", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise UnsupportedError(
            f"the exported model does not run in a fresh process: {done.stderr.strip().splitlines()[-1]}"
        )
    answer = torch.load(folder / "answer.pt", weights_only=True)
    return answer["returned"], answer["seconds"]


def main(folder: Path) -> None:
    """Does the job in a folder, in the fresh process."""
    torch.set_num_threads(THREADS)
    # The job is one this process's parent wrote, pickled modules and all.
    job = torch.load(folder / "job.pt", weights_only=False)
    models = {name: _with_state(job["model"], Path(path)) for name, path in job["states"].items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with exact_inference():
        plan = next(iter(models.values()))
        returned = [[tensor.clone() for tensor in tensors_in(plan(*args, **kwargs))] for args, kwargs in job["calls"]]
        args, kwargs = single(job["calls"][0])
        for turn in range(WARMUP + RUNS):
            for name, model in models.items():  # interleaved, so that all see the same state of the machine
                start = time.perf_counter()
                model(*args, **kwargs)
                if turn >= WARMUP:
                    seconds[name].append(time.perf_counter() - start)
    torch.save({"returned": returned, "seconds": seconds}, folder / "answer.pt")


def _with_state(model: nn.Module, path: Path) -> nn.Module:
    """Returns a copy of a float network with the weights in a file."""
    _torchao()  # makes its tensors known to torch.load
    loaded = copy.deepcopy(model)
    loaded.load_state_dict(torch.load(path, weights_only=True), assign=True)
    return loaded


def _torchao() -> Any:
    """Imports torchao's quantization without its remarks on extensions for other machines."""
    with quietly("torchao", "torch"):
        import torchao.quantization

    return torchao.quantization


if __name__ == "__main__":
    main(Path(sys.argv[1]))
