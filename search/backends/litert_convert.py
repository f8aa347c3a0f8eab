"""From a simulated network to a float .tflite model with its weights, by litert-torch.

Models take and return tensors alone, one sample at a time: a .tflite model has fixed shapes.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hwmodels import Precision
from search.backends.verify import single
from search.errors import UnsupportedError, one_line
from search.quantize.simulate import QuantizedModel
from search.quiet import quietly
from search.trace import slow_attention

Call = tuple[tuple[Any, ...], dict[str, Any]]


class Flat(nn.Module):
    """A model that takes and returns tensors alone, in the order of `tensors_in`.

    Attributes:
        model: Takes a call's arguments.
    """

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self._leaves, self._structure = pytree.tree_flatten(call)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        leaves = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in self._leaves]
        args, kwargs = pytree.tree_unflatten(leaves, self._structure)
        found = tuple(leaves_of(self.model(*args, **kwargs)))
        if not found:
            raise TypeError("it returns no tensor that torch.utils._pytree finds")
        return found


def call_of(inputs: Any) -> Call:
    """Returns a batch's inputs as positional and keyword arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)), {}


def leaves_of(call: Any) -> list[Tensor]:
    """Returns the tensors of a call, in the order that `Flat` takes them."""
    return [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, Tensor)]


def samples_of(batches: Iterable[Any], most: int) -> list[dict[str, np.ndarray[Any, Any]]]:
    """Returns the first samples of batches, each as what the model's signature takes."""
    found: list[dict[str, np.ndarray[Any, Any]]] = []
    for inputs in batches:
        leaves = leaves_of(call_of(inputs))
        count = len(leaves[0])
        for i in range(count):
            parts = (leaf[i : i + 1] if leaf.dim() and len(leaf) == count else leaf for leaf in leaves)
            found.append({f"args_{position}": as_input(part) for position, part in enumerate(parts)})
            if len(found) == most:
                return found
    return found


def as_input(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Returns a tensor as litert-torch's models take it: 64-bit types become 32-bit ones."""
    array: np.ndarray[Any, Any] = tensor.detach().cpu().numpy()
    narrower = {"int64": np.int32, "float64": np.float32}
    return array.astype(narrower[str(array.dtype)]) if str(array.dtype) in narrower else array


def converted(simulated: QuantizedModel, policy: Mapping[str, Precision], example_input: Any) -> bytes:
    """Returns the float .tflite model of one sample, with the weights and biases that `policy` gives the network.

    Raises:
        UnsupportedError: If litert-torch cannot convert the network.
    """
    state = {name: value.clone() for name, value in simulated.apply(policy).state_dict().items()}
    model = copy.deepcopy(simulated.apply({}))  # without the hooks that quantize inputs
    model.load_state_dict(state)
    call = single(call_of(example_input))
    with silence(), slow_attention():
        import litert_torch

        try:
            edge = litert_torch.convert(Flat(model, call).eval(), tuple(leaves_of(call)))
            content: bytes = edge.model_content()
        except Exception as error:  # of every kind, from torch.export to MLIR
            raise UnsupportedError(f"litert-torch cannot convert {type(model).__name__}: {one_line(error)}") from error
    return content


@contextmanager
def silence() -> Iterator[None]:
    """Keeps progress and remarks of the converter, the quantizer and the libraries in C++ below them from the user."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing, quietly(), redirect_stdout(nothing), redirect_stderr(nothing):
            os.dup2(nothing.fileno(), 2)
            yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
