"""What each layer of a network becomes in each precision, whatever precisions the others have."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hwmodels import FLOAT, Format, Network, Precision
from search.errors import ConfigError, DataError
from search.quantize.affine import Range
from search.quantize.cache import TensorCache
from search.quantize.float_network import FloatNetwork
from search.quantize.formats import Parameters, input_quantizer, quantize_weight
from search.quantize.gain import gained_weight, matching_gain, output_deviation, takes_gain, with_gain
from search.quantize.inputs import InputQuantizer
from search.quantize.observe import Observations
from search.quantize.ranges import input_range, weight_parameters
from search.quantize.settings import QuantizerSettings, Ranges
from search.quantize.shift import expected_shift

Chosen = tuple[str, Format | Precision]  # layer, and the format of its weight or its whole precision


class QuantizedLayers(FloatNetwork):
    """Ranges, quantized weights and free repairs of single layers, each found once and kept within a memory limit.

    With `repair=bias`, a layer with a bias gets the mean output back that it has in float: what its quantized weight
    and input shift, on average over calibration data, comes off the bias. With `repair=batch_norm`, a gain per output
    channel, which multiplies weight and scale alike, first gives the output its standard deviation back (see
    `search.quantize.gain`; formats without scales of every channel's own, and weights that layers share, have none).
    What comes before the layer is as in float, so that a repair depends on the layer's own precision alone; the input
    quantizer's part, and the deviation, are found on a small sample.

    Attributes:
        settings: How tensors are quantized.
        ranges: The scales, zero points and codebooks used so far, without gains; a repair may write its own.
    """

    def __init__(
        self,
        model: nn.Module,
        network: Network,
        settings: QuantizerSettings | None = None,
        ranges: Ranges | None = None,
    ) -> None:
        """Takes over `model` with its weights and biases as they are now."""
        super().__init__(model, network)
        self.settings = settings or QuantizerSettings()
        self.ranges = ranges or Ranges()
        device = next(iter(self._float.values())).device
        self._cache: TensorCache[Chosen] = TensorCache(device, self.settings.memory_bytes)
        self._seen = Observations(network)

    def weight_parameters(self, layer: str, format: Format) -> Parameters:
        """Returns what places a format on a layer's float weight: scales, zero points, codebooks.

        Raises:
            DataError: If the weight holds NaN or infinite values.
        """
        key = (layer, format)
        if key not in self.ranges.weights:
            axis = self.network[layer].channel_axis
            try:
                with torch.inference_mode(False), torch.no_grad():  # repairs may learn from here
                    found = weight_parameters(
                        self._float[layer], format, axis, self.settings.weight_range, self.settings.percentile
                    )
            except ValueError as error:
                raise DataError(f"layer {layer}: {error} in its weight, which is to be {format}") from error
            self.ranges.weights[key] = found
        return self.ranges.weights[key]

    def input_range(self, layer: str, format: Format) -> Range:
        """Returns the static range of a layer's input.

        Raises:
            DataError: If the layer's input was never seen.
        """
        key = (layer, format)
        if key not in self.ranges.inputs:
            seen = self._seen.histogram(layer, f"the {format} input")
            self.ranges.inputs[key] = input_range(seen, format, self.settings.input_range, self.settings.percentile)
        return self.ranges.inputs[key]

    def tensor_range(self, tensor: str, format: Format) -> Range:
        """Returns the static range of a tensor that is quantized where it is produced.

        Raises:
            DataError: If it was never seen.
        """
        key = (tensor, format)
        if key not in self.ranges.tensors:
            settings, is_output = self.settings, tensor in self.network.outputs
            method = settings.output_range if is_output else settings.input_range
            seen, sample = self._seen.tensor(tensor)
            self.ranges.tensors[key] = input_range(seen, format, method, settings.percentile, sample)
        return self.ranges.tensors[key]

    def quantized_weight(self, layer: str, format: Format) -> Tensor:
        """Returns the values that a layer's weight takes in a format where nothing is repaired."""
        if format.is_float:
            return self._float[layer]
        return self._cache.get((layer, format), lambda: (self._quantized(layer, format),))[0]

    def stored_weight(self, layer: str, precision: Precision) -> Tensor:
        """Returns the float weight that is quantized under a precision: with the gain that repairs it, if there is one.

        In the format's `stored_parameters` it takes the values that `apply` gives the layer, bit for bit.
        """
        weight, (*_, gain) = self._float[layer], self._repaired(layer, precision)
        return gained_weight(weight, gain, self.network[layer].channel_axis) if gain.numel() else weight

    def stored_parameters(self, layer: str, precision: Precision) -> Parameters:
        """Returns what places a precision's weight format on the layer's `stored_weight`."""
        parameters, (*_, gain) = self.weight_parameters(layer, precision.weight), self._repaired(layer, precision)
        return with_gain(parameters, gain) if gain.numel() else parameters

    def repair_with(self, repair: str) -> None:
        """Changes how layers are repaired; see `QuantizedModel.repair_with`."""
        settings = self.settings.with_repair(repair)
        if settings.repairs and self._is_unprepared:
            raise ConfigError(
                f"quantizer.repair={repair} needs what calibration observes only if asked to; calibrate with "
                f"quantizer.repair={repair}, or with auto for all of them"
            )
        self.settings = settings
        self._cache.drop(lambda key: isinstance(key[1], Precision))

    @property
    def repairable(self) -> list[str]:
        """The layers that repairs within the loop can reach: linear layers and convolutions with a bias."""
        return list(self._float_bias)

    @property
    def _is_unprepared(self) -> bool:
        return bool(self.repairable) and not self._seen.has_samples

    def _check_repair(self) -> None:
        """Raises ConfigError if nobody has said yet what is repaired, or calibration has not prepared it."""
        if self.settings.repair == "auto":
            raise ConfigError(
                "quantizer.repair=auto is to be decided by measuring: call search.quality.loop_repair.choose_repair, "
                "or set quantizer.repair to none, bias or batch_norm"
            )
        if self.settings.repairs and self._is_unprepared:
            raise ConfigError(
                f"quantizer.repair={self.settings.repair} needs a calibrated network; call calibrate first"
            )

    def _repaired(self, layer: str, precision: Precision) -> tuple[Tensor, Tensor, Tensor]:
        """The layer's weight and bias under a precision, and the gain in the weight; without one, none has values."""
        none = self._float[layer].new_zeros(0)
        if layer not in self._float_bias:
            return self.quantized_weight(layer, precision.weight), none, none
        rows, mean_input = self._seen.sample(layer), self._seen.mean_input(layer)
        is_float = precision.weight.is_float and precision.input.is_float
        if is_float or not self.settings.repairs or rows is None or mean_input is None:
            return self.quantized_weight(layer, precision.weight), self._float_bias[layer], none
        values, bias, gain = self._cache.get(
            (layer, precision), lambda: self._repair(layer, precision, rows, mean_input)
        )
        return values, bias, gain

    @torch.no_grad()
    def _repair(self, layer: str, precision: Precision, rows: Tensor, mean_input: Tensor) -> tuple[Tensor, ...]:
        module, weight, bias = self.owner(layer), self._float[layer], self._float_bias[layer]
        with torch.inference_mode(False):
            read = self.input_quantizer(layer, precision.input)(rows)
            gain = self._gain(layer, precision.weight, rows, read)
            values = self._quantized(layer, precision.weight, gain)
            shift = expected_shift(module, values - weight, mean_input)
            if not precision.input.is_float:
                shift += expected_shift(module, values, (read.float() - rows.float()).mean(0))
            return values, (bias - shift).to(bias.dtype), gain

    def _gain(self, layer: str, format: Format, rows: Tensor, read: Tensor) -> Tensor:
        """The gain of every output channel; no values where there is none."""
        is_shared = len(self._sharing[layer]) > 1
        if self.settings.repair != "batch_norm" or is_shared or not takes_gain(self.network[layer], format):
            return self._float[layer].new_zeros(0)
        module = self.owner(layer)
        wanted = self._cache.get((layer, FLOAT), lambda: (output_deviation(module, self._float[layer], rows),))[0]
        return matching_gain(wanted, output_deviation(module, self.quantized_weight(layer, format), read))

    def _quantized(self, layer: str, format: Format, gain: Tensor | None = None) -> Tensor:
        weight, axis = self._float[layer], self.network[layer].channel_axis
        if format.is_float:
            return weight
        with torch.inference_mode(False), torch.no_grad():
            parameters = self.weight_parameters(layer, format)
            if gain is not None and gain.numel():
                weight, parameters = gained_weight(weight, gain, axis), with_gain(parameters, gain)
            return quantize_weight(weight, format, axis, parameters)

    def input_quantizer(self, layer: str, format: Format) -> InputQuantizer:
        """Returns what quantizes a layer's input in a format, with its static range where it has one."""
        range_ = self.input_range(layer, format) if format.has_static_range else None
        return input_quantizer(format, range_, self.feature_axis(layer))

    def feature_axis(self, layer: str) -> int:
        """Axis of the features in a layer's input: the last one of a linear layer's, 1 of a convolution's."""
        return -1 if isinstance(self.owner(layer), nn.Linear) else 1

    def _forget(self, layer: str, keep_ranges: bool) -> None:
        """Drops what was found from a layer's weight or bias, which has changed."""
        self._cache.drop(lambda key: key[0] == layer)
        if not keep_ranges:
            for key in [key for key in self.ranges.weights if key[0] == layer]:
                del self.ranges.weights[key]
