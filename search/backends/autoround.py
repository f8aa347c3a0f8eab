"""The auto-round backend: `layer_config.json`, which AutoRound takes as its `layer_config`.

AutoRound learns the rounding and the range of every weight on calibration data of the user's, so ranges are its own.
An entry whose key is the name of a layer is that layer's alone; layers that stay in float have one too, since
AutoRound's `scheme` would quantize them. Read from auto-round 0.16.1: `compressors/layer_config_resolver.py` (names,
8 bits with a zero point refused, sizes that 32 does not divide left in float, an output layer that shares its weight
left out) and `schemes.py` (`QuantizationScheme`, the preset `INT8`).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn

from hwmodels import FLOAT, Format, Layer, Precision
from search.backends.base import Emitter
from search.backends.gptqmodel import refuse_tied_head
from search.backends.huggingface import own_integers, own_ranges, require_hugging_face
from search.backends.outcome import LayerExport
from search.errors import DataError, UnsupportedError
from search.files import write_json
from search.plan import Plan
from search.quiet import quietly
from search.tasks.task import Task

FILE = "layer_config.json"
GROUPS = range(16, 1025, 16)
MULTIPLE = 32  # of both sizes of a weight that is quantized
SKIPPED = {"bits": 16, "act_bits": 16, "data_type": "float", "act_data_type": "float"}
DYNAMIC = {"act_bits": 8, "act_data_type": "int", "act_group_size": -1, "act_dynamic": True, "act_sym": True}
INT8, TOKENS = Format.parse("int8"), Format.parse("int8-token")


class LayerConfig(BaseModel):
    """An entry of `layer_config`: fields of auto-round's `QuantizationScheme`."""

    model_config = ConfigDict(extra="forbid", strict=True)

    bits: int = Field(ge=2, le=16)
    act_bits: int = Field(ge=8, le=16)
    data_type: Literal["int", "float"]
    act_data_type: Literal["int", "float"] = "float"
    group_size: int = Field(default=-1, ge=-1)
    sym: bool = True
    act_group_size: int | None = None
    act_dynamic: bool | None = None
    act_sym: bool | None = None


class AutoRound(Emitter):
    """Writes `layer_config.json`, which AutoRound quantizes the float model by."""

    name = "auto-round"
    proof = "validated"
    reason = "AutoRound resolves every layer to its own entry, and a small Llama was tuned for a step"
    packages = ("auto-round",)
    ranges = "own"
    usage = """
    import json; from auto_round import AutoRound  # and the float model with its tokenizer
    layers = json.load(open("this folder/layer_config.json"))
    AutoRound(model, tokenizer=tokenizer, layer_config=layers).quantize_and_save("quantized", format="auto_round")
    """

    def takes(self, model: nn.Module) -> None:
        """Takes Hugging Face models alone."""
        require_hugging_face(model, self.name)

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Linear layers get integers of 2 to 8 bits, rows of int8 also int8 inputs; everything else stays in float."""
        weight = own_integers(layer, precision.weight, GROUPS)
        if weight.is_float or any(size % MULTIPLE for size in layer.weight_shape):
            return own_ranges(layer, precision, Precision(FLOAT), "AutoRound")
        if weight.bits == 8 and weight.has_zero_point:
            weight = Format(8, granularity=weight.granularity, group=weight.group)
        input_ = TOKENS if weight == INT8 and precision.input == TOKENS else FLOAT
        return own_ranges(layer, precision, Precision(weight, input_), "AutoRound")

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes the configuration.

        Raises:
            UnsupportedError: If the model is no Hugging Face model, or its output layer is the embedding.
        """
        self.takes(task.model)
        layers = [self.express(plan.network[name], precision) for name, precision in plan.policy.items()]
        runs = {layer.name: Precision.parse(layer.runs or layer.precision) for layer in layers}
        quantized = {name: found.weight for name, found in runs.items() if not found.weight.is_float}
        refuse_tied_head(task.model, quantized, "AutoRound")
        linear = [name for name, module in task.model.named_modules() if isinstance(module, nn.Linear)]
        write_json(folder / FILE, {name: entry(runs.get(name, Precision())) for name in linear})
        return layers

    def read(self, folder: Path) -> Mapping[str, Precision]:
        """Reads the precisions of the layers that are quantized."""
        return {
            name: found for name, given in read_file(folder).items() if not (found := _precision(given)).weight.is_float
        }

    def validate(self, plan: Plan, task: Task, folder: Path) -> tuple[str, tuple[str, ...]]:
        """Has AutoRound resolve the configuration for the model, as it does before it quantizes."""
        given = json.loads((folder / FILE).read_text(encoding="utf-8"))
        resolved = resolve(task.model, given)
        for name, settings in given.items():
            found = {key: resolved.get(name, {}).get(key) for key in settings}
            if found != settings:
                raise UnsupportedError(f"AutoRound gives {name} {found}, the files {settings}")
        unknown = [name for name in resolved if name not in given]
        if unknown:
            raise UnsupportedError(f"AutoRound would also quantize {unknown[0]}, of which the files say nothing")
        checks = (
            "AutoRound's resolver accepts every entry for this model",
            f"each of {len(given)} linear layers gets what its own entry says, beside scheme W4A16",
        )
        return f"auto-round {version('auto-round')}", checks


def entry(precision: Precision) -> dict[str, Any]:
    """Returns the entry of a layer in a precision that runs."""
    weight = precision.weight
    if weight.is_float:
        return dict(SKIPPED)
    inputs = {"act_bits": 16} if precision.input.is_float else DYNAMIC
    return {
        "bits": weight.bits,
        "group_size": weight.group or -1,
        "sym": not weight.has_zero_point,
        "data_type": "int",
    } | inputs


def resolve(model: nn.Module, config: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Returns what AutoRound makes of a `layer_config` for a model, layer by layer, beside its scheme `W4A16`.

    Raises:
        UnsupportedError: If it refuses an entry.
    """
    with quietly("autoround", "auto_round", "torch"):
        from auto_round.compressors.utils import set_layer_config
        from auto_round.schemes import preset_name_to_scheme
        from auto_round.utils import INNER_SUPPORTED_LAYER_TYPES, SUPPORTED_LAYER_TYPES

        try:
            found, _, patterns = set_layer_config(
                copy.deepcopy(model),
                copy.deepcopy(dict(config)),
                preset_name_to_scheme("W4A16"),
                "fp16",
                SUPPORTED_LAYER_TYPES,
                INNER_SUPPORTED_LAYER_TYPES,
            )
        except (ValueError, TypeError) as error:
            raise UnsupportedError(f"AutoRound refuses the configuration: {error}") from error
    if patterns:
        raise UnsupportedError(f"AutoRound takes {next(iter(patterns))} for a pattern, not for a layer")
    return {name: dict(settings) for name, settings in found.items()}


def read_file(folder: Path) -> dict[str, LayerConfig]:
    """Reads `layer_config.json`.

    Raises:
        DataError: If it does not keep to its schema.
    """
    try:
        return TypeAdapter(dict[str, LayerConfig]).validate_json((folder / FILE).read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{folder / FILE} is no layer_config of AutoRound: {where}: {first['msg']}") from error


def _precision(given: LayerConfig) -> Precision:
    if given.bits == 16:
        return Precision()
    group = f"-g{given.group_size}" if given.group_size > 0 else ""
    weight = Format.parse(f"{'' if given.sym else 'u'}int{given.bits}{group}")
    return Precision(weight, TOKENS if given.act_bits == 8 else FLOAT)
