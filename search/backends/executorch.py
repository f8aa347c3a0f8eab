"""The executorch backend: a quantized PyTorch program that ExecuTorch lowers and runs with its portable kernels.

`model.pt2` holds int8 weights, one scale per channel, and int8 inputs under the plan's own ranges (see
`search.backends.pt2e`); `lower` makes `model.pte` of it. Portable kernels multiply dequantized values in float.

XNNPACK is not used: lowered with `XnnpackPartitioner`, a plan whose layers alone quantize their inputs returned other
values (ExecuTorch 1.5.1: largest difference 11.6 of logits up to 15, no prediction kept; the cause is not known).
Nor is `XNNPACKQuantizer.set_module_name`: without a word it passes over a convolution whose ReLU belongs to another
module (`backends/xnnpack/quantizer/xnnpack_quantizer_utils.py`), so layers are found by their exact names here.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hwmodels import Layer, Precision
from search.backends import pt2e
from search.backends.base import Backend
from search.backends.outcome import ExportReport, LayerExport, Verification
from search.backends.realize import simulate
from search.backends.torch_process import run_in_fresh_process
from search.backends.verify import compare, record, replay, uniform_int8
from search.backends.x86inductor import PROGRAM, express, layer_codes
from search.plan import Plan
from search.quantize.simulate import QuantizedModel
from search.quiet import quietly
from search.tasks.task import Task, tensors_in

LOWERED = "model.pte"


class ExecuTorch(Backend):
    """Writes `model.pt2`, which ExecuTorch lowers; the program is made with torchao, which ExecuTorch needs itself."""

    name = "executorch"
    header_bytes = 12288
    proof = "executed"
    packages = ("torch", "torchao", "executorch")
    usage = """
    import torch, torchao.quantization.pt2e, executorch.kernels.quantized, executorch.runtime
    from search.backends.executorch import lower
    lower("model.pt2", "model.pte")  # portable kernels, one sample a batch; see there why not XNNPACK
    executorch.runtime.Runtime.get().load_program("model.pte").load_method("forward").execute([batch])
    """

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Convolutions and linear layers have int8 weights and inputs; other weights keep their values in float32."""
        return replace(express(self.name, layer, precision, torch.int8), compute="fp32")

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes `model.pt2`."""
        layers = tuple(self.express(plan.network[name], precision) for name, precision in plan.policy.items())
        runs = ExportReport(self.name, (), layers).policy
        pt2e.save_program(_program(simulate(plan, task, runs), runs, task), folder / PROGRAM)
        return layers

    def check(self, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...]) -> Verification:
        """Lowers the program and runs it over the report split, beside the float network's and that at 8 bits."""
        simulated = simulate(plan, task, ExportReport(self.name, (), layers).policy)
        recording = record(task, simulated.model)
        int8 = uniform_int8(plan, task, simulated)
        shown = tuple(self.express(simulated.network[name], precision) for name, precision in int8.items())
        policies = {"float": {}, "int8": ExportReport(self.name, (), shown).policy}
        with tempfile.TemporaryDirectory() as temporary:
            programs = {"plan": folder / PROGRAM}
            for name, policy in policies.items():
                programs[name] = Path(temporary) / f"{name}.pt2"
                pt2e.save_program(_program(simulated, policy, task), programs[name])
            models = {name: (str(path.resolve()), f"{temporary}/{name}.pte") for name, path in programs.items()}
            load = f"{__name__}:load_lowered"
            returned, seconds = run_in_fresh_process(load, models, recording.calls, Path(temporary))
        outputs = replay(task, recording, returned)
        return compare(plan, task, recording, outputs, folder, seconds, layers, self.name)


def lower(program: str | Path, path: str | Path) -> None:
    """Lowers a program to a `.pte` file of one sample a batch, for ExecuTorch's portable kernels."""
    with quietly(*pt2e.LOGGERS, "executorch"):
        import executorch.kernels.quantized  # noqa: F401 - the operations that quantize
        from executorch.exir import to_edge_transform_and_lower

        free = pt2e.load_program(program)
        args, kwargs = _one_sample(free)
        fixed = torch.export.export(free.module(), args, kwargs)
        edge = to_edge_transform_and_lower(fixed)
        Path(path).write_bytes(edge.to_executorch().buffer)


def load_lowered(paths: tuple[str, str]) -> Callable[..., list[Tensor]]:
    """Lowers a program and loads it into ExecuTorch's runtime.

    Samples run one at a time, as on a device.

    Args:
        paths: Of the program, and of the `.pte` file to write.
    """
    lower(*paths)
    with quietly("executorch"):
        import executorch.kernels.quantized  # noqa: F401
        from executorch.runtime import Runtime, Verification

    method = Runtime.get().load_program(paths[1], verification=Verification.Minimal).load_method("forward")

    def run(*args: Any, **kwargs: Any) -> list[Tensor]:
        arguments = (*args, *kwargs.values())
        size = len(tensors_in(list(arguments))[0])
        returned = []
        for position in range(size):
            outputs = method.execute(tensors_in(list(_sample(arguments, position, size))))
            returned.append([output.clone() for output in outputs])  # the next run writes to the same memory
        return [torch.cat(parts) for parts in zip(*returned, strict=True)]

    return run


def _one_sample(program: Any) -> Any:
    """Returns zeros as positional and keyword arguments of a program, one for every size that is free."""
    names = set(program.graph_signature.user_inputs)
    known = [node.meta["val"] for node in program.graph.nodes if node.op == "placeholder" and node.name in names]
    shapes = [[size if isinstance(size, int) else 1 for size in like.shape] for like in known]
    leaves = [torch.zeros(shape, dtype=like.dtype) for shape, like in zip(shapes, known, strict=True)]
    return pytree.tree_unflatten(leaves, program.call_spec.in_spec)


def _sample(arguments: tuple[Any, ...], position: int, size: int) -> Any:
    def take(x: Any) -> Any:
        is_batch = isinstance(x, Tensor) and x.dim() and len(x) == size
        return x[position : position + 1].contiguous() if is_batch else x

    return pytree.tree_map(take, arguments)


def _program(simulated: QuantizedModel, policy: Mapping[str, Precision], task: Task) -> Any:
    codes = layer_codes(simulated, policy, torch.int8)
    return pt2e.quantized_program(simulated, policy, codes, task.example_input, _quantizer)


def _quantizer(configs: Mapping[str, Any]) -> Any:
    """Returns a quantizer that annotates the convolution or linear operation of every layer, by its exact name."""
    from torchao.quantization.pt2e.quantizer import QuantizationAnnotation, Quantizer

    class LayerQuantizer(Quantizer):  # type: ignore[misc]
        """Quantizes what layers read, and nothing else."""

        def annotate(self, model: Any) -> Any:
            for node in model.graph.nodes:
                config = next((configs[name] for name in pt2e.modules_of(node) if name in configs), None)
                if config is not None and pt2e.is_layer(node):
                    given = {node.args[0]: config.input_activation, node.args[1]: config.weight}
                    node.meta["quantization_annotation"] = QuantizationAnnotation(given, _annotated=True)
            return model

        def validate(self, model: Any) -> None:
            return None

    return LayerQuantizer()
