"""Names on the command line to what they stand for: devices and other cost models, and the networks of tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hwmodels import CostModel, Device, Network, Roofline, Workload, at_workload, list_devices, load_device
from hwmodels.device import FOLDER
from search.config import build, compose, config_dir, explain
from search.errors import ConfigError, closest
from search.hardware.compare import Listing, Option
from search.job import settings
from search.tasks.task import Task

NOT_LISTED = ("custom",)  # which names no class


def listing() -> Listing:
    """Reads every device file that comes with the package, and the configuration's other cost models."""
    devices, broken = [], {}
    for name in list_devices():
        try:
            devices.append(load_device(name))
        except ValueError as error:
            broken[name] = str(error).removeprefix(f"{FOLDER}/")
    options = (_option(file) for file in sorted((config_dir() / "hardware").glob("*.yaml")))
    return Listing(tuple(devices), broken, tuple(one for one in options if one is not None))


def find_target(name: str) -> Device | Option:
    """The device or other cost model of a name, or the device of a YAML file.

    Raises:
        ConfigError: If there is none, or its file is not valid.
    """
    options = {one.name: one for one in map(_option, (config_dir() / "hardware").glob("*.yaml")) if one is not None}
    if name in options:
        return options[name]
    is_file = Path(name).suffix in (".yaml", ".yml")
    if not is_file and name not in list_devices():
        near = closest(name, (*list_devices(), *options))
        raise ConfigError(f"no device {name!r}{near}; `bitplan hardware list` names all; a .yaml path loads your own")
    try:
        return load_device(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def cost_model(name: str) -> CostModel:
    """The cost model of a device or of an option of the configuration.

    Raises:
        ConfigError: If there is none, or it cannot be built by its name alone.
    """
    found = find_target(name)
    if isinstance(found, Device):
        return Roofline(found)
    missing = [key for key, value in found.settings.items() if value == "???"]
    if missing:
        raise ConfigError(f"hardware={name} needs {', '.join(missing)}; it cannot be compared by its name alone")
    model: CostModel = build(_compose([f"hardware={name}"]).hardware, CostModel, "hardware")
    return model


def read_task(task: str, overrides: Sequence[str] = ()) -> Task:
    """A task of the configuration.

    Args:
        task: Its name.
        overrides: Its settings, `task.KEY=VALUE`.

    Raises:
        ConfigError: If there is no such task or setting.
    """
    for override in overrides:
        if not override.startswith("task.") or "=" not in override:
            raise ConfigError(f"{override!r} is no task setting; allowed: task.KEY=VALUE")
    built: Task = build(_compose([f"task={task}", *overrides]).task, Task, "task")
    return built


def network_of(task: Task, workload: Workload | None = None) -> Network:
    """The network of a task as a search prices it: batch norms folded, at the workload's tokens.

    Raises:
        ConfigError: If the workload asks for tokens and the network reads none.
    """
    from search.quantize.fold import fold_batch_norm
    from search.trace import trace

    network = trace(fold_batch_norm(task.model, task.example_input).model, task.example_input)
    try:
        return at_workload(network, workload or Workload())
    except ValueError as error:
        raise ConfigError(str(error)) from error


def workload_for(
    model: CostModel,
    batch: int | None = None,
    threads: int | None = None,
    tokens: int | None = None,
    context: int | None = None,
) -> Workload:
    """What a target is asked to do; without `threads` it uses as many as it has figures for.

    Raises:
        ConfigError: If a number is below 1, or the device has no figures for so many threads.
    """
    device = model.device if isinstance(model, Roofline) else None
    if threads is None and device is not None and device.threads:
        threads = device.threads[-1]
    asked = {"batch": batch, "threads": threads, "tokens": tokens, "context": context}
    found = settings(Workload, {key: value for key, value in asked.items() if value is not None}, "workload")
    if device is not None:
        try:
            device.check_threads(found.threads)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return found


def _option(file: Path) -> Option | None:
    """The cost model that a file of `configs/hardware` names; None for rooflines, which their devices stand for."""
    import yaml

    node = yaml.safe_load(file.read_text(encoding="utf-8"))
    target = str(node.pop("_target_", ""))
    if file.stem in NOT_LISTED or target.rpartition(".")[2] == Roofline.__name__:
        return None
    return Option(file.stem, target, _summary(target), node)


def _summary(target: str) -> str:
    """The first sentence of a class's docstring; empty where an extra that it needs is not installed."""
    from importlib import import_module

    module, _, name = target.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except ImportError:
        return ""
    return (found.__doc__ or "").strip().partition("\n")[0]


def _compose(overrides: Sequence[str]) -> Any:
    """Composes the configuration; what Hydra refuses is said in the words of the config."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    try:
        return compose(overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(explain(error)) from error
