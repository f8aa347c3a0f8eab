"""Backends: what carries a plan into the runtime that executes it."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Literal, NamedTuple

from search.errors import ConfigError, UnsupportedError, closest, one_line

if TYPE_CHECKING:
    from search.backends.base import Backend

__all__ = ["BACKENDS", "backend"]


class Entry(NamedTuple):
    """Where a backend lives, and what it needs.

    Attributes:
        module: Its module in this package.
        type: Its class.
        extra: The extra that installs its packages.
        writing: Packages, by their import names, that exporting needs.
        checking: Packages that verifying needs besides.
    """

    module: str
    type: str
    extra: str
    writing: tuple[str, ...] = ()
    checking: tuple[str, ...] = ()


ONNX = ("onnx", "onnxscript", "onnxruntime")

BACKENDS: dict[str, Entry] = {
    "onnxruntime": Entry("onnxruntime", "OnnxRuntime", "onnxruntime", ONNX),
    "matmulnbits": Entry("matmulnbits", "MatMulNBits", "onnxruntime", ONNX),
    "openvino": Entry("openvino", "OpenVino", "openvino", (*ONNX, "openvino")),
    "tensorrt": Entry("tensorrt", "TensorRT", "onnxruntime", ONNX),
    "torchao": Entry("torchao", "TorchAO", "torchao", ("torchao",)),
    "x86inductor": Entry("x86inductor", "X86Inductor", "torchao", ("torchao",)),
    "executorch": Entry("executorch", "ExecuTorch", "executorch", ("torchao",), ("executorch",)),
    "compressed-tensors": Entry(
        "compressed_tensors", "CompressedTensors", "compressed-tensors", ("transformers",), ("compressed_tensors",)
    ),
    "vllm": Entry("vllm", "VLLM", "compressed-tensors", ("transformers",), ("compressed_tensors",)),
    "gptqmodel": Entry("gptqmodel", "GPTQModel", "gptqmodel", (), ("gptqmodel",)),
    "auto-round": Entry("autoround", "AutoRound", "auto-round", (), ("auto_round",)),
    "modelopt": Entry("modelopt", "ModelOpt", "modelopt", (), ("modelopt",)),
    "brevitas": Entry("brevitas", "Brevitas", "brevitas", (), ("brevitas",)),
    "nncf": Entry("nncf", "NNCF", "nncf", (), ("nncf",)),
    "aimet": Entry("aimet", "Aimet", "aimet", (), ("aimet_torch",)),
    "coreml": Entry("coreml", "CoreML", "coreml", (), ("coremltools",)),
    "litert": Entry("litert", "LiteRT", "litert", ("litert_torch", "ai_edge_quantizer"), ("ai_edge_litert",)),
    "llamacpp": Entry("llamacpp", "LlamaCpp", "llamacpp", (), ("gguf",)),
}


def backend(name: str, use: Literal["plan", "export", "verify"] = "export") -> Backend:
    """Returns the backend of that name.

    Args:
        name: One of `BACKENDS`, or `package.module.Class` for one of your own.
        use: What for: asking what it can express needs no package, exporting and verifying do.

    Raises:
        ConfigError: If there is none.
        UnsupportedError: If a package that it needs is not installed.
    """
    if "." in name:
        return _own(name)
    if name not in BACKENDS:
        raise ConfigError(f"there is no backend {name!r}{closest(name, BACKENDS)}; allowed: {', '.join(BACKENDS)}")
    entry = BACKENDS[name]
    needed = {"plan": (), "export": entry.writing, "verify": (*entry.writing, *entry.checking)}[use]
    missing = [package for package in needed if not _is_installed(package)]
    if missing:
        raise UnsupportedError(
            f"the {name} backend needs {' and '.join(missing)} to {use}; "
            f"install with `pip install 'bitplan[{entry.extra}]'`"
        )
    made: Backend = getattr(import_module(f"search.backends.{entry.module}"), entry.type)()
    return made


def _own(path: str) -> Backend:
    """Returns a backend of the user's own."""
    from search.backends.base import Backend

    module, _, kind = path.rpartition(".")
    try:
        found = getattr(import_module(module), kind)
    except (ImportError, AttributeError, SyntaxError, TypeError, ValueError) as error:  # the last two: `.x`, `..x`
        raise ConfigError(f"backend {path} cannot be imported: {one_line(error)}") from error
    if not (isinstance(found, type) and issubclass(found, Backend)):
        raise ConfigError(f"backend {path} must be a subclass of search.backends.base.Backend")
    try:
        return found()
    except TypeError as error:
        raise ConfigError(
            f"backend {path} must implement all of its contract and take no arguments: {one_line(error)}"
        ) from error


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:  # a parent of a dotted name
        return False
