"""Cross-layer equalization: rows of one layer and the columns of the next share their ranges.

Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019 (arXiv 1906.04721). Where a
site connects two layers, the weights of channel i have range `r1` on the way in and `r2` on the way out; the factor
`s = sqrt(r1 / r2)` makes both `sqrt(r1 r2)`, so that under one scale for a whole tensor no channel is lost. Layers in a
chain, such as the depthwise and pointwise convolutions of MobileNet, change each other's ranges; sweeps over all sites
are repeated until no factor moves.

Differences from the paper: ReLU6 does not let factors through and stays, so layers around it are left alone (the paper
replaces it by ReLU, which changes the network), and high biases are not absorbed into the next layer, which holds only
where a ReLU never cuts. Sites behind a norm have no rows to equalize.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from hwmodels import Precision
from search.quantize.simulate import QuantizedModel
from search.recover.scaling import Rescaling, Site, largest, quantized_sites
from search.recover.sites import find_sites
from search.tasks.task import Task

SWEEPS = 200
CONVERGED = 1e-4  # of a factor's logarithm
NEGLIGIBLE = 1e-6  # range of a channel, relative to its layer's, below which it counts as zero and keeps it


def equalization(simulated: QuantizedModel, policy: Mapping[str, Precision], task: Task) -> QuantizedModel:
    """Returns a copy whose layers share ranges channel by channel; its float outputs are the same up to rounding.

    Needs no data but to find sites, and to observe inputs anew. Channels whose rows or columns are zero stay.

    Args:
        simulated: The network, left as it is.
        policy: Only sites whose readers it quantizes are touched.
        task: Gives the example input and the calibration split.
    """
    fork = simulated.fork()
    sites = [site for site in quantized_sites(find_sites(fork, task), policy) if site.producer in fork.network]
    rescaling = Rescaling(fork)
    for _ in range(SWEEPS):
        furthest = 0.0
        for site in sites:
            factors = _equalizing(fork, rescaling, site)
            rescaling.move(site, factors)
            furthest = max(furthest, factors.log().abs().max().item())
        if furthest < CONVERGED:
            break
    return rescaling.applied(task)


def _equalizing(simulated: QuantizedModel, rescaling: Rescaling, site: Site) -> Tensor:
    """Returns the factors that give every channel of a site the same range on both sides, shape `(channels,)`."""
    network = simulated.network
    rows = largest(network[site.producer], rescaling.weight(site.producer), "output").float().cpu()
    columns = site.gather(
        {reader: largest(network[reader], rescaling.weight(reader), "input") for reader in site.readers}
    )
    is_used = (rows > NEGLIGIBLE * rows.max()) & (columns > NEGLIGIBLE * columns.max())
    return torch.where(is_used, rows / columns, 1.0).sqrt()
