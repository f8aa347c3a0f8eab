"""Backends: what carries a plan into the runtime that executes it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple

from search.errors import ConfigError, UnsupportedError, closest

if TYPE_CHECKING:
    from search.backends.base import Backend

__all__ = ["BACKENDS", "backend"]


class Entry(NamedTuple):
    """Where a backend lives, and what it needs; the extra that installs it has the backend's name.

    Attributes:
        module: Its module.
        type: Its class.
        writing: Packages, by their import names, that exporting needs.
        checking: Packages that verifying needs besides.
    """

    module: str
    type: str
    writing: tuple[str, ...] = ()
    checking: tuple[str, ...] = ()


BACKENDS: dict[str, Entry] = {
    "onnxruntime": Entry("search.backends.onnxruntime", "OnnxRuntime", ("onnx", "onnxscript", "onnxruntime")),
    "torchao": Entry("search.backends.torchao", "TorchAO", ("torchao",)),
}


def backend(name: str, use: Literal["plan", "export", "verify"] = "export") -> Backend:
    """Returns the backend of that name.

    Args:
        name: One of `BACKENDS`.
        use: What for: asking what it can express needs no package, exporting and verifying do.

    Raises:
        ConfigError: If there is none.
        UnsupportedError: If a package that it needs is not installed.
    """
    if name not in BACKENDS:
        raise ConfigError(f"there is no backend {name!r}{closest(name, BACKENDS)}; allowed: {', '.join(BACKENDS)}")
    entry = BACKENDS[name]
    needed = {"plan": (), "export": entry.writing, "verify": (*entry.writing, *entry.checking)}[use]
    missing = [package for package in needed if not _is_installed(package)]
    if missing:
        raise UnsupportedError(
            f"the {name} backend needs {' and '.join(missing)} to {use}; install with `pip install 'bitplan[{name}]'`"
        )
    made: Backend = getattr(import_module(entry.module), entry.type)()
    return made


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # a parent of a dotted name
        return False
