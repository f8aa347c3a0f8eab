"""The simulated quantized model: one copy of the network whose weights and inputs take any policy's values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hwmodels import Format, Network, Precision
from search.errors import DataError
from search.quantize.affine import Range, quantize_input, quantize_weight
from search.quantize.ranges import Histogram, check_method, input_range, weight_scale
from search.trace import parameter_of, slow_attention

WeightChoice = tuple[str, Format]  # layer, weight format
InputChoice = tuple[str, Format]  # layer, input format


@dataclass(frozen=True)
class QuantizerSettings:
    """How ranges are chosen.

    Attributes:
        weight_range: `mse` or `minmax`, for the scale of every weight channel.
        input_range: `mse` or `minmax`, for the scale and zero point of every input.
    """

    weight_range: str = "mse"
    input_range: str = "mse"

    def __post_init__(self) -> None:
        check_method("quantizer.weight_range", self.weight_range)
        check_method("quantizer.input_range", self.input_range)


@dataclass
class Ranges:
    """The scales and zero points that formats use on one network, computed when first asked for.

    Attributes:
        weights: (layer, format) to one scale per output channel.
        inputs: (layer, format) to the input's range.
    """

    weights: dict[WeightChoice, Tensor] = field(default_factory=dict)
    inputs: dict[InputChoice, Range] = field(default_factory=dict)


class QuantizedModel:
    """Simulates policies on one folded network, in place: applying a policy costs a few pointer swaps.

    Weights are quantized once per (layer, format) and kept; inputs are quantized by a hook in front of each layer.

    Attributes:
        model: The network as the policy last applied leaves it.
        network: Its layers.
        ranges: The scales and zero points used so far.
    """

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        settings: QuantizerSettings | None = None,
        ranges: Ranges | None = None,
        reuse_memory: bool = False,
    ) -> None:
        """Takes over `model`, which must be a folded copy nobody else uses, in evaluation mode.

        Args:
            model: The network.
            network: What `trace(model, ...)` returned.
            settings: How ranges are chosen.
            ranges: Known ranges, such as a plan's; a model with all of them needs no calibration.
            reuse_memory: Whether quantized inputs share one block of memory in inference mode, each valid only until
                the next layer runs. `experiments/overhead` says what it saves; leave it off where hooks keep inputs.
        """
        self.model = model
        self.network = network
        self.settings = settings or QuantizerSettings()
        self.ranges = ranges or Ranges()
        self._owners = {layer.name: parameter_of(model, layer.name) for layer in network}
        self._float = {name: self.weight(name).detach().clone() for name in network.names}
        self._quantized: dict[WeightChoice, Tensor] = {}
        self._seen: dict[str, Histogram] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._reuse_memory = reuse_memory
        self._memory = torch.empty(0)

    def weight(self, layer: str) -> Tensor:
        """The weight a layer holds now."""
        owner, name = self._owners[layer]
        return owner.get_parameter(name)

    def float_weight(self, layer: str) -> Tensor:
        """The weight a layer has in float."""
        return self._float[layer]

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Watches the inputs of every layer over one forward pass in float, to place ranges later.

        Args:
            batches: Callables' arguments as `search.tasks.task.call` takes them.

        Raises:
            DataError: If a layer's input holds NaN or infinite values, or there is no batch.
        """
        from search.tasks.task import call

        self.apply({})
        self._seen = {layer.name: Histogram() for layer in self.network if layer.quantizes_input}
        watching = [
            self._owners[name][0].register_forward_pre_hook(self._watch(name), with_kwargs=True) for name in self._seen
        ]
        count = 0
        try:
            with exact_inference():
                for inputs in batches:
                    call(self.model, inputs)
                    count += 1
        finally:
            for handle in watching:
                handle.remove()
        if not count:
            raise DataError("the calibration split is empty; ranges need at least one batch")

    def _watch(self, layer: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                self._seen[layer].add(_first_tensor(args, kwargs))
            except ValueError as error:
                raise DataError(
                    f"layer {layer}: {error} in its calibration input; check the data and the model"
                ) from error

        return hook

    def weight_scale(self, layer: str, format: Format) -> Tensor:
        """Returns the scale of every output channel, shape `(channels,)`."""
        key = (layer, format)
        if key not in self.ranges.weights:
            axis = self.network[layer].channel_axis
            self.ranges.weights[key] = weight_scale(self._float[layer], format, axis, self.settings.weight_range)
        return self.ranges.weights[key]

    def input_range(self, layer: str, format: Format) -> Range:
        """Returns the range of a layer's input.

        Raises:
            DataError: If the layer's input was never seen.
        """
        key = (layer, format)
        if key not in self.ranges.inputs:
            if layer not in self._seen or not self._seen[layer].counts.any():
                raise DataError(
                    f"no range is known for the {format} input of layer {layer}: no calibration batch reached it"
                )
            self.ranges.inputs[key] = input_range(self._seen[layer], format, self.settings.input_range)
        return self.ranges.inputs[key]

    def alter(self, parameters: Mapping[str, Tensor]) -> None:
        """Replaces parameters of the network for good, as a repair does; weights become the new float weights.

        Raises:
            DataError: If a parameter does not exist or has another shape.
        """
        known = dict(self.model.named_parameters())
        layers = {id(self.weight(name)): name for name in self.network.names}
        self.apply({})
        for name, value in parameters.items():
            if name not in known or known[name].shape != value.shape:
                raise DataError(f"cannot alter parameter {name}: the network has none of that name and shape")
            known[name].data = value.clone()
            layer = layers.get(id(known[name]))
            if layer:
                self._float[layer] = known[name].data
                self._quantized = {key: codes for key, codes in self._quantized.items() if key[0] != layer}

    def apply(self, policy: Mapping[str, Precision]) -> nn.Module:
        """Gives every layer its precision, float where the policy names none; returns the same module every time."""
        for name in self.network.names:
            precision = policy.get(name, Precision())
            owner, parameter = self._owners[name]
            owner.get_parameter(parameter).data = self._quantized_weight(name, precision.weight)
            if name in self._hooks:
                self._hooks.pop(name).remove()
            if not precision.input.is_float:
                quantizer = self._input_quantizer(self.input_range(name, precision.input), precision.input)
                self._hooks[name] = owner.register_forward_pre_hook(quantizer, with_kwargs=True)
        return self.model

    def _input_quantizer(self, range_: Range, format: Format) -> Any:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x = _first_tensor(args, kwargs)
            quantized = quantize_input(x, range_, format, self._memory_like(x))
            return ((quantized, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): quantized})

        return hook

    def _memory_like(self, x: Tensor) -> Tensor | None:
        """The shared memory in the shape of `x`; None where it cannot be used."""
        if not (self._reuse_memory and torch.is_inference_mode_enabled() and x.is_contiguous()):
            return None
        if self._memory.numel() < x.numel():
            self._memory = torch.empty(x.numel(), device=x.device)
        return self._memory[: x.numel()].view(x.shape)

    def _quantized_weight(self, layer: str, format: Format) -> Tensor:
        if format.is_float:
            return self._float[layer]
        key = (layer, format)
        if key not in self._quantized:
            scale = self.weight_scale(layer, format)
            axis = self.network[layer].channel_axis
            values = quantize_weight(self._float[layer], scale, format, axis)
            self._quantized[key] = values.to(self._float[layer].dtype)
        return self._quantized[key]


def _first_tensor(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))  # type: ignore[no-any-return]


@contextmanager
def exact_inference() -> Iterator[None]:
    """Runs without gradients and without the fused attention kernels, which would bypass the layers inside."""
    with slow_attention(), torch.inference_mode():
        yield
