"""Follows tensors through a running model: which layer or operation writes each of them, and which read it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode

from hwmodels.network import Layer, Operation, Shape, Tensor
from search.kinds import MODULE_KINDS, PARAMETER_KINDS, bias_of, is_layer, is_operation, kind_of, kind_of_function
from search.tasks.task import tensors_in

# Functions that may copy, but keep every value as long as type and number of values stay.
COPIES = frozenset({"clone", "contiguous", "deepcopy", "flatten", "ravel", "reshape", "reshape_as", "to", "type_as"})
# Functions that read no values, only shape and type: what they return is a constant.
CONSTANTS = frozenset(f"{what}_like" for what in ("empty", "full", "ones", "rand", "randint", "randn", "zeros")) | {
    f"new_{what}" for what in ("empty", "full", "ones", "tensor", "zeros")
}


class Follower(TorchFunctionMode):
    """Writes down who reads and who writes each tensor while a model runs.

    Every tensor object met is kept, so that neither ids nor memory are reused meanwhile.

    Attributes:
        layers: Layers by name, in the order they first ran.
        operations: Everything else that computed something from the network's input.
        tensors: Tensors of the network; their consumers are in `consumers`.
        consumers: Tensor name to the names of those that read it, in order.
        order: One name for every call of a layer or operation.
    """

    def __init__(self, model: nn.Module, inputs: Iterable[torch.Tensor], batch: int) -> None:
        super().__init__()
        self.layers: dict[str, Layer] = {}
        self.operations: dict[str, Operation] = {}
        self.tensors: dict[str, Tensor] = {}
        self.consumers: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self.order: list[str] = []
        self._batch = batch
        self._modules = {module: name for name, module in model.named_modules()}
        self._running: list[nn.Module] = []
        self._layers_running = 0
        self._names: dict[int, str] = {}  # id of a tensor object -> the tensor of the network it holds
        self._met: defaultdict[int, dict[int, torch.Tensor]] = defaultdict(dict)  # memory -> id -> tensor object
        self._meet([*model.parameters(), *model.buffers()])
        for tensor in inputs:
            self._write(None, [tensor], name=_unused("input", self.tensors, "."))

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Lets every module report when it starts and when it ends."""
        with ExitStack() as stack:
            for module in self._modules:
                stack.callback(module.register_forward_pre_hook(self._enter).remove)
                hook = module.register_forward_hook(self._leave, with_kwargs=True, always_call=True)
                stack.callback(hook.remove)
            yield

    def known(self, given: Iterable[torch.Tensor]) -> tuple[str, ...]:
        """Returns the names of the tensors of the network that `given` hold, each once; constants have none."""
        return tuple(dict.fromkeys(name for tensor in given if (name := self._name_of(tensor))))

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls `func`, and records an operation if it computes something from the network's input."""
        kwargs = kwargs or {}
        if self._layers_running:
            return func(*args, **kwargs)
        given = tensors_in((args, kwargs))
        versions = [_version(tensor) for tensor in given]
        result = func(*args, **kwargs)
        changed = [tensor for tensor, version in zip(given, versions, strict=True) if _version(tensor) != version]
        kind = kind_of_function(func)
        fresh = []
        for tensor in tensors_in(result):
            source = _source(tensor, given, kind)
            if source is None and kind not in CONSTANTS:
                fresh.append(tensor)
            elif source is not None and (name := self._name_of(source)):
                self._names[id(tensor)] = name
        self._meet([*given, *tensors_in(result)])
        if (fresh or changed) and self.known(given):
            self._operation(self._name_operation(kind), kind, given, fresh, changed)
        return result

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)
        self._layers_running += is_layer(module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._running.pop()
        self._layers_running -= is_layer(module)
        inputs, outputs = _tensors((*args, *kwargs.values())), _tensors(output)
        if self._layers_running or not outputs:
            return
        name = self._modules[module]
        if isinstance(module, nn.MultiheadAttention):
            arguments = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            masks = _tensors([*args[3:], *(kwargs[key] for key in kwargs if key not in ("query", "key", "value"))])
            self._attention(module, name, [arguments[key] for key in ("query", "key", "value")], masks, outputs)
        elif kind := kind_of(module, PARAMETER_KINDS):
            self._recurrent(module, name, kind, inputs, outputs)
        elif kind := kind_of(module, MODULE_KINDS):
            self._layer(module, name or "weight", kind, inputs, outputs)
        elif unseen := [tensor for tensor in outputs if _memory(tensor) not in self._met]:
            kind = type(module).__name__.lower()  # it left torch's functions, for numpy or TorchScript
            self._operation(_unused(name or kind, self.operations, "."), kind, inputs, unseen)

    def _layer(
        self, module: Any, name: str, kind: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        """Records one call of a module that is one layer."""
        source, output = inputs[0], outputs[0]
        is_convolution, is_transposed = isinstance(module, _ConvNd), isinstance(module, _ConvTransposeNd)
        # Each output value sums over one filter; transposed, each input value is spread over one.
        filters = (source if is_transposed else output).numel()
        if not self._name_of(source):
            self._write(None, [source], name=_unused(f"{name}.input", self.tensors, ":"))
        self._add(
            Layer(
                name,
                kind,
                reads=self._read(name, self.known(inputs)),
                writes=tuple(self._write(name, [tensor]) for tensor in outputs),
                weight_shape=tuple(module.weight.shape),
                channel_axis=int(is_transposed),
                macs=0 if kind == "embedding" else self._per_sample(filters * math.prod(module.weight.shape[1:])),
                bias_count=_count(bias_of(module, "weight")),
                input_shape=self._shape(source),
                output_shape=self._shape(output),
                groups=module.groups if is_convolution else 1,
                kernel=tuple(module.kernel_size) if is_convolution else (),
                stride=tuple(module.stride) if is_convolution else (),
                quantizes_input=kind != "embedding",
            )
        )

    def _recurrent(
        self, module: nn.Module, name: str, kind: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        """Records one call of a recurrent module: its weights as layers, then an operation that writes its outputs.

        What passes between the weights is no tensor of the network: only the first level's weights read one.
        """
        steps = self._per_sample(inputs[0].numel() // inputs[0].shape[-1])
        for parameter, weight in module.named_parameters(recurse=False):
            if parameter.startswith("weight"):
                is_first = parameter in ("weight_ih", "weight_ih_l0", "weight_ih_l0_reverse")
                layer = self._weight_only(name, module, parameter, kind, steps, self.known(inputs[:1] * is_first))
                bias = _count(bias_of(module, parameter))
                shape = (self._batch, steps, weight.shape[0])
                self._add(replace(layer, macs=weight.numel() * steps, bias_count=bias, output_shape=shape))
        self._operation(_unused(name or kind, self.operations, "."), kind, inputs, outputs)

    def _attention(
        self,
        module: nn.MultiheadAttention,
        name: str,
        inputs: list[torch.Tensor],
        masks: list[torch.Tensor],
        outputs: list[torch.Tensor],
    ) -> None:
        """Records one call of an attention module: input projections, the attention itself, output projection.

        Multiply-accumulates count the projections only, as the rest has no weights.
        """
        embed = module.embed_dim
        tokens = [self._per_sample(tensor.numel() // tensor.shape[-1]) for tensor in inputs]
        context = (self._batch, tokens[0], embed)

        def project(parameter: str, parts: tuple[int, ...], reads: tuple[str, ...], result: list[torch.Tensor]) -> str:
            layer = self._weight_only(name, module, parameter, "attention", tokens[parts[0]], reads)
            rows = sum(tokens[part] for part in parts)
            owner, _, weight = parameter.rpartition(".")
            bias = _count(bias_of(module.get_submodule(owner), weight))
            written = self._write(layer.name, result, shape=(self._batch, rows, embed))
            self._add(
                replace(
                    layer,
                    writes=(written,),
                    macs=rows * embed * layer.weight_shape[1],
                    bias_count=bias * len(parts) // (1 if owner else 3),  # one bias for the three input projections
                    output_shape=self.tensors[written].shape,
                )
            )
            return written

        if isinstance(module._parameters["in_proj_weight"], nn.Parameter):
            projected = [project("in_proj_weight", (0, 1, 2), self.known(inputs), [])]
        else:
            projected = [
                project(f"{part}_proj_weight", (index,), self.known([inputs[index]]), [])
                for index, part in enumerate("qkv")
            ]
        operation = _unused(name or "attention", self.operations, ".")
        reads = self._read(operation, (*projected, *self.known(masks)))
        mixed = self._write(operation, [], shape=context)
        weights = tuple(self._write(operation, [tensor]) for tensor in outputs[1:])
        self.operations[operation] = Operation(operation, "scaled_dot_product_attention", reads, (mixed, *weights))
        self.order.append(operation)
        project("out_proj.weight", (0,), (mixed,), outputs[:1])

    def _weight_only(
        self, name: str, module: nn.Module, parameter: str, kind: str, steps: int, reads: tuple[str, ...]
    ) -> Layer:
        """Returns a layer that is one of several weights in a module, applied to `steps` vectors per sample."""
        layer, weight = _join(name, parameter), module.get_parameter(parameter)
        return Layer(
            layer,
            kind,
            reads=self._read(layer, reads),
            weight_shape=tuple(weight.shape),
            input_shape=(self._batch, steps, weight.shape[1]),
            quantizes_input=False,
        )

    def _add(self, layer: Layer) -> None:
        """Records one call of a layer; later calls add what they read, write and compute to the first."""
        if first := self.layers.get(layer.name):
            layer = replace(
                first,
                reads=tuple(dict.fromkeys(first.reads + layer.reads)),
                writes=first.writes + layer.writes,
                macs=first.macs + layer.macs,
                calls=first.calls + 1,
            )
        self.layers[layer.name] = layer
        self.order.append(layer.name)

    def _operation(
        self,
        name: str,
        kind: str,
        given: list[torch.Tensor],
        fresh: list[torch.Tensor],
        changed: Iterable[torch.Tensor] = (),
    ) -> None:
        """Records an operation that reads `given`, returns `fresh`, and changes the values of `changed`."""
        groups = [group for tensor in changed for group in self._sharing(tensor)]
        reads = self._read(name, self.known([*given, *(tensor for group in groups for tensor in group)]))
        writes = tuple(self._write(name, group) for group in [*([tensor] for tensor in fresh), *groups])
        self.operations[name] = Operation(name, kind, reads, writes)
        self.order.append(name)

    def _name_operation(self, kind: str) -> str:
        """Returns the name of the running module if it is one of torch's own operations, else `kind` within it."""
        module = self._running[-1] if self._running else None
        scope = self._modules[module] if module else ""
        if module and scope and is_operation(module):
            return _unused(scope, self.operations, ".")
        return _unused(_join(scope, kind), self.operations.keys() | set(self._modules.values()), ".")

    def _sharing(self, changed: torch.Tensor) -> list[list[torch.Tensor]]:
        """Returns the tensor objects that see a write to `changed`, those that hold the same values together."""
        groups: defaultdict[object, list[torch.Tensor]] = defaultdict(list)
        for tensor in (changed, *self._met[_memory(changed)].values()):
            if _overlap(changed, tensor):
                groups[self._name_of(tensor) or (tensor.storage_offset(), tensor.numel())].append(tensor)
        return list(groups.values())

    def _read(self, consumer: str, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            self.consumers[name][consumer] = None
        return names

    def _write(self, producer: str | None, objects: list[torch.Tensor], name: str = "", shape: Shape = ()) -> str:
        """Adds a tensor that all `objects` hold, and returns its name: the producer's, then `producer:1` and so on."""
        name = name or _unused(producer or "", self.tensors, ":")
        self._meet(objects)
        self._names.update({id(tensor): name for tensor in objects})
        is_integer = any(not (tensor.is_floating_point() or tensor.is_complex()) for tensor in objects)
        self.tensors[name] = Tensor(name, shape or self._shape(objects[0]), producer, is_integer=is_integer)
        return name

    def _meet(self, objects: Iterable[torch.Tensor]) -> None:
        """Keeps tensor objects alive, and findable by their memory."""
        for tensor in objects:
            self._met[_memory(tensor)][id(tensor)] = tensor

    def _name_of(self, tensor: torch.Tensor) -> str | None:
        """Returns the tensor of the network that `tensor` holds, also where torch wrapped the same memory anew."""
        met = self._met.get(_memory(tensor), {})
        if id(tensor) in met:
            return self._names.get(id(tensor))
        same = [other for other in met.values() if id(other) in self._names and _same_values(tensor, other)]
        return self._names[id(same[0])] if same else None

    def _per_sample(self, total: int) -> int:
        """Divides a count by the batch, rounding up."""
        return -(-total // self._batch)

    def _shape(self, tensor: torch.Tensor) -> Shape:
        """Returns the shape with samples first, wherever the model keeps them."""
        shape, batch = tuple(tensor.shape), self._batch
        if shape[:1] == (batch,):
            return shape
        if batch in shape:
            axis = shape.index(batch)
            return (batch, *shape[:axis], *shape[axis + 1 :])
        if shape and shape[0] > batch:  # samples and positions share the first axis
            return (batch, self._per_sample(shape[0]), *shape[1:])
        return (1, *shape)


def _source(result: torch.Tensor, given: list[torch.Tensor], kind: str) -> torch.Tensor | None:
    """Returns the given tensor whose values `result` holds, all of them and in the same type; None if it is new."""
    for tensor in given:
        same_size = tensor.numel() == result.numel() and tensor.dtype == result.dtype
        is_copy = kind in COPIES and tensor is given[0]
        if tensor is result or (same_size and (is_copy or _memory(tensor) == _memory(result))):
            return tensor
    return None


def _memory(tensor: torch.Tensor) -> int:
    """Identifies the memory a tensor views; layouts such as sparse have none of their own to share."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return id(tensor)


def _version(tensor: torch.Tensor) -> int:
    """Counts the writes in place; tensors made in inference mode have no count, and refuse such writes."""
    return 0 if tensor.is_inference() else tensor._version


def _same_values(one: torch.Tensor, other: torch.Tensor) -> bool:
    return (one.storage_offset(), one.numel(), one.dtype) == (other.storage_offset(), other.numel(), other.dtype)


def _overlap(changed: torch.Tensor, other: torch.Tensor) -> bool:
    """True if a write to `changed` can be seen in `other`, which views the same memory."""
    if changed is other or changed.dtype != other.dtype:
        return True
    cells = torch.zeros(changed.untyped_storage().nbytes() // changed.itemsize, dtype=torch.bool)
    cells.as_strided(changed.shape, changed.stride(), changed.storage_offset()).fill_(True)
    return bool(cells.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _tensors(value: Any) -> list[torch.Tensor]:
    """Lists the tensors that carry values, of packed sequences the data alone."""
    if isinstance(value, PackedSequence):
        return [value.data]
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in _tensors(item)]
    return tensors_in(value)


def _count(values: torch.Tensor | None) -> int:
    return 0 if values is None else values.numel()


def _join(scope: str, name: str) -> str:
    return f"{scope}.{name}" if scope else name


def _unused(name: str, taken: Iterable[str], separator: str) -> str:
    """Returns `name`, or with the first running number that is not taken."""
    taken, number, candidate = set(taken), 0, name
    while candidate in taken:
        number += 1
        candidate = f"{name}{separator}{number}"
    return candidate
