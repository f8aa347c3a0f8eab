"""Sites of a lookup table as points in space: which are alike, which are near, and what lies between them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from hwmodels.lookup import Timing
from hwmodels.site import Site

FEWEST = 3
"""Sites that it takes to interpolate between them: one is held out, and the others are still two."""

FOLDS = 5
"""Parts that sites are dealt into, each to be predicted from the others."""

QUANTILE_80 = 0.8416212335729143  # of the standard normal distribution


def grouping(site: Site) -> tuple[str, str]:
    """Kind of layer and of its grouping: depthwise and grouped convolutions run on kernels of their own."""
    return site.kind, "depthwise" if site.is_depthwise else "grouped" if site.groups > 1 else ""


def point(site: Site) -> np.ndarray:
    """Where a site lies: logarithms of rows, channels of a group, groups, kernel positions and stride."""
    rows = site.batch * math.prod(site.out_size)
    channels = site.in_channels // site.groups, site.out_channels // site.groups, site.groups
    return np.log([rows, *channels, math.prod(site.kernel), math.prod(site.stride)])


def nearest(site: Site, timings: Sequence[Timing], most: int) -> list[Timing]:
    """The timings of a site's kind whose sites lie nearest, the nearest first."""
    mine = [timing for timing in timings if timing.site.kind == site.kind]
    order = np.argsort([np.abs(point(timing.site) - point(site)).sum() for timing in mine], kind="stable")
    return [mine[index] for index in order[:most]]


class Between:
    """Interpolates between the timings of one group: the share of a roofline that is reached (`hwmodels.interpolate`).

    Attributes:
        sigma: Root mean square of the logarithm of predicted over measured time, of sites that were held out with all
            their batch sizes.
    """

    def __init__(self, timings: Sequence[Timing], limits: Sequence[float]) -> None:
        """Takes at least `FEWEST` timings with the roofline of each, in seconds."""
        from hwmodels.interpolate import Interpolator

        points = np.stack([point(timing.site) for timing in timings])
        seconds = np.array([timing.p50_s for timing in timings])
        self._interpolator = Interpolator(points, np.array(limits), seconds)
        alike = [replace(timing.site, batch=1, in_size=(), out_size=()) for timing in timings]
        layers = {layer: number for number, layer in enumerate(dict.fromkeys(alike))}
        several = len(layers) >= FEWEST  # otherwise sizes of one layer, which are all there is to hold out
        sites = np.array([layers[layer] if several else number for number, layer in enumerate(alike)])
        predicted = self._interpolator.held_out(sites, min(FOLDS, int(sites.max()) + 1))
        self.sigma = float(np.sqrt(np.mean(np.log(predicted / seconds) ** 2)))

    def seconds(self, sites: Sequence[Site], limits: Sequence[float]) -> list[float]:
        """Seconds of one call at each of `sites`, whose rooflines are `limits`."""
        points = np.stack([point(site) for site in sites])
        return list(map(float, self._interpolator.predict(points, np.array(limits))))


def timing_sigma(timings: Sequence[Timing]) -> float:
    """Standard deviation of the logarithm of a table's timings, pooled from their percentiles 20 and 80.

    Of a log-normal both lie 0.84 standard deviations from the median. NaN where everything was timed once.
    """
    spreads = [math.log(timing.p80_s / timing.p20_s) / (2 * QUANTILE_80) for timing in timings if timing.samples > 1]
    return math.sqrt(sum(spread**2 for spread in spreads) / len(spreads)) if spreads else math.nan
