"""Folds batch norm into the layer before it, as every integer runtime does before it quantizes.

In evaluation mode a batch norm is `y = gamma * (x - mean) / sqrt(var + eps) + beta`, one affine map per channel. Where
`x` is the output of one convolution or linear layer and nothing else reads it, the map joins that layer's parameters.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from hwmodels.network import Layer, Network, Operation
from search.errors import UnsupportedError
from search.tasks.task import call, tensors_in
from search.trace import slow_attention, trace

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class Fold(NamedTuple):
    """A batch norm and the layer it is folded into, by name."""

    layer: str
    norm: str


class FoldedModel(NamedTuple):
    """A copy of a model in evaluation mode, and the batch norms that are `nn.Identity` in it."""

    model: nn.Module
    folds: tuple[Fold, ...]


def fold_batch_norm(model: nn.Module, example_input: Any) -> FoldedModel:
    """Returns a copy of `model` with every batch norm folded that can be; the model itself is not altered.

    A batch norm is folded if its input is exactly the output of one convolution, transposed convolution or linear layer
    that is called once, shares its weight with nothing and has no other reader. A norm without running statistics
    computes with those of the batch, and stays. Whatever the structure says, a fold is kept only if what the norm
    returned and all that the model returns is still the same, on the example input and on noise in its range.

    Raises:
        DataError: If the model does not run on the example input.
        UnsupportedError: If the model cannot be copied or followed.
    """
    try:
        model = copy.deepcopy(model)
    except Exception as error:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and folding must not alter "
            "it; give it a working `__deepcopy__`, such as by detaching the tensors it keeps as attributes"
        ) from error
    for module in model.modules():
        module.training = False
    folds = _candidates(model, trace(model, example_input))
    inputs = (example_input, _noise_like(example_input))
    before = [_outputs(model, given, folds) for given in inputs]

    def attempt(tried: tuple[Fold, ...]) -> nn.Module | None:
        folded = apply_folds(model, tried)
        try:
            after = [_outputs(folded, given, tried) for given in inputs]
        except AttributeError:  # the model uses a norm's attributes, not only its output
            return None
        return folded if all(map(_agree, before, after)) else None

    if (folded := attempt(folds)) is not None:
        return FoldedModel(folded, folds)
    kept: tuple[Fold, ...] = ()
    for fold in folds:
        if attempt((*kept, fold)) is not None:
            kept = (*kept, fold)
    return FoldedModel(apply_folds(model, kept), kept)


def _candidates(model: nn.Module, network: Network) -> tuple[Fold, ...]:
    """Lists the batch norms that the network's structure allows to fold."""
    uses = Counter(
        id(value) for module in model.modules() for value in module._parameters.values() if value is not None
    )
    names = dict(model.named_modules())
    folds = []
    for operation in network.operations:
        norm: Any = names.get(operation.name)
        if type(norm) in BATCH_NORMS and norm.running_mean is not None:
            layer = _only_source(network, operation)
            if layer and _channels(layer) == norm.num_features:
                parameters = names[layer.name]._parameters.values()
                if not any(uses[id(value)] > 1 for value in parameters):
                    folds.append(Fold(layer.name, operation.name))
    return tuple(folds)


def _only_source(network: Network, norm: Operation) -> Layer | None:
    """Returns the layer whose only output only `norm` reads, both called once; None if there is no such layer."""
    is_called_again = any(operation.name == f"{norm.name}.1" for operation in network.operations)
    if is_called_again or len(norm.reads) != 1:
        return None
    source = network.tensors[norm.reads[0]]
    if source.consumers != (norm.name,) or source.name in network.outputs or source.producer not in network.names:
        return None
    layer = network[source.producer]
    return layer if layer.calls == 1 and layer.kind.startswith(("conv", "linear")) else None


def _channels(layer: Layer) -> int:
    """Returns the channels of the layer's output; groups of a transposed convolution share their axis of the weight."""
    return layer.channels * (layer.groups if layer.kind.startswith("conv_transpose") else 1)


def apply_folds(model: nn.Module, folds: tuple[Fold, ...]) -> nn.Module:
    """Returns a copy of `model` with `folds` carried out; the arithmetic is in float64."""
    model = copy.deepcopy(model)
    for fold in folds:
        layer: Any = model.get_submodule(fold.layer)
        norm: Any = model.get_submodule(fold.norm)
        mean, gain = norm.running_mean.double(), (norm.running_var.double() + norm.eps).rsqrt()
        if norm.weight is not None:
            gain = gain * norm.weight.detach().double()
        old_bias = 0 if layer.bias is None else layer.bias.detach().double()
        beta = 0 if norm.bias is None else norm.bias.detach().double()
        weight = layer.weight
        layer.weight = nn.Parameter(_scaled(layer, gain).to(weight.dtype), weight.requires_grad)
        layer.bias = nn.Parameter(((old_bias - mean) * gain + beta).to(weight.dtype), weight.requires_grad)
        for name, module in list(model.named_modules(remove_duplicate=False)):
            if module is norm:
                model.set_submodule(name, nn.Identity().eval())
    return model


def _scaled(layer: Any, gain: Tensor) -> Tensor:
    """Returns the layer's weight in float64, every output channel times its gain."""
    weight: Tensor = layer.weight.detach().double()
    if not isinstance(layer, _ConvTransposeNd):
        return weight * gain.reshape(-1, *[1] * (weight.dim() - 1))
    grouped = weight.reshape(layer.groups, -1, *weight.shape[1:])  # groups, inputs and outputs of one, kernel
    return (grouped * gain.reshape(layer.groups, 1, -1, *[1] * (weight.dim() - 2))).reshape(weight.shape)


def _outputs(model: nn.Module, given: Any, folds: tuple[Fold, ...]) -> dict[str, Tensor]:
    """Returns what the model returns and what its norms, folded or not, return, by name."""
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(fold.norm).register_forward_hook(
            lambda module, args, output, name=fold.norm: found.update({name: output.clone()})
        )
        for fold in folds
    ]
    try:
        with torch.no_grad(), slow_attention(), torch.random.fork_rng([]):
            torch.manual_seed(0)
            returned = tensors_in(call(model, copy.deepcopy(given)))
    finally:
        for hook in hooks:
            hook.remove()
    return found | {f"output {index}": tensor for index, tensor in enumerate(returned)}


def _agree(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    """True if all floating-point tensors of `after` are those of `before`, to half of their type's digits."""
    for name, tensor in after.items():
        if tensor.is_floating_point():
            expected = before.get(name)
            if expected is None or expected.shape != tensor.shape:
                return False
            tolerance = torch.finfo(tensor.dtype).eps ** 0.5
            largest = expected[expected.isfinite()].abs().amax().item() if expected.isfinite().any() else 0.0
            close = torch.isclose(tensor, expected, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
            if not close.all():
                return False
    return True


def _noise_like(example_input: Any) -> Any:
    """Returns the example with uniform noise of the same range for its floating-point values."""
    noise = copy.deepcopy(example_input)
    generator = torch.Generator().manual_seed(0)
    for tensor in tensors_in(noise):
        if tensor.is_floating_point():
            low, high = tensor.min().item(), tensor.max().item()
            low, high = (low, high) if low < high else (low - 1, high + 1)
            tensor.copy_(torch.empty(tensor.shape).uniform_(low, high, generator=generator))
    return noise
