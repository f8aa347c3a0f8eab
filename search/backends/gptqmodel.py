"""The GPTQModel backend: `quantize_config.json`, by which GPTQModel gives every layer the plan's bits and groups.

GPTQModel finds scales and codes by GPTQ on calibration data of the user's, so ranges are its own. Its `dynamic` maps
patterns to settings: `+:` before one that quantizes, `-:` before one that skips, matched at the start of a module's
name. Every layer has one entry of its own, its escaped name between `^` and `$`. Read from GPTQModel 7.6.0:
`quantization/config.py` (`BaseQuantizeConfig`, `_extract_literal_regex_pattern`, `dynamic_get`), and
`nn_modules/qlinear/torch.py` for bits and group sizes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from hwmodels import Format, Layer, Precision
from search.backends.base import Emitter
from search.backends.huggingface import HEAD, own_integers, own_ranges, require_hugging_face
from search.backends.outcome import LayerExport
from search.errors import DataError, UnsupportedError
from search.files import write_json
from search.plan import Plan
from search.quiet import quietly
from search.tasks.task import Task

FILE = "quantize_config.json"
GROUPS = (16, 32, 64, 128, 256, 512, 1024)
PLANAR = {5, 6, 7}  # bits of the layout `gptq_p`


class Settings(BaseModel):
    """What an entry of `dynamic` gives a layer; nothing for one that is skipped."""

    model_config = ConfigDict(extra="forbid", strict=True)

    bits: int = Field(ge=2, le=8)
    group_size: int = Field(ge=-1)
    sym: bool


class Skipped(BaseModel):
    """The settings of a layer that is skipped."""

    model_config = ConfigDict(extra="forbid")


class QuantizeFile(BaseModel):
    """`quantize_config.json`, as far as it is written here."""

    model_config = ConfigDict(extra="forbid", strict=True)

    quant_method: Literal["gptq"]
    format: Literal["gptq", "gptq_p"]
    bits: int = Field(ge=2, le=8)
    group_size: int = Field(ge=-1)
    sym: bool
    desc_act: bool
    lm_head: bool
    dynamic: dict[str, Settings | Skipped]


class GPTQModel(Emitter):
    """Writes `quantize_config.json`, which GPTQModel quantizes the float model by."""

    name = "gptqmodel"
    proof = "validated"
    reason = "GPTQModel resolves every module to its own entry; its quantization was not run"
    packages = ("gptqmodel",)
    ranges = "own"
    usage = """
    from gptqmodel import GPTQModel, QuantizeConfig
    model = GPTQModel.load("the float model", QuantizeConfig.from_pretrained("this folder"))
    model.quantize(calibration_texts)
    model.save("quantized")
    """

    def takes(self, model: nn.Module) -> None:
        """Takes Hugging Face models alone."""
        require_hugging_face(model, self.name)

    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Linear layers get integers of 2 to 8 bits; inputs and everything else stay in float."""
        return own_ranges(layer, precision, Precision(own_integers(layer, precision.weight, GROUPS)), "GPTQModel")

    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes the configuration.

        Raises:
            UnsupportedError: If the model is no Hugging Face model, or a layer is one that GPTQModel never quantizes.
        """
        self.takes(task.model)
        layers = [self.express(plan.network[name], precision) for name, precision in plan.policy.items()]
        runs = {layer.name: Precision.parse(layer.runs or layer.precision).weight for layer in layers}
        quantized = {name: format for name, format in runs.items() if not format.is_float}
        refuse_tied_head(task.model, quantized, "GPTQModel")
        linear = (name for name, module in task.model.named_modules() if isinstance(module, nn.Linear))
        skipped = [name for name in dict.fromkeys((*runs, *linear)) if name not in quantized]
        dynamic: dict[str, Any] = {pattern(name, "-"): {} for name in skipped}
        dynamic |= {pattern(name, "+"): settings(format) for name, format in quantized.items()}
        formats = list(quantized.values())
        default = max(formats, key=formats.count) if formats else Format.parse("int4")
        layout = "gptq_p" if any(format.bits in PLANAR for format in formats) else "gptq"
        head = {"quant_method": "gptq", "format": layout, **settings(default)}
        write_json(folder / FILE, head | {"desc_act": False, "lm_head": HEAD in quantized, "dynamic": dynamic})
        return layers

    def read(self, folder: Path) -> Mapping[str, Precision]:
        """Reads the precisions of the layers that are quantized."""
        file = read_file(folder)
        found = {}
        for entry, given in file.dynamic.items():
            sign, name = entry[:2], unescape(entry[2:])
            if sign not in ("+:", "-:") or entry != pattern(name, sign[0]):
                raise DataError(f"{folder / FILE} has the entry {entry!r}, which is no exact name of a layer")
            if isinstance(given, Settings) != (sign == "+:"):
                raise DataError(f"{folder / FILE} has the entry {entry!r} with settings {given!r}")
            if isinstance(given, Settings):
                found[name] = Precision(format_of(given))
        return found

    def validate(self, plan: Plan, task: Task, folder: Path) -> tuple[str, tuple[str, ...]]:
        """Has `QuantizeConfig` read the file and asks it about every module, and GPTQModel which it quantizes."""
        with quietly("gptqmodel"):
            from gptqmodel import QuantizeConfig

            raw = json.loads((folder / FILE).read_text(encoding="utf-8"))
            config = QuantizeConfig.from_quant_config(raw | {"offload_to_disk": False})  # else it makes a folder
            said = self.read(folder)
            modules = [name for name, _ in task.model.named_modules()]
            skipped = {unescape(entry[2:]) for entry in read_file(folder).dynamic if entry.startswith("-:")}
            for name in modules:
                wanted = settings(said[name].weight) if name in said else False if name in skipped else None
                found = config.dynamic_get(name)
                if found != wanted:
                    raise UnsupportedError(f"GPTQModel gives {name} {found}, the files {wanted}")
            reached = _reached(task.model, config)
        unreached = [name for name in said if reached is not None and name not in reached]
        if unreached:
            raise UnsupportedError(
                f"GPTQModel never quantizes {unreached[0]} of {type(task.model).__name__}; pin it to float"
            )
        checks = [
            f"QuantizeConfig.from_quant_config reads {FILE}: {type(config).__name__}",
            f"dynamic_get gives each of {len(modules)} modules its own entry and no other",
        ]
        if reached is not None:
            checks.append(f"all {len(said)} quantized layers are among those GPTQModel quantizes in this architecture")
        return f"gptqmodel {version('gptqmodel')}", tuple(checks)


def pattern(name: str, sign: str) -> str:
    """Returns the key of a layer's own entry: `+` before one that is quantized, `-` before one that is skipped."""
    return f"{sign}:^{re.escape(name)}$"


def unescape(anchored: str) -> str:
    """Returns the name in a pattern, without its anchors and backslashes."""
    return re.sub(r"\\(.)", r"\1", anchored.removeprefix("^").removesuffix("$"))


def settings(format: Format) -> dict[str, Any]:
    """Returns GPTQModel's settings of a format that runs."""
    return {"bits": format.bits, "group_size": format.group or -1, "sym": not format.has_zero_point}


def format_of(given: Settings) -> Format:
    """The inverse of `settings`."""
    group = f"-g{given.group_size}" if given.group_size > 0 else ""
    return Format.parse(f"{'' if given.sym else 'u'}int{given.bits}{group}")


def read_file(folder: Path) -> QuantizeFile:
    """Reads `quantize_config.json`.

    Raises:
        DataError: If it does not keep to its schema.
    """
    try:
        return QuantizeFile.model_validate_json((folder / FILE).read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{folder / FILE} is no configuration of GPTQModel: {where}: {first['msg']}") from error


def refuse_tied_head(model: nn.Module, quantized: Mapping[str, Format], who: str) -> None:
    """Raises UnsupportedError where the output layer is to be quantized and its weight is the embedding's."""
    tied = bool(getattr(getattr(model, "config", None), "tie_word_embeddings", False))
    if tied and HEAD in quantized:
        raise UnsupportedError(
            f"{who} does not quantize {HEAD}, whose weight is the embedding's in {type(model).__name__}; "
            f"search with space.pins.{HEAD}=float"
        )


def _reached(model: Any, config: Any) -> set[str] | None:
    """The modules that GPTQModel quantizes in an architecture; None where it is not among those it knows."""
    from gptqmodel.models.auto import MODEL_MAP

    definition = MODEL_MAP.get(model.config.model_type)
    if definition is None:
        return None
    inner = {name for block in definition.simple_layer_modules(model.config, config) for name in block}
    prefixes = tuple(f"{prefix}." for prefix in definition.extract_layers_node())
    found = {HEAD} if config.lm_head else set()
    for name, _ in model.named_modules():
        for prefix in prefixes:
            if name.startswith(prefix) and name.removeprefix(prefix).partition(".")[2] in inner:
                found.add(name)
    return found
