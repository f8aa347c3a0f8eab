"""The vLLM backend: the checkpoint of compressed-tensors, kept to what vLLM's kernels take.

vLLM runs some layers as one (query, key and value projections; gate and up projections), which then share one way of
storing; and it has kernels for few formats. Both are known before a search. Read from vLLM 0.33.0 (`model_executor/`):

* `layers/quantization/compressed_tensors/compressed_tensors.py`: which combinations have a scheme at all
* `layers/quantization/utils/marlin_utils.py`: weight-only kernels of every CUDA device from compute capability 7.5:
  4 and 8 bits without zero points, 4 bits with, groups of 32, 64 or 128, or one scale per row
* `kernels/linear/scaled_mm/cutlass.py` and `_custom_ops.py`: int8 times int8, inputs static per tensor, without the
  zero points that it rounds anew, or per token by `max / 127`
* `.../schemes/compressed_tensors_w8a8_fp8.py`: e4m3 times e4m3, likewise
* `.../schemes/compressed_tensors_wNa8.py`: weights of other widths beside int8 inputs fall to the weight-only kernels,
  which leave the input in float
* `models/*.py`, `packed_modules_mapping`: which layers run as one; `models/llama.py` gives its embedding no name, so
  that a quantized one would not be found
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hwmodels import FLOAT, Format, Layer, Network, Precision
from search.backends.compressed_tensors import (
    BYTES,
    FLOATS,
    PACKED,
    Arguments,
    CompressedTensors,
    input_arguments,
    read_config,
    weight_arguments,
)
from search.backends.huggingface import load_checkpoint
from search.backends.outcome import LayerExport, Validation
from search.backends.torch_process import run_in_fresh_process
from search.errors import UnsupportedError
from search.plan import Plan
from search.tasks.task import Task

FUSED = (
    ("q_proj", "k_proj", "v_proj"),
    ("gate_proj", "up_proj"),
    ("wq", "wk", "wv"),
    ("w1", "w3"),
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"),
    ("in_proj_b", "in_proj_a"),
    ("fc1", "fc3"),
    ("c_fc_0", "c_fc_1"),
)
"""Names of layers within one module that vLLM 0.33.0 runs as one, from the models' `packed_modules_mapping`."""

GROUPS = (32, 64, 128)
INT8, FP8 = Format.parse("int8-token"), Format.parse("fp8_e4m3-token")
INT8_INPUTS = {INT8, Format.parse("int8-full"), Format.parse("int8-full-tensor")}
FP8_INPUTS = {FP8, Format.parse("fp8_e4m3"), Format.parse("fp8_e4m3-tensor")}


class VLLM(CompressedTensors):
    """Writes a checkpoint that vLLM serves; transformers reads the same one."""

    name = "vllm"
    proof = "validated"
    reason = "transformers loads the checkpoint, and vLLM's rules hold; vLLM needs a GPU and another torch"
    usage = """
    vllm serve "this folder"  # on a CUDA device; 16-bit, where it keeps the scales of packed weights in that type too
    from vllm import LLM
    print(LLM("this folder").generate("Once upon a time"))
    """

    def ties(self, network: Network) -> list[list[str]]:
        """Lists the layers that vLLM runs as one."""
        return fused(network.names)

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Keeps 4 and 8 bits in groups or rows, int8 and e4m3 with inputs; stores other weights wider, or as values."""
        said = super().express(layer, precision)
        scheme = self.scheme(layer, Precision.parse(said.runs or said.precision))
        if scheme is None or scheme.inputs is None:
            return replace(said, compute="fp16")
        return replace(said, compute="int8" if scheme.format == BYTES else "fp8")

    def weight_arguments(self, layer: Layer, precision: Precision) -> Arguments | None:
        """Returns how the codes of a weight are stored; None where no kernel takes them."""
        found = weight_arguments(layer, precision.weight) if layer.kind == "linear" else None
        if found is None:
            return None
        if found["strategy"] == "tensor":
            found["strategy"] = "channel"  # which fused layers keep as they are
        is_row = found["strategy"] == "channel"
        if found["type"] == "float":
            return found if is_row else None
        if is_row and found["symmetric"] and found["num_bits"] <= 8 and precision.input in INT8_INPUTS:
            return found | {"num_bits": 8}
        width = 4 if found["num_bits"] <= 4 else 8
        has_kernel = found["num_bits"] <= 8 and (found["symmetric"] or width == 4)
        return found | {"num_bits": width} if has_kernel and (is_row or found["group_size"] in GROUPS) else None

    def running_input(self, layer: Layer, precision: Precision) -> Format:
        """Inputs are quantized beside rows of int8 or e4m3 only, per token or under one static scale."""
        weight = weight_arguments(layer, precision.weight)
        if layer.kind != "linear" or weight is None or weight["strategy"] == "group" or not weight["symmetric"]:
            return FLOAT
        if weight["type"] == "float":
            is_like, kept, otherwise = precision.input.grid == "minifloat", FP8_INPUTS, FP8
        else:
            is_like, kept, otherwise = precision.input.grid == "int", INT8_INPUTS, INT8
            is_like = is_like and weight["num_bits"] <= 8
        if not is_like or precision.input.bits > 8 or precision.input.scale != "fp32":
            return FLOAT
        return precision.input if precision.input in kept else otherwise

    def weight_note(self, layer: Layer, precision: Precision) -> str:
        """Says why a weight is not stored as codes."""
        if layer.kind == "embedding":
            return (
                "vLLM does not find the codes of every model's embedding: its values are stored as float32; "
                f"pin it with 'space.pins={{{layer.name}: float}}'"
            )
        return f"vLLM has no kernel for {precision.weight} weights of {layer.kind}: its values are stored as float32"

    def input_note(self, precision: Precision, running: Format) -> str:
        """Says why an input does not run as planned."""
        if running.is_float:
            return f"vLLM has no kernel for {precision} on both sides: the input stays in float"
        kinds = "int8-token and int8-full" if running == INT8 else "fp8_e4m3 and fp8_e4m3-token"
        return f"vLLM's kernels take {kinds} inputs here, not {precision.input}: it runs as {running}"

    def layout(self, layer: Layer, weights: Arguments, inputs: Arguments | None) -> str:
        """Codes are packed, but for those whose inputs are quantized too."""
        return FLOATS if weights["type"] == "float" else BYTES if inputs else PACKED

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes the checkpoint.

        Raises:
            UnsupportedError: If layers that vLLM runs as one have different precisions, or the model cannot be written.
        """
        layers = super().write(plan, task, folder, recalibrate)
        runs = {layer.name: layer.runs or layer.precision for layer in layers}
        for tie in fused(runs):
            if len({runs[name] for name in tie}) > 1:
                found = ", ".join(f"{name.rpartition('.')[2]} in {runs[name]}" for name in tie)
                raise UnsupportedError(
                    f"vLLM runs {tie[0]} and its siblings as one layer, but they run {found}; search with export=vllm"
                )
        check_rules(read_config(folder))
        return layers

    def check(self, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...]) -> Validation:
        """Has transformers load the checkpoint and run one batch, and checks vLLM's rules on what the files say.

        vLLM itself is not run: it needs a CUDA device, and pins other versions of torch and transformers.
        """
        config = read_config(folder)
        check_rules(config)
        batch = next(iter(task.batches("report")))
        with tempfile.TemporaryDirectory() as temporary:
            load = f"{load_checkpoint.__module__}:{load_checkpoint.__name__}"
            call: tuple[tuple[Any, ...], dict[str, Any]] = ((task.inputs(batch),), {})
            returned, _ = run_in_fresh_process(load, {"plan": str(folder.resolve())}, [call], Path(temporary))
        if not returned[0][0].isfinite().all():
            raise UnsupportedError(f"the model in {folder} returns NaN or infinite values")
        checks = (
            "a fresh process loads it in transformers, no tensor missing or left over, and runs a batch",
            f"all {len(config.get('config_groups', {}))} ways of storing have a scheme and a kernel in vLLM 0.33.0",
            "layers that vLLM runs as one are stored alike",
        )
        by = f"compressed-tensors {version('compressed-tensors')}, transformers {version('transformers')}"
        return Validation(self.name, "validated", by, checks, layers)


def fused(names: Iterable[str]) -> list[list[str]]:
    """Returns the groups of two or more layers among `names` that vLLM runs as one."""
    siblings: defaultdict[tuple[str, int], list[str]] = defaultdict(list)
    for name in names:
        parent, _, last = name.rpartition(".")
        for index, group in enumerate(FUSED):
            if last in group:
                siblings[parent, index].append(name)
    return [group for group in siblings.values() if len(group) > 1]


def check_rules(config: Mapping[str, Any]) -> None:
    """Checks what a checkpoint says against vLLM's rules, group by group.

    Raises:
        UnsupportedError: If vLLM has no scheme or kernel for a group, or layers that it runs as one are in different
            groups.
    """
    group_of = {target: "" for target in config.get("ignore", [])}
    for name, group in config.get("config_groups", {}).items():
        if (why := _refused(group["weights"], group["input_activations"], group["format"])) is not None:
            raise UnsupportedError(f"vLLM has no kernel for {name}, the layer {group['targets'][0]}: {why}")
        group_of |= dict.fromkeys(group["targets"], name)
    for tie in fused(group_of):
        if len({group_of[name] for name in tie}) > 1:
            raise UnsupportedError(f"vLLM runs {' and '.join(tie)} as one layer, but they are stored differently")


def _refused(weights: Arguments, inputs: Arguments | None, format: str) -> str | None:
    """Why there is no kernel; None if there is one."""
    bits, group = weights["num_bits"], weights.get("group_size")
    if weights["strategy"] not in ("channel", "group") or (group is not None and group not in GROUPS):
        return f"scales per {weights['strategy']} of {group}"
    if inputs is None and format == PACKED and weights["type"] == "int":
        return (
            None if bits == 4 or (bits == 8 and weights["symmetric"]) else f"{bits}-bit weights with these zero points"
        )
    kind, allowed = (INT8_INPUTS, BYTES) if weights["type"] == "int" else (FP8_INPUTS, FLOATS)
    is_known = inputs is None or inputs in [input_arguments(one) for one in kind]
    is_right = bits == 8 and weights["symmetric"] and group is None and format == allowed
    return None if is_known and is_right and (inputs or format == FLOATS) else f"{weights} beside {inputs} in {format}"
