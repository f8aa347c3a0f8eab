"""What torch's modules and functions are called here, and which of them are quantizable layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

MODULE_KINDS: dict[type[nn.Module], str] = {
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
    nn.Linear: "linear",
    nn.Embedding: "embedding",
}
"""Modules that are one layer, named by the module."""

PARAMETER_KINDS: dict[type[nn.Module], str] = {
    nn.LSTM: "lstm",
    nn.LSTMCell: "lstm",
    nn.GRU: "gru",
    nn.GRUCell: "gru",
    nn.RNN: "rnn",
    nn.RNNCell: "rnn",
    nn.MultiheadAttention: "attention",
}
"""Modules that hold several weight-only layers, each named by its parameter."""

OPERATORS = {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder"}


def kind_of(module: nn.Module, kinds: Mapping[type[nn.Module], str]) -> str:
    """Returns the kind of a module that `kinds` lists, and an empty string for another."""
    return next((kind for listed, kind in kinds.items() if isinstance(module, listed)), "")


def bias_of(module: nn.Module, parameter: str) -> torch.Tensor | None:
    """Returns the bias that belongs to a weight; attention keeps one for its three input projections."""
    name = "in_proj_bias" if parameter.endswith("_proj_weight") else parameter.replace("weight", "bias")
    bias: torch.Tensor | None = getattr(module, name, None)
    return bias


def is_layer(module: nn.Module) -> bool:
    """True for modules that are a layer or hold the weights of several."""
    return bool(kind_of(module, MODULE_KINDS) or kind_of(module, PARAMETER_KINDS))


def is_operation(module: nn.Module) -> bool:
    """True for torch's own modules without parts, such as a batch norm or an activation."""
    return type(module).__module__.startswith("torch.nn.modules") and not list(module.children())


def kind_of_function(func: Callable[..., Any]) -> str:
    """Returns torch's plain name of a function: `add` for `__iadd__`, `add_` and `torch.add`."""
    name: str = getattr(func, "__name__", type(func).__name__)
    if name == "__get__":  # a property such as `tensor.mT`
        name = getattr(func, "__self__").__name__  # noqa: B009
    if name.startswith("__") and name[2:3] in "ir" and hasattr(torch.Tensor, f"__{name[3:]}"):
        name = name[3:]
    name = name.strip("_")
    return OPERATORS.get(name, name)
