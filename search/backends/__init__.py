"""Backends: what carries a plan into the runtime that executes it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, NamedTuple

from search.errors import ConfigError, UnsupportedError, closest

if TYPE_CHECKING:
    from search.backends.base import Backend

__all__ = ["BACKENDS", "backend"]


class Entry(NamedTuple):
    """Where a backend lives, and the packages it needs; the extra that installs them has the backend's name."""

    module: str
    type: str
    packages: tuple[str, ...]


BACKENDS: dict[str, Entry] = {
    "onnxruntime": Entry("search.backends.onnxruntime", "OnnxRuntime", ("onnx", "onnxscript", "onnxruntime")),
    "torchao": Entry("search.backends.torchao", "TorchAO", ("torchao",)),
}


def backend(name: str) -> Backend:
    """Returns the backend of that name.

    Raises:
        ConfigError: If there is none.
        UnsupportedError: If a package that it needs is not installed.
    """
    if name not in BACKENDS:
        raise ConfigError(f"there is no backend {name!r}{closest(name, BACKENDS)}; allowed: {', '.join(BACKENDS)}")
    entry = BACKENDS[name]
    missing = [package for package in entry.packages if find_spec(package) is None]
    if missing:
        raise UnsupportedError(
            f"the {name} backend needs {' and '.join(missing)}; install with `pip install 'bitplan[{name}]'`"
        )
    made: Backend = getattr(import_module(entry.module), entry.type)()
    return made
