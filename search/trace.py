"""Recovers a network (layers, operations, the tensors between them) from one real forward pass.

Nothing is captured or compiled: the model runs as Python, and every torch function it calls reports the tensors it was
given and those it returned. Control flow that depends on data, modules called several times, and inputs and outputs in
tuples or mappings need no special care; what is recovered is the path that the example input takes.

Three rules say what a tensor of the network is:

* Views, reshapes, copies and casts to the same type hold the same values: they are the same tensor.
* Writing in place makes a new tensor, also of everything else that shares the memory written.
* Parameters, buffers and constants are none; only what depends on the input is. A layer that reads a constant, or what
  comes from code that cannot be followed (numpy, TorchScript functions), gets a tensor `{layer}.input` nobody produces.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from hwmodels.network import Network
from search.errors import DataError, UnsupportedError, closest
from search.follow import Follower
from search.kinds import MODULE_KINDS, PARAMETER_KINDS, bias_of, kind_of
from search.tasks.task import call, tensors_in


def trace(model: nn.Module, example_input: Any) -> Network:
    """Returns the network that `model` runs on `example_input`: a tensor, a tuple of them, or a mapping of keywords.

    The model runs once, on a copy of the input, in evaluation mode and without gradients; its training flags, hooks,
    buffers and the random state are left as they were. Samples lie along the first axis of the first input. Shapes are
    those on the example, with samples moved first where the model keeps them elsewhere.

    Convolutions, linear layers and embeddings are layers named by their module; a transposed convolution's output
    channels are axis 1 of its weight, which its groups share: there, `channels` counts those of one group. The weights
    of recurrent and attention modules are layers named by their parameter, and quantize no input. A module that the
    example does not reach is no layer, nor is one whose weight is used without calling it: their weights count as other
    parameters. `order` repeats a layer for each of its calls.

    Raises:
        DataError: If the example input holds no samples, or the model does not run on it.
        UnsupportedError: If a module cannot be followed, or no layer runs.
    """
    _check(model)
    given = copy.deepcopy(example_input)
    inputs = [tensor for tensor in tensors_in(given) if tensor.dim()]
    if not inputs or not inputs[0].numel():
        raise DataError(
            f"the example input holds no samples, got {describe(example_input)}; it must be a tensor, a tuple of "
            "tensors or a mapping of keywords to tensors, samples along the first axis"
        )
    follower = Follower(model, inputs, batch=len(inputs[0]))
    with _undisturbed(model), follower.hooked(), follower:
        try:
            outputs = call(model, given)
        except Exception as error:
            raise DataError(
                f"{type(model).__name__} does not run on the example input {describe(example_input)}: "
                f"{type(error).__name__}: {error}; the example input must be one batch of what the model is called with"
            ) from error
    if not follower.layers:
        kinds = ", ".join(dict.fromkeys([*MODULE_KINDS.values(), *PARAMETER_KINDS.values()]))
        raise UnsupportedError(
            f"{type(model).__name__} calls no layer that can be quantized ({kinds}) on the example input; a layer "
            "counts if its module is called, not if only its weight or its `forward` is used"
        )
    return Network(
        layers=tuple(follower.layers.values()),
        operations=tuple(follower.operations.values()),
        tensors={
            name: replace(tensor, consumers=tuple(follower.consumers[name]))
            for name, tensor in follower.tensors.items()
        },
        other_parameters=_other_parameters(model, list(follower.layers)),
        order=tuple(follower.order),
        outputs=follower.known(tensors_in(outputs)),
    )


def parameter_of(model: nn.Module, layer: str) -> tuple[nn.Module, str]:
    """Returns the module that owns the weight of `layer`, and the weight's name in it.

    Raises:
        DataError: If the model has no such layer.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    if layer in modules and kind_of(modules[layer], MODULE_KINDS):
        return modules[layer], "weight"
    owner, _, parameter = layer.rpartition(".")
    if owner in modules and isinstance(getattr(modules[owner], parameter, None), nn.Parameter):
        return modules[owner], parameter
    known = [name for name, module in modules.items() if kind_of(module, MODULE_KINDS)]
    known += [name for name, _ in model.named_parameters()]
    raise DataError(f"{type(model).__name__} has no layer {layer!r}{closest(layer, known)}")


def shared_parameters(model: nn.Module, network: Network) -> tuple[tuple[str, ...], ...]:
    """Returns the groups of layers that hold the same weight, such as an embedding and the decoder tied to it."""
    groups = defaultdict(list)
    for layer in network:
        owner, parameter = parameter_of(model, layer.name)
        groups[id(getattr(owner, parameter))].append(layer.name)
    return tuple(tuple(names) for names in groups.values() if len(names) > 1)


@contextmanager
def slow_attention() -> Iterator[None]:
    """Makes transformers run module by module: their fast path goes past the modules, so that hooks have no effect."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def describe(value: Any) -> str:
    """Returns types and shapes of nested inputs on one line, such as `(float32 [1, 1, 28, 28], int64 [1])`."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {describe(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return "(" + ", ".join(map(describe, value)) + ")"
    return type(value).__name__


def _check(model: nn.Module) -> None:
    """Refuses modules whose calls or weights cannot be followed."""
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedError(f"module {name!r} is TorchScript, which cannot be followed; pass the Python module")
        for parameter, value in module.named_parameters(recurse=False):
            if is_lazy(value):
                raise UnsupportedError(f"{name}.{parameter} has no shape yet; run the model once on real data first")
        if kind_of(module, MODULE_KINDS) and not isinstance(module._parameters.get("weight"), nn.Parameter):
            raise UnsupportedError(
                f"the weight of layer {name!r} is computed rather than stored (weight norm, pruning, ...); make it a "
                "plain parameter first: torch.nn.utils.parametrize.remove_parametrizations, torch.nn.utils.prune.remove"
            )


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Runs in evaluation mode and puts flags, buffers and random state back afterwards."""
    training = {module: module.training for module in model.modules()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    devices = {tensor.device for tensor in model.parameters() if tensor.is_cuda}
    with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(list(devices)), slow_attention():
        versions = {buffer: buffer._version for buffer in buffers}
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module, flag in training.items():
                module.training = flag
            for buffer, version in versions.items():
                if buffer._version != version:
                    buffer.copy_(buffers[buffer])


def _other_parameters(model: nn.Module, layers: list[str]) -> int:
    """Counts the floating-point values the model stores outside the weights and biases of `layers`, each once."""
    stored = [value for value in model.state_dict(keep_vars=True).values() if isinstance(value, torch.Tensor)]
    others = {id(value): value.numel() for value in stored if value.is_floating_point()}
    for layer in layers:
        owner, parameter = parameter_of(model, layer)
        for value in (getattr(owner, parameter), bias_of(owner, parameter)):
            others.pop(id(value), None)
    return sum(others.values())
