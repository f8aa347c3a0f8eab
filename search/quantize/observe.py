"""What one calibration pass saw of the inputs of layers, in memory that does not grow with the data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from hwmodels import Network
from search.errors import DataError
from search.quantize.ranges import Histogram, LogitSample
from search.quantize.shift import LINEAR_KINDS, Mean

Reads = tuple[str, ...]  # the tensors that a layer reads, one for each of its calls


class Observations:
    """Histograms of the tensors that layers read, and the mean inputs of linear layers and convolutions.

    Layers that read the same tensor share its histogram, and so its range.
    """

    def __init__(self, network: Network) -> None:
        self._reads: dict[str, Reads] = {
            layer.name: layer.reads or (layer.name,) for layer in network if layer.quantizes_input
        }
        self._histograms: dict[Reads, Histogram] = {}
        self._means: dict[str, Mean] = {}
        self._tensors: dict[str, tuple[Histogram, LogitSample | None]] = {}

    @contextmanager
    def watching(self, owners: Mapping[str, nn.Module], means: bool) -> Iterator[None]:
        """A context in which the inputs of layers are observed, each tensor once; forgets what was seen before.

        Args:
            owners: The modules to watch, by layer.
            means: Whether to average the inputs as well.
        """
        self._histograms, self._means = {}, {}
        with ExitStack() as hooks:
            for layer, reads in self._reads.items():
                histogram = None
                if reads not in self._histograms:
                    histogram = self._histograms[reads] = Histogram()
                mean = None
                if means and isinstance(owners[layer], LINEAR_KINDS):
                    mean = self._means[layer] = Mean(owners[layer])
                if histogram is not None or mean is not None:
                    look = _look(layer, histogram, mean)
                    hooks.callback(owners[layer].register_forward_pre_hook(look, with_kwargs=True).remove)
            yield

    def copy(self) -> Observations:
        """A copy that may observe anew."""
        other = copy.copy(self)
        other._histograms, other._means, other._tensors = dict(self._histograms), dict(self._means), dict(self._tensors)
        return other

    def looks(self, tensors: Iterable[str], outputs: Container[str]) -> dict[str, Callable[[Tensor], None]]:
        """Returns what is to be called with each of these tensors where it is produced; `outputs` are sampled too."""
        self._tensors = {tensor: (Histogram(), LogitSample() if tensor in outputs else None) for tensor in tensors}
        return {tensor: partial(_add, *seen) for tensor, seen in self._tensors.items()}

    def tensor(self, tensor: str) -> tuple[Histogram, LogitSample | None]:
        """Returns the histogram of a tensor that was looked at where it is produced, and rows of it if it is an output.

        Raises:
            DataError: If no calibration batch produced it.
        """
        if tensor not in self._tensors or not self._tensors[tensor][0].counts.any():
            raise DataError(f"no range is known for tensor {tensor}: no calibration batch reached it")
        return self._tensors[tensor]

    def histogram(self, layer: str, what: str) -> Histogram:
        """Returns the histogram of a layer's input.

        Raises:
            DataError: If no calibration batch reached the layer; `what` names what needs it.
        """
        seen = self._histograms.get(self._reads.get(layer, ()))
        if seen is None or not seen.counts.any():
            raise DataError(f"no range is known for {what} of layer {layer}: no calibration batch reached it")
        return seen

    def mean_input(self, layer: str) -> Tensor | None:
        """Returns the mean of a layer's input, as `search.quantize.shift.Mean` has it; None where there is none."""
        return self._means[layer].value if layer in self._means else None


def _look(layer: str, histogram: Histogram | None, mean: Mean | None) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        try:
            if histogram is not None:
                histogram.add(x)
        except ValueError as error:
            raise DataError(f"layer {layer}: {error} in its calibration input; check the data and the model") from error
        if mean is not None:
            mean.add(x)

    return hook


def _add(histogram: Histogram, sample: LogitSample | None, x: Tensor) -> None:
    histogram.add(x)
    if sample is not None:
        sample.add(x)


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a module called with these arguments."""
    return args[0] if args else next(iter(kwargs.values()))  # type: ignore[no-any-return]
