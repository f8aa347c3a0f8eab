"""Where tensors are quantized besides the inputs of layers: `placement=full`, as integer runtimes have it.

A runtime that adds, concatenates or pools in integers reads and writes integers there. So the results of layers and of
such operations are quantized where they are produced, but for those that only an activation reads which is fused with
the operation before it. A tensor that layers read has their input format; any other has one format for all, and is
quantized only where what produces it computes in integers: a layer with quantized weight and input, or an operation
that reads nothing but quantized tensors.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hwmodels import FLOAT, Format, Network, Operation, Precision
from hwmodels.network import FUSED
from hwmodels.precision import FLOAT_PRECISION
from search.follow import Follower
from search.kinds import MODULE_KINDS, is_layer, kind_of_function
from search.tasks.task import call, tensors_in

"""Activations that integer runtimes compute within the operation before them."""

COMPUTED = (
    FUSED
    | frozenset(
        f"{prefix}{kind}"
        for prefix in ("", "adaptive_")
        for kind in ("avg_pool1d", "avg_pool2d", "avg_pool3d", "max_pool1d", "max_pool2d", "max_pool3d")
    )
    | frozenset(
        {"add", "sub", "mul", "cat", "concat", "concatenate", "stack", "mean", "matmul", "bmm", "pad", "hardswish"}
    )
)
"""Operations that integer runtimes compute in integers."""


@dataclass(frozen=True)
class Event:
    """One call of a torch function: the module it is called in, what it is, and the how-manieth in one pass."""

    scope: str
    kind: str
    occurrence: int


@dataclass(frozen=True)
class Point:
    """A tensor of the network, and what says whether and how it is quantized where it is produced.

    Attributes:
        tensor: Its name.
        layer: The layer that produces it; empty for an operation's.
        event: The call that produces it; None for a layer's.
        reads: The tensors that the operation reads.
        readers: The layers whose quantized input it is.
        is_fused: Whether only a fused activation reads it, so that it never leaves the operation.
    """

    tensor: str
    layer: str
    event: Event | None
    reads: tuple[str, ...]
    readers: tuple[str, ...]
    is_fused: bool


class _EventCounter:
    """Numbers the calls of functions within every module, over one forward pass."""

    def __init__(self, modules: Mapping[nn.Module, str]) -> None:
        self._names = modules
        self._counts: Counter[tuple[str, str]] = Counter()
        self._running: list[nn.Module] = []
        self._layers = 0

    @contextmanager
    def hooked(self) -> Iterator[None]:
        with ExitStack() as stack:
            for module in self._names:
                stack.callback(module.register_forward_pre_hook(self._enter, prepend=True).remove)
                stack.callback(module.register_forward_hook(self._leave, always_call=True).remove)
            yield

    def restart(self) -> None:
        """Starts a pass."""
        self._counts.clear()
        self._running.clear()
        self._layers = 0

    def next(self, func: Callable[..., Any]) -> Event | None:
        """The event that a call of `func` is; None within a layer, and for what runtimes do not compute in integers."""
        kind = kind_of_function(func)
        if self._layers or kind not in COMPUTED:
            return None
        scope = self._names[self._running[-1]] if self._running else ""
        event = Event(scope, kind, self._counts[scope, kind])
        self._counts[scope, kind] += 1
        return event

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._running.append(module)
        self._layers += is_layer(module)

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if self._running and self._running[-1] is module:
            self._running.pop()
            self._layers -= is_layer(module)


class _Numbering(Follower):
    """Follows a pass, and writes down which event every operation is."""

    def __init__(self, model: nn.Module, inputs: Iterable[Tensor], batch: int, counter: _EventCounter) -> None:
        super().__init__(model, inputs, batch)
        self.events: dict[str, Event] = {}
        self._counter = counter

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        event, known = self._counter.next(func), len(self.operations)
        result = super().__torch_function__(func, types, args, kwargs)
        if event and len(self.operations) > known:
            self.events[next(reversed(self.operations))] = event
        return result


def find_points(model: nn.Module, network: Network, inputs: Any) -> tuple[Point, ...]:
    """Returns the tensors that integer runtimes quantize, in the order in which they are produced.

    Args:
        model: The network in float, in evaluation mode.
        network: What `trace` returned for it.
        inputs: One batch of its inputs, which takes the same path as all others.
    """
    counter = _EventCounter({module: name for name, module in model.named_modules()})
    given = tensors_in(inputs)
    with torch.inference_mode(False), torch.no_grad(), counter.hooked():
        numbering = _Numbering(model, given, len(given[0]), counter)
        with numbering.hooked(), numbering:
            call(model, inputs)
    operations = {operation.name: operation for operation in network.operations}
    points = []
    for name in dict.fromkeys(network.order):
        layer = name if name in network else ""
        producer: Operation = network[name] if layer else operations[name]
        is_followed = producer.kind in MODULE_KINDS.values() if layer else name in numbering.events
        if not is_followed or len(producer.writes) != 1 or network.tensors[producer.writes[0]].is_integer:
            continue
        tensor = network.tensors[producer.writes[0]]
        consumers = [operations[consumer] for consumer in tensor.consumers if consumer in operations]
        is_fused = len(tensor.consumers) == 1 and bool(consumers) and consumers[0].kind in FUSED
        readers = tuple(c for c in tensor.consumers if c in network and network[c].quantizes_input)
        points.append(
            Point(tensor.name, layer, numbering.events.get(name), producer.reads, readers, is_fused and not readers)
        )
    return tuple(points)


def formats_of(
    points: Iterable[Point], network: Network, policy: Mapping[str, Precision], operation_format: Format
) -> dict[str, Format]:
    """Returns the format of every tensor that is quantized where it is produced under a policy."""
    held: dict[str, Format] = {}  # tensor -> its format, fused ones as what they would have
    for layer in network:
        if layer.quantizes_input:
            held |= dict.fromkeys(layer.reads, policy.get(layer.name, FLOAT_PRECISION).input)
    found = {}
    for point in points:
        precision = policy.get(point.layer, FLOAT_PRECISION)
        if point.readers:
            format = policy.get(point.readers[0], FLOAT_PRECISION).input
        elif point.layer:
            format = FLOAT if precision.weight.is_float or precision.input.is_float else operation_format
        else:
            is_integer = bool(point.reads) and not any(held.get(read, FLOAT).is_float for read in point.reads)
            format = operation_format if is_integer else FLOAT
        held[point.tensor] = format
        if not (point.is_fused or format.is_float):
            found[point.tensor] = format
    return found


Treatment = Callable[[Tensor], Tensor | None]  # what happens to a tensor; None leaves it


class Placement(TorchFunctionMode):
    """Treats chosen tensors where they are produced, whenever the model runs: quantizes them, or looks at them."""

    def __init__(self, model: nn.Module, points: Iterable[Point]) -> None:
        super().__init__()
        self._model = model
        self._counter = _EventCounter({module: name for name, module in model.named_modules()})
        self._points = tuple(points)
        self._by_event: dict[Event, Treatment] = {}

    @contextmanager
    def treating(self, treatments: Mapping[str, Treatment], owners: Mapping[str, nn.Module]) -> Iterator[None]:
        """Applies treatments, by tensor, to every pass of the model while the context lasts.

        Args:
            treatments: What to do with each tensor.
            owners: The modules that run the layers, by layer.
        """
        self._by_event = {p.event: treatments[p.tensor] for p in self._points if p.event and p.tensor in treatments}
        with ExitStack() as stack:
            stack.callback(self._model.register_forward_pre_hook(self._start, prepend=True).remove)
            stack.enter_context(self._counter.hooked())
            for point in self._points:
                if point.layer and point.tensor in treatments:
                    hook = _on_output(treatments[point.tensor])
                    stack.callback(owners[point.layer].register_forward_hook(hook).remove)
            stack.callback(self._model.register_forward_hook(self._end, always_call=True).remove)
            yield

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Calls `func` and treats its result where it is one of the tensors."""
        event = self._counter.next(func)
        treatment = self._by_event.get(event) if event else None
        if treatment is None:
            return func(*args, **(kwargs or {}))
        given = args[0] if args else None
        # Autograd keeps what a function in place returns, so where it is watching, only the outcome is written back.
        source = given.clone() if torch.is_grad_enabled() and isinstance(given, Tensor) else given
        result = func(*([source] if args else []), *args[1:], **(kwargs or {}))
        treated = treatment(result) if isinstance(result, Tensor) else None
        if treated is None:
            return given if result is source else result
        return given.copy_(treated) if isinstance(given, Tensor) and result is source else treated

    def _start(self, module: nn.Module, args: Any) -> None:
        self._counter.restart()
        self.__enter__()  # type: ignore[no-untyped-call]

    def _end(self, module: nn.Module, args: Any, output: Any) -> None:
        self.__exit__(None, None, None)  # type: ignore[no-untyped-call]


def _on_output(treatment: Treatment) -> Any:
    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return treatment(output) if isinstance(output, Tensor) else None

    return hook
