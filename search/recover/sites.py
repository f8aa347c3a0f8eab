"""Finds the sites of a network: the tensors whose channels can be rescaled without changing what it computes.

The recorded data flow proposes them: a layer or a norm, then only operations that let factors through, then layers and
nothing else. What structure cannot show is tried out: `search.recover.probe` learns which input channel of a reader
holds which channel of the producer, and at last parameters are rescaled in earnest, and what the model returns must be
the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from hwmodels.network import Layer
from search.kinds import is_layer
from search.quantize.affine import per_channel
from search.quantize.simulate import QuantizedModel, exact_inference
from search.recover.probe import Proposal, feature_axis, tried_out
from search.recover.scaling import Rescaling, Site
from search.tasks.task import Task, call, tensors_in

# Operations whose result scales with each channel of an operand, whatever its values. ReLU6, GELU, tanh and the like
# are none; nor is an addition, as everything it adds would have to be scaled alike.
ACTIVATIONS = {"relu", "leaky_relu", "prelu", "rrelu", "neg", "dropout", "alpha_dropout", "feature_dropout"}
PRODUCTS = {"mul", "div", "matmul", "bmm", "einsum", "scaled_dot_product_attention"}
PARTS = {"cat", "stack", "getitem", "chunk", "split", "unbind", "select", "narrow", "index_select"}
ORDERS = {"flip", "roll", "pixel_shuffle", "channel_shuffle"}
COPIES = {"clone", "contiguous", "reshape", "flatten", "expand", "expand_as", "repeat", "repeat_interleave", "tile"}
CASTS = {"to", "type_as", "float", "double", "half", "bfloat16"}
SUMMARIES = {"mean", "sum", "amax", "interpolate", "pad"}
BY_DIMS = {
    f"{kind}{dims}d"
    for kind in ("max_pool", "avg_pool", "adaptive_max_pool", "adaptive_avg_pool", "dropout")
    for dims in (1, 2, 3)
}
HOMOGENEOUS = frozenset(ACTIVATIONS | PRODUCTS | PARTS | ORDERS | COPIES | CASTS | SUMMARIES | BY_DIMS)

Run = tuple[tuple[Any, ...], dict[str, Any], Any]
"""What a module was called with, by position and by keyword, and what it returned."""


def find_sites(simulated: QuantizedModel, task: Task) -> tuple[Site, ...]:
    """Returns the sites of the float network, in the order their readers run.

    Producers are linear layers, convolutions, and modules that multiply by a one-dimensional `weight`: LayerNorm,
    RMSNorm in anyone's version, batch norms that could not be folded. Readers are linear layers, convolutions, and the
    joint input projection of an attention module. Parameters that several modules share stay as they are. With all
    sites rescaled at random, the example input and the first calibration batch must give the outputs they gave before,
    to half of their type's digits; if they do not, sites are kept one by one.
    """
    simulated.apply({})
    with exact_inference():
        proposals = [*_layer_proposals(simulated), *_norm_proposals(simulated, task.example_input)]
        order = {name: index for index, name in enumerate(simulated.network.names)}
        proposals.sort(key=lambda proposal: [order[reader] for reader in proposal.readers])
        sites = tuple(tried_out(simulated, proposals, task.example_input))
        first = [task.inputs(batch) for batch in islice(task.batches("calibration"), 1)]
        return _confirmed(simulated, sites, [task.example_input, *first])


def _confirmed(simulated: QuantizedModel, sites: tuple[Site, ...], inputs: list[Any]) -> tuple[Site, ...]:
    """Returns the sites with which the model still computes the same, all of them or those that pass one by one."""
    before = [_outputs(simulated.model, {}, given) for given in inputs]

    def hold(tried: tuple[Site, ...]) -> bool:
        rescaling, generator = Rescaling(simulated), torch.Generator().manual_seed(0)
        for site in tried:
            exponents = torch.randint(-3, 4, (site.channels,), generator=generator)
            rescaling.move(site, torch.exp2(exponents.float()))
        after = [_outputs(simulated.model, rescaling.tensors(), given) for given in inputs]
        return all(map(_agree, before, after))

    if hold(sites):
        return sites
    kept: tuple[Site, ...] = ()
    for site in sites:
        kept = (*kept, site) if hold((*kept, site)) else kept
    return kept


def _layer_proposals(simulated: QuantizedModel) -> Iterator[Proposal]:
    """Proposes the layers whose output only layers read, behind operations that scale with it."""
    own = _own_modules(simulated.model)
    for layer in simulated.network:
        is_own = layer.kind.startswith(("linear", "conv")) and simulated.owner(layer.name) in own
        if is_own and (readers := _readers(simulated, layer.writes, own)):
            channels = layer.channels * (layer.groups if layer.kind.startswith("conv_transpose") else 1)
            yield Proposal(layer.name, channels, feature_axis(layer), readers)


def _norm_proposals(simulated: QuantizedModel, example_input: Any) -> Iterator[Proposal]:
    """Proposes the modules called once whose output follows their weight, channel by channel."""
    own = _own_modules(simulated.model)
    norms = {
        name: module
        for name, module in simulated.model.named_modules()
        if name and module in own and not is_layer(module) and _is_vector(module._parameters.get("weight"))
    }
    for name, runs in _runs(simulated.model, norms, example_input).items():
        written = [operation.writes for operation in simulated.network.operations if _is_within(operation.name, name)]
        readers = _readers(simulated, written[-1], own) if written else ()
        if readers and len(runs) == 1:
            for axis, offset in ((-1, 0.0), (1, 0.0), (-1, 1.0), (1, 1.0)):
                if _follows_weight(norms[name], runs[0], axis, offset):
                    yield Proposal(name, len(norms[name].get_parameter("weight")), axis, readers, offset)
                    break


def _own_modules(model: nn.Module) -> set[nn.Module]:
    """Returns the modules whose parameters no other module shares."""
    uses = Counter(id(value) for module in model.modules() for value in module._parameters.values())
    return {
        module
        for module in model.modules()
        if all(uses[id(value)] == 1 for value in module._parameters.values() if value is not None)
    }


def _is_vector(value: Tensor | None) -> bool:
    return value is not None and value.dim() == 1 and value.is_floating_point()


def _is_within(operation: str, module: str) -> bool:
    return operation == module or operation.startswith(f"{module}.")


def _runs(model: nn.Module, modules: Mapping[str, nn.Module], example_input: Any) -> dict[str, list[Run]]:
    """Runs the model once; returns copies of what went into each module and what came out, call by call."""
    runs: dict[str, list[Run]] = {name: [] for name in modules}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = tuple(map(_copied, args)), {key: _copied(value) for key, value in kwargs.items()}
            runs[name].append((*given, _copied(output)))

        return hook

    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.callback(module.register_forward_hook(keep(name), with_kwargs=True).remove)
        call(model, example_input)
    return runs


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _follows_weight(norm: nn.Module, run: Run, axis: int, offset: float) -> bool:
    """Tells whether scaling a norm's weight and bias scales what it returned along `axis`, and nothing else."""
    (args, kwargs, output), weight, bias = run, norm.get_parameter("weight"), norm._parameters.get("bias")
    if not isinstance(output, Tensor) or output.dim() < 2 or output.shape[axis] != len(weight):
        return False
    factors = torch.exp2(torch.arange(len(weight), device=weight.device) % 5 + 1).to(weight)
    scaled = {"weight": (weight + offset) * factors - offset}
    if bias is not None:
        scaled["bias"] = bias * (factors if bias.shape == weight.shape else 1)
    return _close(functional_call(norm, scaled, args, kwargs), output * per_channel(factors, output, axis))


def _readers(simulated: QuantizedModel, tensors: Sequence[str], own: set[nn.Module]) -> tuple[str, ...]:
    """Returns the layers in which tensors end behind homogeneous operations; none if they also end elsewhere."""
    network = simulated.network
    operations = {operation.name: operation for operation in network.operations}
    met, waiting = set(tensors), list(tensors)
    readers: set[str] = set()
    while waiting:
        tensor = network.tensors[waiting.pop()]
        if tensor.is_integer or tensor.name in network.outputs:
            return ()
        for consumer in tensor.consumers:
            if consumer in network:
                if not _is_reader(network[consumer]) or simulated.owner(consumer) not in own:
                    return ()
                readers.add(consumer)
            elif operations[consumer].kind in HOMOGENEOUS:
                waiting += [name for name in operations[consumer].writes if name not in met]
                met.update(operations[consumer].writes)
            else:
                return ()
    return tuple(name for name in network.names if name in readers)


def _is_reader(layer: Layer) -> bool:
    """True for layers whose module is called with the one tensor that their weight multiplies."""
    is_plain = layer.kind.startswith(("linear", "conv"))
    return len(layer.reads) == 1 and (is_plain or layer.name.endswith("in_proj_weight"))


def _outputs(model: nn.Module, tensors: dict[str, Tensor], inputs: Any) -> list[Tensor]:
    """Returns the floating-point tensors that the model returns with some parameters replaced."""
    if isinstance(inputs, Mapping):
        returned = functional_call(model, tensors, (), dict(inputs))
    else:
        returned = functional_call(model, tensors, tuple(inputs) if isinstance(inputs, (tuple, list)) else inputs)
    return [tensor for tensor in tensors_in(returned) if tensor.is_floating_point()]


def _agree(before: list[Tensor], after: list[Tensor]) -> bool:
    return len(before) == len(after) and all(map(_close, after, before))


def _close(found: Tensor, expected: Tensor) -> bool:
    """True if values agree to half of their type's digits, relative to the largest expected."""
    if found.shape != expected.shape:
        return False
    tolerance = torch.finfo(expected.dtype).eps ** 0.5
    finite = expected[expected.isfinite()].abs()
    largest = finite.amax().item() if finite.numel() else 0.0
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
