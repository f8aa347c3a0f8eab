"""SmoothQuant: outliers in the channels of activations are divided out and multiplied into weights.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", 2022 (arXiv
2211.10438). A few channels of a transformer's activations are larger by orders of magnitude, and a scale per tensor or
token leaves hardly a code to the others; weights are even. Channel j is divided by `s_j = max|X_j|^a / max|W_j|^(1-a)`,
with maxima over calibration and over all layers that read it, which shares the difficulty between both.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from hwmodels import Precision
from hwmodels.precision import FLOAT_PRECISION
from search.errors import ConfigError
from search.quantize.simulate import QuantizedModel
from search.recover.probe import feature_axis
from search.recover.scaling import Rescaling, Site, largest, quantized_sites
from search.recover.sites import find_sites
from search.recover.watch import watch
from search.tasks.task import Task

SMALLEST = 1e-5  # range of a channel, relative to the largest of its site


def smoothquant(
    simulated: QuantizedModel, policy: Mapping[str, Precision], task: Task, *, alpha: float = 0.5
) -> QuantizedModel:
    """Returns a copy with smoother activations; its float outputs are the same up to rounding.

    Args:
        simulated: The network, left as it is.
        policy: Sites are touched whose readers it quantizes, and whose tensor it quantizes for at least one of them.
        task: Gives the example input and the calibration split.
        alpha: How much of the difficulty moves into the weights: 0.5 shares it, 1 makes activations even.

    Raises:
        ConfigError: If `alpha` is not within 0 and 1.
    """
    if not 0 <= alpha <= 1:
        raise ConfigError(f"recover: smoothquant's alpha={alpha} must be from 0 (weights made even) to 1 (activations)")
    fork = simulated.fork()
    sites = [
        site
        for site in quantized_sites(find_sites(fork, task), policy)
        if any(not policy.get(reader, FLOAT_PRECISION).input.is_float for reader in site.readers)
    ]
    peaks = _peaks(fork, sites, task)
    rescaling = Rescaling(fork)
    for site in (site for site in sites if peaks.keys() >= set(site.readers)):
        weights = {reader: largest(fork.network[reader], rescaling.weight(reader), "input") for reader in site.readers}
        factors = _smoothing(site.gather(peaks), site.gather(weights), alpha)
        rescaling.move(site, factors)
        for reader in site.readers:  # a reader may have a second site, which shares its columns
            peaks[reader] = peaks[reader] / site.spread(reader, factors.to(peaks[reader]))
    return rescaling.applied(task)


def _smoothing(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """Returns the factor of every channel from its largest magnitudes; 1 where no activation was seen."""
    floor = torch.finfo(weights.dtype).tiny
    peaks = activations.clamp_min(SMALLEST * activations.max())
    columns = weights.clamp_min((SMALLEST * weights.max()).clamp_min(floor))
    return torch.where(activations > 0, peaks**alpha / columns ** (1 - alpha), 1.0)


def _peaks(simulated: QuantizedModel, sites: list[Site], task: Task) -> dict[str, Tensor]:
    """Returns the largest magnitude of every input channel of the sites' readers over the calibration split."""
    peaks: dict[str, Tensor] = {}

    def look(reader: str, x: Tensor) -> None:
        peak = x.abs().movedim(feature_axis(simulated.network[reader]), -1).flatten(0, -2).amax(0).float()
        peaks[reader] = torch.maximum(peaks[reader], peak) if reader in peaks else peak

    watch(simulated, {}, task, inputs={reader: partial(look, reader) for site in sites for reader in site.readers})
    return peaks
