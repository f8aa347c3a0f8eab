"""From Hydra's configuration to a job: the schema, what it builds, and errors in the words of the config."""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hwmodels import CostModel, Roofline, Workload, list_devices
from search.backends import BACKENDS
from search.budget import Budget
from search.errors import BitplanError, ConfigError, closest, one_line
from search.job import ExportSettings, Job, RecoverSettings, SpaceSettings, settings
from search.quality.racing import Racing
from search.quantize.settings import QuantizerSettings
from search.sensitivity.settings import SensitivitySettings
from search.strategies.base import Strategy
from search.tasks.task import Task
from search.tracking.settings import TrackingSettings

WORDS = {"Integer": "a whole number", "Float": "a number", "bool": "true or false"}
"""What messages call the types that OmegaConf names in its own."""


def config_dir() -> Path:
    """The folder of the Hydra groups: beside the code in an installed package, at the top level in a checkout."""
    here = Path(__file__).parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


@dataclasses.dataclass(frozen=True)
class RacingSettings(Racing):
    """How races are run, and whether; see `search.quality.racing.Racing`."""

    enabled: bool = True


@dataclasses.dataclass(frozen=True)
class Config:
    """Every key of the configuration; `task`, `hardware` and `strategy` hold a `_target_` and its arguments."""

    task: Any
    hardware: Any
    strategy: Any
    space: SpaceSettings
    budget: Budget
    quantizer: QuantizerSettings
    sensitivity: SensitivitySettings
    racing: RacingSettings
    recover: RecoverSettings
    tracking: TrackingSettings
    export: ExportSettings
    workload: Workload
    seed: int
    workers: int
    study: str | None
    run_root: str
    run_dir: str


def schema(record: type) -> type:
    """Returns a writable twin of a frozen dataclass, as OmegaConf needs it, nested records included."""
    hints = typing.get_type_hints(record)
    fields: list[Any] = []
    for item in dataclasses.fields(record):
        kind = hints[item.name]
        if dataclasses.is_dataclass(kind):
            twin = schema(typing.cast(type, kind))
            fields.append((item.name, twin, dataclasses.field(default_factory=twin)))
        elif type(None) in typing.get_args(kind) and any(map(typing.get_origin, typing.get_args(kind))):
            fields.append((item.name, Any, None))  # OmegaConf cannot fill a typed container that is null; we check it
        elif item.default is not dataclasses.MISSING:
            fields.append((item.name, kind, item.default))
        elif item.default_factory is not dataclasses.MISSING:
            fields.append((item.name, kind, dataclasses.field(default_factory=item.default_factory)))
        else:
            fields.append((item.name, kind, "???"))
    return dataclasses.make_dataclass(record.__name__, fields)


def register() -> None:
    """Tells Hydra the schema, and OmegaConf the resolver of the default limit."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    ConfigStore.instance().store("base_config", schema(Config))
    for name in BACKENDS:
        ConfigStore.instance().store(name, {"backends": [name]}, group="export")
    for device in list_devices():
        node = {"_target_": "hwmodels.Roofline", "device": device}
        ConfigStore.instance().store(device, node, group="hardware")
    OmegaConf.register_new_resolver("unless_other_limits", _unless_other_limits, replace=True)


def _unless_other_limits(default: float, *, _node_: Any, _parent_: Any) -> float | None:
    """The default limit, or None where the budget sets a limit itself."""
    own = _node_._key()
    others = [key for key in _parent_ if key not in (own, "reference")]
    return default if all(_parent_[key] is None for key in others) else None


def build(node: Any, kind: type, key: str) -> Any:
    """Calls the `_target_` of a config node and checks what comes back; the only place that instantiates.

    Raises:
        ConfigError: If the target cannot be imported or called like this, or returns something else.
    """
    from hydra.errors import HydraException
    from hydra.utils import instantiate

    try:
        built = instantiate(node, _convert_="all")
    except HydraException as error:
        unlocated = re.match(r"Error locating target '([^']*)'", str(error))
        cause: BaseException = error
        while isinstance(cause, HydraException) and cause.__cause__:  # it wraps what a target raises, once per level
            cause = cause.__cause__
        if isinstance(cause, BitplanError):
            raise cause from error
        if unlocated:
            raise ConfigError(f"{key}: {_unlocated(unlocated[1], cause)}") from error
        if isinstance(cause, (ValueError, OSError)):
            raise ConfigError(f"{key}: {one_line(cause)}") from error
        if isinstance(cause, (TypeError, ImportError, AttributeError)):
            raise ConfigError(f"{key}: {node.get('_target_')} cannot be built: {one_line(cause)}") from error
        raise
    if not isinstance(built, kind):
        raise ConfigError(
            f"{key}._target_={node.get('_target_')} made a {type(built).__name__}; it must be a {kind.__name__}"
        )
    return built


def _unlocated(target: str, error: BaseException) -> str:
    """Says why a target was not found: the part of its name that is not there, or what its module failed with."""
    cause = error.__cause__ or error
    missing = cause.name if isinstance(cause, ModuleNotFoundError) and cause.name else ""
    if not missing or not f"{target}.".startswith(f"{missing}."):
        return f"{target} cannot be imported: {one_line(cause)}"
    parent, _, name = missing.rpartition(".")
    if not parent:
        return f"{target} cannot be found: there is no module {name}"
    known = [other for other in dir(sys.modules[parent]) if not other.startswith("_")]
    return f"{target} cannot be found: {parent} has no {name}{closest(name, known) or '; it has ' + ', '.join(known)}"


def named_strategy(name: str, given: Mapping[str, Any]) -> Strategy:
    """Builds a strategy of `configs/strategy` outside a composed configuration.

    Args:
        name: The strategy's name.
        given: Settings that differ from the file's.

    Raises:
        ConfigError: If there is no such strategy or setting, or a value is not allowed.
    """
    return typing.cast(Strategy, _named("strategy", Strategy, name, given))


def named_hardware(name: str, given: Mapping[str, Any] | None = None) -> CostModel:
    """Builds a cost model outside a composed configuration.

    Args:
        name: A device, an option of `configs/hardware`, or the path of a device file, which ends in .yaml.
        given: Settings that differ from the option's file.

    Raises:
        ConfigError: If there is no such device, option, file or setting, or a value is not allowed.
    """
    if name in list_devices() or name.endswith((".yaml", ".yml")):
        try:
            return Roofline(name)
        except ValueError as error:
            raise ConfigError(f"hardware: {error}") from error
    return typing.cast(CostModel, _named("hardware", CostModel, name, given or {}, list_devices()))


def _named(group: str, kind: type, name: str, given: Mapping[str, Any], others: Sequence[str] = ()) -> Any:
    """Builds what an option's file says; `others` are further names for the message."""
    import yaml
    from omegaconf import OmegaConf

    folder = config_dir() / group
    names = sorted(file.stem for file in folder.glob("*.yaml") if file.stem != "custom")  # which names no class
    if name not in names:
        known = [*names, *others]
        raise ConfigError(f"{group}={name} is unknown{closest(name, known)}; allowed: {', '.join(known)}")
    node = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    for base in node.pop("defaults", []):
        node = yaml.safe_load((folder / f"{base}.yaml").read_text(encoding="utf-8")) | node
    for key in given:
        if key not in node:
            allowed = [known for known in node if known != "_target_"]
            raise ConfigError(f"{group}.{key} is no setting{closest(key, allowed)}; allowed: {', '.join(allowed)}")
    return build(OmegaConf.create(node | dict(given)), kind, group)


def plain(config: Any) -> dict[str, Any]:
    """Resolves an OmegaConf configuration to plain containers, without Hydra's own part."""
    from omegaconf import OmegaConf

    resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items() if key != "hydra"}


def make_job(config: Any, run_dir: Path) -> Job:
    """Builds a job from a composed configuration.

    Raises:
        ConfigError: If a value is out of range or a target cannot be built.
    """
    from omegaconf import OmegaConf

    missing = sorted(OmegaConf.missing_keys(config))
    if missing:
        raise ConfigError(f"{missing[0]} has no value; set it with {missing[0]}=VALUE")
    values = plain(config)
    known = [item.name for item in dataclasses.fields(Config)]
    for key in values:
        if key not in known:
            raise ConfigError(f"{key} is no setting{closest(key, known)}; allowed: {', '.join(known)}")
    racing = settings(RacingSettings, values["racing"], "racing")
    return Job(
        strategy=build(config.strategy, Strategy, "strategy"),
        cost_model=build(config.hardware, CostModel, "hardware"),
        budget=settings(Budget, values["budget"], "budget"),
        space=settings(SpaceSettings, values["space"], "space"),
        quantizer=settings(QuantizerSettings, values["quantizer"], "quantizer"),
        sensitivity=settings(SensitivitySettings, values["sensitivity"], "sensitivity"),
        workload=settings(Workload, values["workload"], "workload"),
        task=build(config.task, Task, "task"),
        racing=racing if racing.enabled else None,
        recover=settings(RecoverSettings, values["recover"], "recover"),
        export=settings(ExportSettings, values["export"], "export"),
        seed=values["seed"],
        workers=values["workers"],
        study=values["study"],
        run_dir=run_dir,
        store=Path(values["run_root"]),
        config=values,
    )


def compose(overrides: Sequence[str] = ()) -> Any:
    """Composes the configuration outside a Hydra application."""
    import hydra

    register()
    with hydra.initialize_config_dir(str(config_dir().resolve()), version_base="1.3"):
        return hydra.compose("config", spelt_out(overrides))


def spelt_out(overrides: Sequence[str]) -> list[str]:
    """Writes short forms as Hydra takes them.

    `hardware=PATH.yaml` is the roofline of that device file; of several, for a sweep, some may be names. `export=[A,B]`
    means both, where Hydra would take the last.
    """
    spelt: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        devices = value.split(",")
        is_file = [device.endswith((".yaml", ".yml")) for device in devices]
        known = [file or device in list_devices() for file, device in zip(is_file, devices, strict=True)]
        if key == "hardware" and any(is_file) and all(known):
            quoted = ("'" + device.replace("'", r"\'") + "'" for device in devices)  # paths may hold any character
            spelt += ["hardware=roofline", f"hardware.device={','.join(quoted)}"]
        elif key == "export" and value.startswith("["):
            spelt.append(f"export.backends={value}")
        else:
            spelt.append(override)
    return spelt


def explain(error: Exception) -> str:
    """Says what is wrong with a configuration that Hydra refused, naming the closest key or option."""
    text = str(error)
    cause = error.__cause__
    while cause:
        text, cause = f"{text}\n{cause}", cause.__cause__
    unknown_key = re.search(r"Could not override '([^']+)'|Key '([^']+)' (?:is )?not in", text)
    if unknown_key and "not in" in text:
        key = unknown_key[1] or unknown_key[2]
        known = _known_keys()
        entry = re.search(r"Key '([^']+)' is not in struct", text)
        if key in known and entry:
            return f"{key} has no entry {entry[1]}; add it with +{key}.{entry[1]}=VALUE"
        parent = key.rpartition(".")[0]
        siblings = [name for name in known if name.rpartition(".")[0] == parent]
        allowed = f"; allowed: {', '.join(siblings)}" if siblings else ""
        return f"{key} is no setting{closest(key, known)}{allowed}"
    empty = re.search(r"field '([^']+)' is not Optional", text)
    if empty:
        return f"{empty[1]}=null must have a value"
    value = re.search(
        r"Value '(.*?)' (?:of type '\w+' could not be converted to|is not a valid) (Integer|Float|bool)\b", text
    )
    place = re.search(r"full_key: (\S+)", text)
    if value and place:
        return f"{place[1]}={value[1]} must be {WORDS[value[2]]}"
    option = re.search(r"Could not find '([^']+)/([^'/]+)'\s+Available options in '[^']+':((?:\n\t[^\n]+)+)", text)
    if option:
        options = option[3].split()
        return f"{option[1]}={option[2]} is unknown{closest(option[2], options)}; allowed: {', '.join(options)}"
    group = re.search(r"Could not override '([^']+)'.\s*No match in the defaults list", text)
    if group:
        return f"{group[1]} is no setting and no group{closest(group[1], _known_keys())}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(
        line for line in dict.fromkeys(lines) if not line.startswith(("full_key", "object_type", "reference_type"))
    )


def _known_keys() -> list[str]:
    from omegaconf import OmegaConf

    def walk(tree: Mapping[str, Any], prefix: str) -> list[str]:
        keys = []
        for key, value in tree.items():
            keys.append(f"{prefix}{key}")
            if isinstance(value, Mapping):
                keys += walk(value, f"{prefix}{key}.")
        return keys

    composed = OmegaConf.to_container(compose(), resolve=False)
    return [*walk(typing.cast(Mapping[str, Any], composed), ""), "experiment", "task.model", "task.root"]
