"""AWQ: weights that meet large activations get finer steps.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", 2023 (arXiv 2306.00978).
Where a column of weights is multiplied by `s > 1` before it is quantized and its activation divided by `s`, so is the
error of the column, while the steps of the groups it is in hardly grow. Factors are `s_j = (mean |X_j|)^a`, and the
exponent `a` in [0, 1] that leaves the least error in the readers' outputs is found on a grid, site by site.

The authors measure the error behind the whole block, here it is that of the layers that read the site. Their second
search, for the clipping of each group, is left to the ranges of the format: `mse` clips by the error of the weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from hwmodels import Format, Precision
from hwmodels.precision import FLOAT_PRECISION
from search.errors import ConfigError
from search.quantize.formats import quantize_weight
from search.quantize.ranges import weight_parameters
from search.quantize.simulate import QuantizedModel
from search.recover.probe import feature_axis
from search.recover.scaling import Rescaling, Site, along, quantized_sites
from search.recover.sites import find_sites
from search.recover.statistics import Sample
from search.recover.unfold import as_matrix, count_rows, patches
from search.recover.watch import watch
from search.tasks.task import Task

SAMPLE_VALUES = 1 << 20  # most that are kept of a reader's inputs, over which its output error is measured
SMALLEST = 1e-4  # mean magnitude of a channel, relative to the largest of its site


def awq(
    simulated: QuantizedModel,
    policy: Mapping[str, Precision],
    task: Task,
    *,
    grid: int = 20,
    seed: int = 0,
) -> QuantizedModel:
    """Returns a copy with the columns of salient weights enlarged; its float outputs are the same up to rounding.

    Args:
        simulated: The network, left as it is.
        policy: Sites are touched whose readers' weights it quantizes, all of them; its formats measure the error.
        task: Gives the example input and the calibration split.
        grid: Number of steps from exponent 0, which changes nothing, to 1.
        seed: Of the sample of inputs.

    Raises:
        ConfigError: If `grid` is less than 1.
    """
    if grid < 1:
        raise ConfigError(f"recover: awq's grid={grid} must be at least 1")
    fork = simulated.fork()
    sites = [
        site
        for site in quantized_sites(find_sites(fork, task), policy)
        if not any(policy.get(reader, FLOAT_PRECISION).weight.is_float for reader in site.readers)
    ]
    rescaling = Rescaling(fork)
    readers = {
        reader: Reader(fork, reader, policy[reader].weight, rescaling, seed)
        for site in sites
        for reader in site.readers
    }
    watch(fork, {}, task, inputs={name: reader.see for name, reader in readers.items()})
    with torch.no_grad():
        for site in (site for site in sites if all(readers[name].is_seen for name in site.readers)):
            factors = _best_factors(site, readers, grid)
            if factors is not None:
                rescaling.move(site, factors)
                for name in site.readers:
                    readers[name].move(site.spread(name, factors))
    return rescaling.applied(task)


class Reader:
    """A layer that reads a site, with what is known of its inputs.

    Inputs are kept as they were before factors moved: a layer can read several sites, such as a concatenation of two.
    """

    def __init__(self, simulated: QuantizedModel, name: str, format: Format, rescaling: Rescaling, seed: int) -> None:
        self._layer = simulated.network[name]
        self._format = format
        self._rescaling = rescaling
        self._settings = simulated.settings
        owner = simulated.owner(name)  # attention projects as a linear layer does
        is_attention = isinstance(owner, nn.MultiheadAttention)
        rows, columns = self._layer.weight_shape[:2]
        self._module = nn.Linear(columns, rows, device="meta") if is_attention else owner
        patch = self._layer.weight_count // self._layer.channels * self._layer.groups
        self._sample = Sample(max(SAMPLE_VALUES // patch, 1), seed)
        self._sum = torch.zeros(())
        self._count = 0
        self._moved = torch.ones(())

    def see(self, x: Tensor) -> None:
        """Adds a batch of inputs."""
        flat = x.movedim(feature_axis(self._layer), -1).flatten(0, -2)
        self._sum = self._sum.to(x.device) + flat.abs().sum(0, dtype=torch.float64)
        self._count += len(flat)
        self._sample.add(count_rows(self._module, x), lambda rows: patches(self._module, x, rows))

    def move(self, columns: Tensor) -> None:
        """Notes that every input channel has been divided by a factor, shape `(inputs,)`."""
        self._moved = self._moved * columns

    @property
    def is_seen(self) -> bool:
        """Whether the calibration data reached the layer."""
        return self._count > 0

    @property
    def magnitudes(self) -> Tensor:
        """Mean magnitude of every input channel as it is now, float32 of shape `(inputs,)`."""
        return (self._sum / self._count).float().cpu() / self._moved

    def error(self, columns: Tensor) -> float:
        """Returns the squared error of the outputs, were the input channels divided by `columns` as well."""
        layer, weight = self._layer, self._rescaling.weight(self._layer.name)
        scaled = weight * along(layer, columns.to(weight), "input")
        method, percentile = self._settings.weight_range, self._settings.percentile
        parameters = weight_parameters(scaled, self._format, layer.channel_axis, method, percentile)
        change = quantize_weight(scaled, self._format, layer.channel_axis, parameters) - scaled
        change = change / along(layer, (columns * self._moved).to(weight), "input")
        assert self._sample.rows is not None
        return (self._sample.rows @ as_matrix(self._module, change).mT.float()).square().sum().item()


def _best_factors(site: Site, readers: Mapping[str, Reader], grid: int) -> Tensor | None:
    """Returns the factors of the exponent that leaves the least error, shape `(channels,)`; None for exponent 0."""
    magnitudes = site.gather({name: readers[name].magnitudes for name in site.readers}, "mean")

    def error(factors: Tensor) -> float:
        return sum(readers[name].error(site.spread(name, factors)) for name in site.readers)

    best, least = None, error(torch.ones_like(magnitudes))
    for step in range(1, grid + 1):
        factors = _salience(magnitudes, step / grid)
        if (found := error(factors)) < least:
            best, least = factors, found
    return best


def _salience(magnitudes: Tensor, exponent: float) -> Tensor:
    """Returns `magnitudes ** exponent`, its extremes equally far from 1; 1 where the magnitude is zero."""
    high = magnitudes.max()
    raised = magnitudes.clamp_min(SMALLEST * high)
    factors = (raised / (raised.min().sqrt() * high.sqrt())) ** exponent
    return torch.where(magnitudes > 0, factors, 1.0)
