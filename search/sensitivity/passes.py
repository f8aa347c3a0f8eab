"""Passes of the network at a base, in which one can see what layers read and write, and the gradients there.

The network runs as it is, quantized with straight-through gradients where the base quantizes. Parameters need no
gradients for this: what the first layers read and what embeddings return are the leaves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hwmodels import Precision
from search.kinds import MODULE_KINDS, kind_of
from search.quantize.observe import first_tensor
from search.quantize.placement import Placement
from search.quantize.simulate import QuantizedModel
from search.sensitivity.changes import Site, formats_at, quantized_at
from search.sensitivity.choices import Base
from search.tasks.task import Task
from search.trace import slow_attention


@dataclass(eq=False)
class Visit:
    """One time that a layer runs, or that a tensor is produced which is quantized there.

    Attributes:
        site: The layer's input, or the tensor.
        module: The layer's module; None for a tensor.
        raw: What the layer is given, or the tensor, before it is quantized.
        used: The same as the base quantizes it.
        live: `used` as autograd knows it, whose gradient is this visit's alone.
        versions: How often `raw` and `used` had been written to in place.
        shape: Shape of what the layer returns, or of the tensor.
        to_input: Gradients at `used`, through this layer only, one for every backward pass.
        to_output: Gradients at what the layer returns.
    """

    site: Site
    module: nn.Module | None
    raw: Tensor
    used: Tensor
    live: Tensor
    versions: tuple[int, int]
    shape: tuple[int, ...] = ()
    to_input: list[Tensor] = field(default_factory=list)
    to_output: list[Tensor] = field(default_factory=list)

    @property
    def is_intact(self) -> bool:
        """Whether nothing has written to `raw` and `used` since."""
        return (self.raw._version, self.used._version) == self.versions

    @property
    def bytes(self) -> int:
        """Memory of what is read and written, once."""
        return (self.raw.numel() + math.prod(self.shape)) * self.used.element_size()


class Pass:
    """One run of the network.

    Attributes:
        visits: The layers that ran, and the tensors produced, in order.
        outputs: What the task reads, detached.
        live_outputs: The same as autograd knows it.
    """

    def __init__(self, visits: list[Visit], outputs: Tensor, leaves: list[Tensor], parameters: list[Tensor]) -> None:
        """Takes over what a run left behind."""
        self.visits = visits
        self.outputs = outputs.detach()
        self.live_outputs = outputs
        self._leaves, self._parameters = leaves, parameters

    def backward(self, cotangent: Tensor) -> list[Tensor]:
        """Adds a gradient to every visit that the outputs depend on; returns those of the parameters asked for.

        Args:
            cotangent: Derivative of something by the outputs, in their shape.
        """
        asked = [*self._leaves, *self._parameters]
        if not self.live_outputs.requires_grad:
            return [torch.zeros_like(parameter) for parameter in self._parameters]
        with requiring_gradients(self._parameters):
            found = torch.autograd.grad(
                self.live_outputs, asked, cotangent.to(self.live_outputs), retain_graph=True, allow_unused=True
            )
        gradients = zip(found[len(self._leaves) :], self._parameters, strict=True)
        return [torch.zeros_like(p) if g is None else g.to_dense() for g, p in gradients]


@contextmanager
def requiring_gradients(parameters: Iterable[Tensor], required: bool = True) -> Iterator[None]:
    """Parameters take part in differentiation, or do not, while the context lasts."""
    flags = {parameter: parameter.requires_grad for parameter in parameters}
    for parameter in flags:
        parameter.requires_grad_(required)
    try:
        yield
    finally:
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


class Passes:
    """Runs the network at a base."""

    def __init__(self, simulated: QuantizedModel, task: Task, base: Base, needed: Collection[Site] = ()) -> None:
        """Creates passes.

        Args:
            simulated: The network.
            task: Runs it on a batch.
            base: The precisions it runs with.
            needed: Tensors to be visited where they are produced, besides those that the base quantizes.
        """
        self._simulated, self._task, self._base = simulated, task, base
        self._formats = formats_at(simulated, base)
        self._produced = [site for site in dict.fromkeys([*self._formats, *needed]) if site.is_produced]
        self._copied: set[Site] = set()
        self._keeps = True
        names = simulated.network.names
        self._modules = {name: m for name in names if kind_of(m := simulated.owner(name), MODULE_KINDS)}

    def copy_overwritten(self, visits: Iterable[Visit]) -> bool:
        """From now on, copies what these visits saw overwritten; returns whether there is anything."""
        overwritten = {visit.site for visit in visits if not visit.is_intact}
        self._copied |= overwritten
        return bool(overwritten)

    def run(self, batch: Any, parameters: Sequence[str] = (), gradients: bool = True, keep: bool = True) -> Pass:
        """Runs the network.

        Args:
            batch: As the task takes it.
            parameters: Names of parameters whose gradients are wanted as well.
            gradients: Whether there will be backward passes.
            keep: Whether visits keep the gradients that arrive at them. Those that are to be differentiated again must
                not be: they would keep their graph, and their graph them.
        """
        visits: list[Visit] = []
        leaves: list[Tensor] = []
        self._keeps = keep
        with torch.inference_mode(False), torch.set_grad_enabled(gradients), self._set_up(parameters) as model:
            with self._watching(visits, leaves):
                outputs = self._task.outputs(model, batch)
            return Pass(visits, outputs, leaves, [model.get_parameter(name) for name in parameters])

    @contextmanager
    def _set_up(self, parameters: Sequence[str]) -> Iterator[nn.Module]:
        """The network with the base's weights and biases, its inputs left to `_watching`."""
        simulated, base = self._simulated, self._base
        model = simulated.apply({name: Precision(precision.weight) for name, precision in base.items()})
        for name, precision in base.items():
            if simulated.bias_name(name):
                bias = simulated.owner(name).get_parameter("bias")
                bias.data = simulated.integer_bias(name, precision, bias.data)
        with ExitStack() as stack:
            stack.enter_context(requiring_gradients(model.parameters(), False))
            stack.enter_context(requiring_gradients(model.get_parameter(name) for name in parameters))
            stack.enter_context(slow_attention())
            if any(isinstance(module, nn.RNNBase) for module in model.modules()):  # cuDNN's train in training mode only
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield model

    @contextmanager
    def _watching(self, visits: list[Visit], leaves: list[Tensor]) -> Iterator[None]:
        simulated = self._simulated
        with ExitStack() as hooks:
            for name, module in self._modules.items():
                running: list[Visit] = []  # calls of this layer that have begun
                enter = partial(self._enter, Site(name), visits, running, leaves)
                leave = partial(self._leave, running, leaves)
                hooks.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                hooks.callback(module.register_forward_hook(leave, prepend=True).remove)
            if self._produced:
                owners = {name: simulated.owner(name) for name in simulated.network.names}
                treatments = {site.name: self._treatment(site, visits) for site in self._produced}
                hooks.enter_context(Placement(simulated.model, simulated.points).treating(treatments, owners))
            yield

    def _enter(
        self,
        site: Site,
        visits: list[Visit],
        running: list[Visit],
        leaves: list[Tensor],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Before a layer runs: quantizes what it is given, and stands by for the gradient there."""
        x = first_tensor(args, kwargs)
        if torch.is_grad_enabled() and x.is_floating_point() and not x.requires_grad:
            x = x.detach().requires_grad_()
            leaves.append(x)
        visit, used = self._visit(site, module, x)
        visits.append(visit)
        running.append(visit)
        return ((used, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): used})

    def _leave(
        self, running: list[Visit], leaves: list[Tensor], module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor:
        """After a layer has run: stands by for the gradient at what it returns."""
        visit = running.pop()
        visit.shape = tuple(output.shape)
        if torch.is_grad_enabled():
            if not output.requires_grad:
                output = output.detach().requires_grad_()
                leaves.append(output)
            if self._keeps:
                output.register_hook(visit.to_output.append)  # type: ignore[no-untyped-call]
        return output

    def _treatment(self, site: Site, visits: list[Visit]) -> Callable[[Tensor], Tensor]:
        def treat(x: Tensor) -> Tensor:
            visit, used = self._visit(site, None, x)
            visit.shape = tuple(x.shape)
            visits.append(visit)
            return used

        return treat

    def _visit(self, site: Site, module: nn.Module | None, x: Tensor) -> tuple[Visit, Tensor]:
        """Quantizes `x` as the base has it; returns a tensor of its own as well, for the network to go on with."""
        format = self._formats.get(site)
        is_copied = site in self._copied
        if format is None:
            live = x.clone() if is_copied else x.view_as(x)
        else:
            live = quantized_at(self._simulated, site, format, x)
        raw, used = x.detach(), live.detach()
        if is_copied:
            raw, used = raw.clone(), used.clone()
        visit = Visit(site, module, raw, used, live, (raw._version, used._version))
        if self._keeps and live.requires_grad:
            live.register_hook(visit.to_input.append)  # type: ignore[no-untyped-call]
        return visit, live
