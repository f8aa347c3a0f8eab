"""HAQ's table from a part of itself: which entries are drawn, what the others are read from, how far that is off."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.haq_mobilenetv2.mobilenetv2 import mobilenetv2
from hwmodels import Network, Workload
from hwmodels.interpolate import Interpolator
from hwmodels.lookup_sites import point
from hwmodels.site import Site
from search.figures.style import layer_kind

BATCH = 16
SHARES = (0.125, 0.25, 0.5)
QUARTER = 0.25
SEEDS = 5
PLANS = 200
ALL = "all"

BITS, LAYERS, BOTH, SECONDS = (
    "other bits of the layer",
    "other layers at the precision",
    "both",
    "both, of latency itself",
)
"""What entries are interpolated from; all but the last interpolate latency by bit operations."""


@dataclass(frozen=True)
class Entries:
    """The entries of a table, one row each, of layers that differ in shape: twins would give each other away.

    Attributes:
        network: The network.
        layer: Index of the entry's layer (N).
        kind: `conv`, `pointwise`, `depthwise` or `linear` (N).
        place: Logarithms of the sizes of its layer (N, D), as lookup tables have them.
        weight: Weight bits (N).
        input: Input bits (N).
        bit_ops: Multiply-accumulates times both bits (N).
        latency: What the table says (N).
    """

    network: Network
    layer: np.ndarray
    kind: np.ndarray
    place: np.ndarray
    weight: np.ndarray
    input: np.ndarray
    bit_ops: np.ndarray
    latency: np.ndarray

    @classmethod
    def of(cls, cycles: np.ndarray) -> Entries:
        """The entries of the first layer of each shape in HAQ's table."""
        network = mobilenetv2()
        sites = [Site.of(layer, Workload(batch=BATCH)) for layer in network]
        kinds = np.array([layer_kind(row) for row in network.to_rows()])
        firsts = sorted({site: number for number, site in reversed(list(enumerate(sites)))}.values())
        layer, weight, input_ = (axis.ravel() for axis in np.meshgrid(firsts, *[np.arange(1, 9)] * 2, indexing="ij"))
        macs = np.array([site.macs for site in sites])[layer]
        places = np.stack([point(site) for site in sites])[layer]
        latency = cycles[layer, weight - 1, input_ - 1].astype(float)
        return cls(network, layer, kinds[layer], places, weight, input_, macs * weight * input_, latency)

    @property
    def layers(self) -> np.ndarray:
        """Indices of the layers."""
        return np.unique(self.layer)


def draw(entries: Entries, share: float, seed: int) -> np.ndarray:
    """A random share of the entries, as a mask (N)."""
    known = np.zeros(len(entries.latency), dtype=bool)
    drawn = np.random.default_rng(seed).choice(len(known), round(share * len(known)), replace=False)
    known[drawn] = True
    return known


def predict(entries: Entries, known: np.ndarray, way: str) -> np.ndarray:
    """Latency of all entries (N) from those known (N); NaN where there is nothing to read it from."""
    bits = np.log(np.stack([entries.weight, entries.input], axis=1))
    points = {BITS: bits, LAYERS: entries.place}.get(way, np.hstack([entries.place, bits]))
    apart = {BITS: entries.layer, LAYERS: 8 * entries.weight + entries.input}.get(way, np.zeros(len(known)))
    limits = np.ones(len(known)) if way == SECONDS else entries.bit_ops.astype(float)
    found = np.full(len(known), np.nan)
    for group in np.unique(apart):
        mine = apart == group
        seen = mine & known
        if seen.any():
            interpolator = Interpolator(points[seen], limits[seen], entries.latency[seen])
            found[mine] = interpolator.predict(points[mine], limits[mine])
    return found


def _errors(entries: Entries, predicted: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Relative errors of what was not known but could be predicted, and which rows those are."""
    rows = np.flatnonzero(~known & ~np.isnan(predicted))
    return np.abs(predicted[rows] / entries.latency[rows] - 1), rows


def error_table(entries: Entries) -> pd.DataFrame:
    """Errors by what was interpolated from, share known, seed and kind of layer."""
    rows = []
    for way, share, seed in (
        (way, s, n) for way in (BITS, LAYERS, BOTH, SECONDS) for s in SHARES for n in range(SEEDS)
    ):
        known = draw(entries, share, seed)
        errors, at = _errors(entries, predict(entries, known, way), known)
        for kind in (ALL, *dict.fromkeys(entries.kind.tolist())):
            mine = np.ones(len(at), dtype=bool) if kind == ALL else entries.kind[at] == kind
            rows.append({"from": way, "known": share, "seed": seed, "kind": kind, **_summary(errors[mine])})
    return pd.DataFrame(rows)


def _summary(errors: np.ndarray) -> dict[str, float]:
    numbers = {
        "median": np.median(errors),
        "mean": errors.mean(),
        "p90": np.quantile(errors, 0.9),
        "within_20": (errors < 0.2).mean(),
    }
    return {"entries": len(errors), **{name: round(float(value), 5) for name, value in numbers.items()}}


def layer_table(entries: Entries) -> pd.DataFrame:
    """Errors layer by layer, over all seeds, from a quarter of the entries and from both bits and layers."""
    found: dict[int, list[float]] = {int(layer): [] for layer in entries.layers}
    for seed in range(SEEDS):
        known = draw(entries, QUARTER, seed)
        for error, row in zip(*_errors(entries, predict(entries, known, BOTH), known), strict=True):
            found[int(entries.layer[row])].append(error)
    kinds = dict(zip(entries.layer.tolist(), entries.kind.tolist(), strict=True))
    return pd.DataFrame(
        [
            {"layer": entries.network.names[layer], "kind": kinds[layer], **_summary(np.array(errors))}
            for layer, errors in found.items()
        ]
    )


def one_bit_share(entries: Entries, above: float = 0.2) -> tuple[float, float]:
    """Share of entries with 1 bit on a side: of all, and of those off by more than `above`, a quarter known."""
    is_one = (entries.weight == 1) | (entries.input == 1)
    off: list[bool] = []
    for seed in range(SEEDS):
        known = draw(entries, QUARTER, seed)
        errors, rows = _errors(entries, predict(entries, known, BOTH), known)
        off += is_one[rows[errors > above]].tolist()
    return float(is_one.mean()), float(np.mean(off))


def plan_errors(entries: Entries, cycles: np.ndarray, way: str) -> Iterator[float]:
    """Errors of whole plans of random bits from 2 to 8, twins included, with a quarter of the entries known."""
    sites = [Site.of(layer, Workload(batch=BATCH)) for layer in entries.network]
    first = {site: number for number, site in reversed(list(enumerate(sites)))}
    for seed in range(SEEDS):
        known = draw(entries, QUARTER, seed)
        filled = np.where(known, entries.latency, predict(entries, known, way)).reshape(-1, 8, 8)
        place = {int(layer): number for number, layer in enumerate(entries.layers)}
        whole = filled[[place[first[site]] for site in sites]]
        rng = np.random.default_rng(seed)
        for _ in range(PLANS):
            chosen = np.arange(len(sites)), *rng.integers(1, 8, (2, len(sites)))
            yield abs(whole[chosen].sum() / cycles[chosen].sum() - 1)
