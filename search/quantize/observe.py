"""What one calibration pass saw of the inputs of layers, in memory that does not grow with the data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from hwmodels import Network
from search.errors import DataError
from search.quantize.ranges import Histogram, LogitSample
from search.quantize.sample import InputSample
from search.quantize.shift import Mean

Reads = tuple[str, ...]  # the tensors that a layer reads, one for each of its calls


class Observations:
    """Histograms of the tensors that layers read; of layers to be repaired also the mean input and a sample.

    Layers that read the same tensor share its histogram, and so its range.

    Attributes:
        has_samples: Whether there are mean inputs and samples.
    """

    def __init__(self, network: Network) -> None:
        self._reads: dict[str, Reads] = {
            layer.name: layer.reads or (layer.name,) for layer in network if layer.quantizes_input
        }
        self._histograms: dict[Reads, Histogram] = {}
        self._means: dict[str, Mean] = {}
        self._samples: dict[str, InputSample] = {}
        self.has_samples = False
        self._tensors: dict[str, tuple[Histogram, LogitSample | None]] = {}

    @contextmanager
    def watching(self, owners: Mapping[str, nn.Module], repaired: Collection[str]) -> Iterator[None]:
        """A context in which the inputs of layers are observed, each tensor once; forgets what was seen before.

        Args:
            owners: The modules to watch, by layer.
            repaired: Linear layers and convolutions whose inputs are averaged and sampled as well.
        """
        self._histograms, self._means, self._samples = {}, {}, {}
        self.has_samples = bool(repaired)
        with ExitStack() as hooks:
            for layer, reads in self._reads.items():
                looks: list[Callable[[Tensor], None]] = []
                if reads not in self._histograms:
                    self._histograms[reads] = Histogram()
                    looks.append(self._histograms[reads].add)
                if layer in repaired:
                    self._means[layer], self._samples[layer] = Mean(owners[layer]), InputSample(owners[layer])
                    looks += [self._means[layer].add, self._samples[layer].add]
                if looks:
                    hook = _hook(layer, looks)
                    hooks.callback(owners[layer].register_forward_pre_hook(hook, with_kwargs=True).remove)
            yield

    def copy(self) -> Observations:
        """A copy that may observe anew."""
        other = copy.copy(self)
        for name in ("_histograms", "_means", "_samples", "_tensors"):
            setattr(other, name, dict(getattr(self, name)))
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

    def sample(self, layer: str) -> Tensor | None:
        """Returns a sample of a layer's input, as `search.quantize.sample` draws it; None where there is none."""
        return self._samples[layer].rows if layer in self._samples else None


def _hook(layer: str, looks: Iterable[Callable[[Tensor], None]]) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_tensor(args, kwargs)
        try:
            for look in looks:
                look(x)
        except ValueError as error:
            raise DataError(f"layer {layer}: {error} in its calibration input; check the data and the model") from error

    return hook


def _add(histogram: Histogram, sample: LogitSample | None, x: Tensor) -> None:
    histogram.add(x)
    if sample is not None:
        sample.add(x)


def first_tensor(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """The input of a module called with these arguments."""
    return args[0] if args else next(iter(kwargs.values()))  # type: ignore[no-any-return]
