"""The simulated quantized model: one copy of the network whose weights and inputs take any policy's values."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hwmodels import Format, Network, Precision
from hwmodels.precision import FLOAT_PRECISION
from search.errors import DataError
from search.quantize.formats import input_quantizer
from search.quantize.gain import with_gain
from search.quantize.layers import QuantizedLayers
from search.quantize.observe import first_tensor
from search.quantize.placement import Placement, Point, find_points, formats_of
from search.quantize.settings import QuantizerSettings, Ranges
from search.trace import slow_attention

BIAS_HIGHEST = 2**31 - 1


class QuantizedModel(QuantizedLayers):
    """Simulates policies on one folded network, in place: applying a policy swaps the pointers of what changed.

    What a layer becomes is found once for each of its precisions (see `QuantizedLayers`); inputs are quantized by a
    hook in front of each layer. Applying float again gives the folded network back bit for bit.

    Attributes:
        points: The tensors that are quantized where they are produced; empty with `placement=inputs`.
    """

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        settings: QuantizerSettings | None = None,
        ranges: Ranges | None = None,
        reuse_memory: bool = False,
        points: tuple[Point, ...] = (),
    ) -> None:
        """Takes over `model`, which must be a folded copy nobody else uses, in evaluation mode.

        Args:
            model: The network.
            network: What `trace(model, ...)` returned.
            settings: How tensors are quantized.
            ranges: Known ranges, such as a plan's; a model with all of them needs no calibration.
            reuse_memory: Whether quantized inputs share one block of memory in inference mode, each valid only until
                the next layer runs. `experiments/engine` says what it saves; leave it off where hooks keep inputs.
            points: Tensors quantized where they are produced, such as a plan's; calibration finds them where the
                settings ask for `placement=full`.
        """
        super().__init__(model, network, settings, ranges)
        self.points = points
        self._applied: dict[str, Precision] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._reuse_memory = reuse_memory
        self._memory = torch.empty(0, device=next(iter(self._float.values())).device)
        self._placed: dict[str, Format] = {}
        self._treating = ExitStack()

    def calibrate(self, batches: Iterable[Any]) -> None:
        """Observes the inputs of every layer over one forward pass in float, to place ranges later.

        Ranges of inputs that are known already are forgotten.

        Args:
            batches: Callables' arguments as `search.tasks.task.call` takes them.

        Raises:
            DataError: If a layer's input holds NaN or infinite values, or there is no batch.
        """
        from search.tasks.task import call

        self.apply({})
        self.ranges.inputs.clear()
        self.ranges.tensors.clear()
        self._cache.drop(lambda key: True)
        batches = iter(batches)
        first = next(batches, None)
        if first is None:
            raise DataError("the calibration split is empty; ranges need at least one batch")
        if self.settings.placement == "full" and not self.points:
            self.points = find_points(self.model, self.network, first)
        owners = {name: self.owner(name) for name in self.network.names}
        with ExitStack() as watching:
            watching.enter_context(self._seen.watching(owners, self.repairable if self.settings.repairs else ()))
            looks = self._seen.looks(
                [point.tensor for point in self.points if not point.is_fused], self.network.outputs
            )
            watching.enter_context(Placement(self.model, self.points).treating(looks, owners))
            watching.enter_context(exact_inference())
            for inputs in chain([first], batches):
                call(self.model, inputs)

    def repair_with(self, repair: str) -> None:
        """Changes what applying a choice repairs from now on; the network is left in float.

        Args:
            repair: One of `search.quantize.settings.LOOP_REPAIRS`.

        Raises:
            ConfigError: If there is no such repair, or calibration has not observed what it needs.
        """
        self.apply({})
        super().repair_with(repair)

    def alter(self, tensors: Mapping[str, Tensor], keep_ranges: bool = False) -> None:
        """Replaces parameters and buffers of the float network for good, as a repair does.

        Args:
            tensors: New values by name.
            keep_ranges: Whether altered weights keep their scales, as values that lie on a format's grid must.

        Raises:
            DataError: If the network has none of that name and shape.
        """
        known = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        layers = defaultdict(list)
        for name in self.network.names:
            layers[self.weight_name(name)].append(name)
        biases = {bias: name for name in self.network.names if (bias := self.bias_name(name))}
        self.apply({})
        for name, value in tensors.items():
            if name not in known or known[name].shape != value.shape:
                raise DataError(f"cannot alter {name}: the network has none of that name and shape")
            known[name].data = value.detach().to(known[name].dtype).clone()
            for layer in layers.get(name, []):
                self._float[layer] = known[name].data
                self._forget(layer, keep_ranges)
            if name in biases:
                self._float_bias[biases[name]] = known[name].data
                self._forget(biases[name], keep_ranges=True)

    def altered(self, original: nn.Module, policy: Mapping[str, Precision]) -> dict[str, Tensor]:
        """Returns the parameters and buffers in which the network, repaired under `policy`, differs from `original`.

        Weights are compared, and returned, as they are in float, with the gains that the policy's precisions give
        them; biases as the policy leaves them.
        """
        weights = {
            self.weight_name(layer): self.stored_weight(layer, policy.get(layer, FLOAT_PRECISION))
            for layer in self.network.names
        }
        applied = dict(self._applied)
        model = self.apply(policy)
        found = {
            name: weights.get(name, value.detach()).clone()
            for name, value in (*model.named_parameters(), *model.named_buffers())
        }
        self.apply(applied)
        expected = dict(original.named_parameters()) | dict(original.named_buffers())
        return {name: value for name, value in found.items() if not torch.equal(value, expected[name])}

    def fork(self) -> QuantizedModel:
        """Returns an independent copy in float: altering one leaves the other as it is."""
        applied = dict(self._applied)
        twin = QuantizedModel(
            copy.deepcopy(self.apply({})),
            self.network,
            self.settings,
            self.ranges.copy(),
            self._reuse_memory,
            self.points,
        )
        twin._seen, twin._cache = self._seen.copy(), self._cache.copy()
        self.apply(applied)
        return twin

    def apply(self, policy: Mapping[str, Precision]) -> nn.Module:
        """Gives every layer its precision, float where the policy names none; returns the same module every time.

        Only layers whose precision changes are touched.
        """
        changed = {}
        for name in self._owners:
            wanted, held = policy.get(name, FLOAT_PRECISION), self._applied.get(name, FLOAT_PRECISION)
            if wanted is not held and wanted != held:
                changed[name] = wanted
        self._check_ranges(changed)
        with torch.inference_mode(False), torch.no_grad():  # what is made here outlives the caller's mode
            for layer in dict.fromkeys(shared for name in changed for shared in self._sharing[name]):
                self._swap(layer, policy.get(layer, FLOAT_PRECISION))
        for name, wanted in changed.items():
            if wanted.input != self._applied.get(name, FLOAT_PRECISION).input:
                self._hook(name, wanted.input)
        self._applied |= changed
        if changed and self.points:
            self._place()
        return self.model

    def _check_ranges(self, changed: Mapping[str, Precision]) -> None:
        """Raises an error if a range or a repair cannot be found, before anything is touched."""
        if any(precision != FLOAT_PRECISION for precision in changed.values()):
            self._check_repair()
        for layer, precision in changed.items():
            if not precision.weight.is_float:
                self.weight_parameters(layer, precision.weight)
            if precision.input.has_static_range:
                self.input_range(layer, precision.input)

    def _swap(self, layer: str, precision: Precision) -> None:
        """Puts the values of a format where the layer's weight is, and the bias that goes with it."""
        values, bias, gain = self._repaired(layer, precision)
        self.weight(layer).data = values
        if layer in self._float_bias:
            self.owner(layer).get_parameter("bias").data = self.integer_bias(layer, precision, bias, gain)

    def integer_bias(self, layer: str, precision: Precision, bias: Tensor, gain: Tensor | None = None) -> Tensor:
        """With `placement=full`, the bias in 32-bit steps of input scale times weight scale, as integer kernels add.

        A channel whose bias does not fit, as one of all but dead weights, keeps it in float, as runtimes do.

        Args:
            layer: Whose bias.
            precision: Of the layer.
            bias: In float.
            gain: Of the weight's channels; without values, or None, where it has none.
        """
        if not (self.points and precision.weight.is_static_integer and precision.input.is_static_integer):
            return bias
        parameters = self.weight_parameters(layer, precision.weight)
        weight_scale = (with_gain(parameters, gain) if gain is not None and gain.numel() else parameters)["scale"]
        # A transposed convolution's groups share their scales.
        weight_scale = weight_scale.repeat(max(1, len(bias) // len(weight_scale)))
        step = self.input_range(layer, precision.input).scale * weight_scale
        codes = (bias / step).round()
        return torch.where(codes.abs() <= BIAS_HIGHEST, codes * step, bias).to(bias.dtype)

    def _place(self) -> None:
        """Quantizes tensors where they are produced, as the policy applied now has it."""
        operation_format = Format.parse(self.settings.operation_format)
        placed = formats_of(self.points, self.network, self._applied, operation_format)
        if placed == self._placed:
            return
        self._treating.close()
        self._placed = placed
        if placed:
            owners = {name: self.owner(name) for name in self.network.names}
            treatments = {tensor: self._tensor_quantizer(tensor, format) for tensor, format in placed.items()}
            self._treating.enter_context(Placement(self.model, self.points).treating(treatments, owners))

    def _tensor_quantizer(self, tensor: str, format: Format) -> Callable[[Tensor], Tensor]:
        readers = next(point.readers for point in self.points if point.tensor == tensor)
        feature_axis = self.feature_axis(readers[0]) if readers else -1
        if not format.has_static_range:
            return input_quantizer(format, None, feature_axis)
        range_ = self.input_range(readers[0], format) if readers else self.tensor_range(tensor, format)
        return input_quantizer(format, range_, feature_axis)

    def _hook(self, layer: str, format: Format) -> None:
        """Puts the quantizer of a format in front of a layer, in place of the one that is there."""
        if layer in self._hooks:
            self._hooks.pop(layer).remove()
        if format.is_float:
            return
        owner = self.owner(layer)
        quantize = self.input_quantizer(layer, format)

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            x = first_tensor(args, kwargs)
            quantized = quantize(x, self._memory_like(x))
            return ((quantized, *args[1:]), kwargs) if args else (args, kwargs | {next(iter(kwargs)): quantized})

        self._hooks[layer] = owner.register_forward_pre_hook(hook, with_kwargs=True)

    def _memory_like(self, x: Tensor) -> Tensor | None:
        """The shared memory in the shape of `x`; None where it cannot be used."""
        if not (self._reuse_memory and torch.is_inference_mode_enabled() and x.is_contiguous()):
            return None
        if self._memory.numel() < x.numel():
            self._memory = torch.empty(x.numel(), device=x.device)
        return self._memory[: x.numel()].view(x.shape)


@contextmanager
def exact_inference() -> Iterator[None]:
    """Runs without gradients and without the fused attention kernels, which would bypass the layers inside."""
    with slow_attention(), torch.inference_mode():
        yield
