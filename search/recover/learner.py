"""A simulated network that learns under its policy.

The network is not rewritten. Quantized weights, computed with gradients, are put where the weights are, as the engine
does; after a backward pass, what the network's parameters have for a gradient goes on through the fake quantization.
So weights that layers share, that are used several times, or that sit inside an LSTM need no special care.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hwmodels import Format, Precision
from hwmodels.precision import FLOAT_PRECISION
from search.quantize.affine import Range
from search.quantize.observe import first_tensor
from search.quantize.placement import Placement, formats_of
from search.quantize.simulate import QuantizedModel
from search.quantize.straight_through import fake_quantize_input
from search.recover.learned import Learned, LearnedRange, LearnedWeight
from search.trace import slow_attention


class Learner:
    """Learns the quantized weights of a network, their biases, and the ranges of weights and inputs.

    Of weights that layers share, the last layer's format counts, as it does when a policy is applied. Layers that read
    the same tensors keep having one range.
    """

    def __init__(
        self,
        simulated: QuantizedModel,
        policy: Mapping[str, Precision],
        spreads: Mapping[str, float],
        learn_ranges: bool = True,
    ) -> None:
        """Starts from the network as the policy leaves it, gains and biases repaired in the loop included.

        Args:
            simulated: The network, which will be altered.
            policy: What is quantized.
            spreads: Standard deviation of the outputs of layers with a bias.
            learn_ranges: Whether to learn the scales and codebooks of weights, and the static ranges of inputs.
        """
        self._simulated, self._learn_ranges = simulated, learn_ranges
        self._precisions = {name: policy.get(name, FLOAT_PRECISION) for name in simulated.network.names}
        holders = {simulated.weight_name(name): name for name in self._precisions}
        simulated.apply(policy)
        self._weights = {
            name: LearnedWeight(simulated, name, self._precisions[name], spreads.get(name, 0.0), learn_ranges)
            for name in holders.values()
            if not self._precisions[name].weight.is_float
        }
        simulated.apply({})
        self._factors: dict[Hashable, Tensor] = {}
        self._inputs = {
            name: self._range(simulated.network[name].reads or name, format, simulated.input_range(name, format))
            for name, precision in self._precisions.items()
            if (format := precision.input).has_static_range
        }
        operation_format = Format.parse(simulated.settings.operation_format)
        self._formats = formats_of(simulated.points, simulated.network, self._precisions, operation_format)
        self._readers = {point.tensor: point.readers for point in simulated.points}
        self._tensors = {
            tensor: self._range(tensor, format, simulated.tensor_range(tensor, format))
            for tensor, format in self._formats.items()
            if format.has_static_range and not self._readers[tensor]
        }
        self._placed: list[tuple[nn.Parameter, Tensor]] = []

    def _range(self, key: Hashable, format: Format, found: Range) -> LearnedRange:
        """A static range; those of one key and format are moved by the same factor."""
        scale = torch.tensor(found.scale, device=next(self._simulated.model.parameters()).device)
        moved = self._factors.setdefault((key, format), torch.zeros_like(scale, requires_grad=self._learn_ranges))
        return LearnedRange(format, Learned(scale, moved), found.zero_point)

    @property
    def tensors(self) -> list[Tensor]:
        """What an optimizer changes of weights and biases."""
        return [learned.moved for w in self._weights.values() for learned in (w.weight, w.bias) if learned]

    @property
    def ranges(self) -> list[Tensor]:
        """What an optimizer changes of ranges; empty where they are not learned."""
        if not self._learn_ranges:
            return []
        of_weights = [learned.moved for w in self._weights.values() for learned in w.ranges.values()]
        return [*of_weights, *self._factors.values()]

    @property
    def leaves(self) -> list[Tensor]:
        """Everything that an optimizer changes."""
        return [*self.tensors, *self.ranges]

    @contextmanager
    def running(self) -> Iterator[nn.Module]:
        """The network, its inputs quantized with gradients, and back in float afterwards; `place` puts the weights."""
        simulated, model = self._simulated, self._simulated.model
        owners = {name: simulated.owner(name) for name in self._precisions}
        required = {parameter: parameter.requires_grad for parameter in model.parameters()}
        simulated.apply({name: Precision(precision.weight) for name, precision in self._precisions.items()})
        model.requires_grad_(False)
        for parameter in self._parameters():
            parameter.requires_grad_(True)
        with ExitStack() as stack:
            stack.enter_context(slow_attention())
            if any(isinstance(module, nn.RNNBase) for module in model.modules()):  # cuDNN's train in training mode only
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            for name, precision in self._precisions.items():
                if not precision.input.is_float:
                    hook = _before(self._quantizer(name, precision.input, self._inputs.get(name)))
                    stack.callback(owners[name].register_forward_pre_hook(hook, with_kwargs=True).remove)
            if treatments := {name: self._tensor_quantizer(name, format) for name, format in self._formats.items()}:
                stack.enter_context(Placement(model, simulated.points).treating(treatments, owners))
            try:
                yield model
            finally:
                for parameter, flag in required.items():
                    parameter.requires_grad_(flag).grad = None
                simulated.apply({})

    def _parameters(self) -> Iterator[nn.Parameter]:
        for name, weight in self._weights.items():
            yield self._simulated.weight(name)
            if weight.bias:
                yield self._bias(name)

    def _bias(self, layer: str) -> nn.Parameter:
        return self._simulated.owner(layer).get_parameter("bias")

    def _tensor_quantizer(self, tensor: str, format: Format) -> Callable[[Tensor], Tensor]:
        if readers := self._readers[tensor]:
            return self._quantizer(readers[0], format, self._inputs.get(readers[0]))
        return self._quantizer(None, format, self._tensors.get(tensor))

    def _quantizer(self, layer: str | None, format: Format, range_: LearnedRange | None) -> Callable[[Tensor], Tensor]:
        axis = self._simulated.feature_axis(layer) if layer else -1
        if range_ is None:
            return lambda x: fake_quantize_input(x, format, axis)
        return lambda x: range_.quantize(x, axis)

    def place(self) -> None:
        """Puts what was learned into the network: quantized weights, biases and ranges."""
        simulated = self._simulated
        self._placed.clear()
        for name, learned in self._inputs.items():
            simulated.ranges.inputs[name, learned.format] = learned.range
        for name, learned in self._tensors.items():
            simulated.ranges.tensors[name, learned.format] = learned.range
        for name, weight in self._weights.items():
            quantized, parameters = weight.quantized()
            simulated.ranges.weights[name, weight.format] = {key: value.detach() for key, value in parameters.items()}
            self._put(simulated.weight(name), quantized, quantized)
            if weight.bias:
                parameter = self._bias(name)
                bias = weight.bias.value.to(parameter.dtype)
                self._put(parameter, bias, simulated.integer_bias(name, self._precisions[name], bias))

    def _put(self, parameter: nn.Parameter, learned: Tensor, value: Tensor) -> None:
        parameter.data = value.detach()
        self._placed.append((parameter, learned))

    def pass_gradients(self) -> None:
        """Passes the gradients of the network's parameters on to what is learned."""
        for parameter, learned in self._placed:
            if parameter.grad is not None:
                torch.autograd.backward(learned, parameter.grad.to_dense())
                parameter.grad = None

    @torch.no_grad()
    def keep(self) -> None:
        """Alters the simulated network for good: applying the policy gives what was learned, bit for bit.

        Weights are kept as quantized, so that repairs which compare them with their quantized values find no error.
        What was repaired in the loop is part of what was learned, so nothing is repaired there any more.
        """
        self._simulated.repair_with("none")
        self.place()
        simulated, ranges = self._simulated, self._simulated.ranges.copy()
        altered = {}
        for name, weight in self._weights.items():
            altered[simulated.weight_name(name)] = weight.settled()
            if weight.bias and (bias := simulated.bias_name(name)):
                altered[bias] = weight.bias.value
        simulated.alter(altered)
        for name, weight in self._weights.items():
            simulated.ranges.weights[name, weight.format] = ranges.weights[name, weight.format]

    def state(self) -> list[Tensor]:
        """What was learned so far, copied."""
        return [moved.detach().clone() for moved in self.leaves]

    @torch.no_grad()
    def load(self, state: list[Tensor]) -> None:
        """Goes back to what `state` returned."""
        for moved, saved in zip(self.leaves, state, strict=True):
            moved.copy_(saved)


def _before(quantize: Callable[[Tensor], Tensor]) -> Any:
    """Quantizes the input of a module before it runs."""

    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        quantized = quantize(first_tensor(args, kwargs))
        return ((quantized, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): quantized})

    return hook
