"""What a lookup table says of a network: timings as they are, interpolated between, or a device's roofline beyond them.

A precision is looked up as kernels see it. With a device, precisions that its capabilities run alike share their
timings: same path and compute type, same bits held in memory while running, scales found at run time or not. So on a
device that stores int4 weights and computes them as int8, `int4/uint8` takes what `int8/uint8` was timed at. Without a
device, formats share timings if their names differ only in what kernels do not mind (see `hwmodels.capability`): a
static scale per tensor or per channel, an integer's most negative code.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hwmodels.base import Choices, CostModel, fixed_storage, storage_columns
from hwmodels.capability import Capability, kernel_name
from hwmodels.cost import COSTS, CostTable, LayerCosts, Tier, Workload
from hwmodels.device import Device, listed, load_device, worst_tier
from hwmodels.lookup import FLOAT_OUTPUTS, LookupTable, Timing, describe
from hwmodels.lookup_sites import FEWEST, Between, grouping, nearest, timing_sigma
from hwmodels.network import Layer, Network
from hwmodels.precision import FLOAT_BITS, Precision
from hwmodels.quantity import rate_at
from hwmodels.roofline import Roofline, join_seconds
from hwmodels.site import Site

LATENCY, ENERGY = COSTS.index("latency_s"), COSTS.index("energy_j")

NOMINAL_PEAK, NOMINAL_BANDWIDTH = 1e12, 1e11
"""Operations and bytes per second where no device says; interpolation is of the share of them that is reached."""

MEASURED = "measured"
"""What timings share their error with."""

Run = Hashable  # what precisions that run alike have in common
Group = tuple[str, str, Run, int]  # kind of layer, kind of grouping, run, threads: what is interpolated between


class Found(NamedTuple):
    """What a table says of one site.

    Attributes:
        seconds: Of one call.
        tier: `measured` or `interpolated`.
        path: What the number shares its error with.
        timing: What was measured, with all that is known of it; None for what was interpolated.
    """

    seconds: float
    tier: Tier
    path: str
    timing: Timing | None = None

    @property
    def is_fallback(self) -> bool:
        """Whether what was measured is a fallback."""
        return self.timing is not None and self.timing.is_fallback


class Lookup(CostModel):
    """Prices layers by a lookup table: an exact hit is returned as it was measured, else interpolated between sites.

    What the table does not reach is priced by the device's roofline, at its tier, if a device is given, and refused
    otherwise. With a device, other operations, conversions and starting the network cost what its roofline says;
    without, they are left out, energy is not known, and the cost table's warnings say so.
    """

    def __init__(
        self,
        table: str | Path | LookupTable,
        device: str | Path | Device | None = None,
        floats: str | Path | LookupTable | None = None,
    ) -> None:
        """Takes a table and the device that it was timed on.

        Args:
            table: The table, or the path of its file, `.csv` or `.parquet`.
            device: A device, its name, or the path of its YAML file; None for what the table says alone.
            floats: A table of layers that read integers and leave floats, as `bitplan profile --outputs floats` takes,
                for kernels that exist only where they requantize; without, the device's roofline prices what runs
                instead of them.

        Raises:
            ValueError: If table or device cannot be read, or the table is empty.
        """
        self.table = table if isinstance(table, LookupTable) else LookupTable.read(table)
        if not self.table.timings:
            raise ValueError("the lookup table is empty; time something first, with `bitplan profile`")
        self.device = device if isinstance(device, Device) or device is None else load_device(device)
        self.name = self.table.device if self.device is None else self.device.id
        self._leaves_floats = self.table.runtime.endswith(FLOAT_OUTPUTS)
        self._floats = None if floats is None else Lookup(floats, self.device)
        self._roofline = None if self.device is None else _Beyond(self, self.device)
        self._runs: dict[tuple[str, bool, Precision], Run] = {}
        self._alike: dict[tuple[str, bool, tuple[Precision, ...]], tuple[Run, ...]] = {}
        self._between: dict[Group, tuple[str, Between] | None] = {}
        self._groups: dict[Group, list[Timing]] = defaultdict(list)
        self._found: dict[tuple[Site, int], dict[Run | Precision, Found | None]] = defaultdict(dict)
        for timing in sorted(self.table.timings, key=lambda timing: (timing.is_fallback, str(timing.precision))):
            run = self._run(timing.site.kind, timing.site.is_depthwise, timing.precision)
            known = self._found[timing.site, timing.threads]
            known[timing.precision] = found = Found(timing.p50_s, "measured", MEASURED, timing)
            if known.setdefault(run, found) is found:
                self._groups[(*grouping(timing.site), run, timing.threads)].append(timing)

    def with_integer_operations(self) -> Lookup:
        """The same table, the device's additions, concatenations and pooling in integers."""
        device = None if self.device is None else replace(self.device, operations="integer")
        if device is None:
            return self
        return Lookup(self.table, device, None if self._floats is None else self._floats.table)

    def refusal(self, layer: Layer, precision: Precision) -> str | None:
        if self._roofline is not None:
            return self._roofline.refusal(layer, precision)
        run = self._run(layer.kind, layer.is_depthwise, precision)
        if any((kind, same) == (layer.kind, run) for kind, _, same, _ in self._groups):
            return None
        return f"no {layer.kind} was timed at {precision}; {self._timed(layer.kind)}"

    def find(self, layer: Layer, precisions: Sequence[Precision], workload: Workload) -> list[Found | None]:
        """What the table says of a layer at each precision, measured or interpolated; None where it does not reach."""
        known = self._found[Site.of(layer, workload), self._threads(workload)]
        runs = self._runs_of(layer, precisions)
        if not known.keys() >= set(runs):
            self._interpolate([(layer, precisions)], workload)
        return [known.get(precision) or known[run] for precision, run in zip(precisions, runs, strict=True)]

    def cost_table(self, network: Network, choices: Choices, workload: Workload) -> CostTable:
        """Prices every choice of every layer.

        Raises:
            ValueError: If the table does not reach a choice and there is no device, or the device cannot run it or has
                no figures for the workload's threads.
        """
        if self.device is not None:
            self.device.check_threads(workload.threads)
        self._interpolate([(network[name], precisions) for name, precisions in choices.items()], workload)
        if self._roofline is not None:
            table = self._roofline.cost_table(network, choices, workload)
        else:
            layers = {name: self._layer(network[name], rows, workload) for name, rows in choices.items()}
            tier = worst_tier([run[3] for costs in layers.values() for run in costs.runs] or ["measured"])
            tiers: dict[str, Tier] = dict.fromkeys(("weight_bytes", "activation_bytes", "bit_ops"), "exact")
            table = CostTable(layers, fixed_storage(network), {"latency_s": tier, **tiers}, "")
        used = {run[2] for costs in table.layers.values() for run in costs.runs}
        groups = [*self._between.items(), *(self._floats._between.items() if self._floats else ())]
        between = [known for group, known in groups if known and group[3] == self._threads(workload)]
        sigmas = {MEASURED: timing_sigma(self.table.timings), **{path: one.sigma for path, one in between}}
        return replace(
            table,
            source=self._source + (f"; for the rest {table.source}" if table.source else ""),
            sigmas={**table.sigmas, **{path: sigma for path, sigma in sigmas.items() if path in used}},
            warnings=self._warnings(table, workload),
        )

    def _layer(self, layer: Layer, precisions: Sequence[Precision], workload: Workload) -> LayerCosts:
        """Prices one layer by the table alone."""
        values = storage_columns(layer, precisions, workload)
        values[:, ENERGY] = math.nan
        runs = []
        for row, found in enumerate(self.find(layer, precisions, workload)):
            if found is None:
                site, threads = Site.of(layer, workload), self._threads(workload)
                near = "; ".join(describe(*timing.key) for timing in nearest(site, self.table.timings, 2))
                raise ValueError(
                    f"layer {layer.name}: the table has no {describe(site, precisions[row], threads)}; "
                    f"{self._timed(layer.kind)}{f'; nearest: {near}' if near else ''}; time it, or give a device"
                )
            values[row, LATENCY] = layer.calls * found.seconds
            runs.append(("", "", found.path, found.tier, "fallback" if found.is_fallback else ""))
        return LayerCosts(precisions, values, runs)

    def _interpolate(self, choices: Sequence[tuple[Layer, Sequence[Precision]]], workload: Workload) -> None:
        """Finds what was not measured of these layers, all sites of a group at once."""
        threads = self._threads(workload)
        missing: dict[Group, dict[Site, Precision]] = defaultdict(dict)
        for layer, precisions in choices:
            site = Site.of(layer, workload)
            known, alike = self._found[site, threads], grouping(site)
            for precision, run in zip(precisions, self._runs_of(layer, precisions), strict=True):
                if run not in known:
                    missing[*alike, run, threads][site] = precision
        for group, sites in missing.items():
            found: list[Found | None] = [None] * len(sites)
            if (near := self._known(group)) is not None:
                path, between = near
                limits = [self._limit(site, precision, threads) for site, precision in sites.items()]
                found = [Found(one, "interpolated", path) for one in between.seconds(tuple(sites), limits)]
            for site, one in zip(sites, found, strict=True):
                self._found[site, threads][group[2]] = one

    def _known(self, group: Group) -> tuple[str, Between] | None:
        """The path of what is interpolated in a group, and what it is read from; None where that is too little."""
        if group not in self._between:
            timings, known = self._groups.get(group, []), None
            if len(timings) >= FEWEST:
                leaving = "leaving floats" if self._leaves_floats else ""
                path = " ".join(filter(None, ("interpolated", group[1], group[0], str(timings[0].precision), leaving)))
                limits = [self._limit(timing.site, timing.precision, timing.threads) for timing in timings]
                known = path, Between(timings, limits)
            self._between[group] = known
        return self._between[group]

    def _limit(self, site: Site, precision: Precision, threads: int) -> float:
        """Seconds of a site by the device's roofline, or by nominal rates where there is none."""
        if self._roofline is not None:
            seconds = self._roofline.site_seconds(site, precision, threads)
            if not math.isnan(seconds):
                return seconds
        weights = site.output_values if site.kind == "embedding" else site.weight_values
        bits = weights * precision.weight.bits + site.input_values * precision.input.bits
        return max(2 * site.macs / NOMINAL_PEAK, (bits + site.output_values * FLOAT_BITS) / 8 / NOMINAL_BANDWIDTH)

    def _runs_of(self, layer: Layer, precisions: Sequence[Precision]) -> tuple[Run, ...]:
        """What each precision of a layer has in common with others."""
        key = layer.kind, layer.is_depthwise, tuple(precisions)
        if key not in self._alike:
            self._alike[key] = tuple(self._run(layer.kind, layer.is_depthwise, precision) for precision in precisions)
        return self._alike[key]

    def _run(self, kind: str, is_depthwise: bool, precision: Precision) -> Run:
        """What precisions that run alike have in common."""
        key = kind, is_depthwise, precision
        if key not in self._runs:
            weight, input_ = kernel_name(precision.weight), kernel_name(precision.input)
            self._runs[key] = weight, input_
            how = None if self.device is None else self._capability(kind, precision, is_depthwise)
            if how is not None and how.support != "refused":
                held_weight = weight if how.held_weight_bits is None else how.held_weight_bits
                held_input = input_ if how.held_input_bits is None else how.held_input_bits
                besides = how.extra_kernels, how.conversion_bits, precision.input.is_dynamic
                self._runs[key] = how.path, how.compute, *besides, held_weight, held_input
        return self._runs[key]

    def _capability(self, kind: str, precision: Precision, is_depthwise: bool) -> Capability:
        """How the device runs what the table is of."""
        assert self.device is not None
        return self.device.capability(kind, precision, is_depthwise, self._leaves_floats)

    def _leaving_floats(self, layer: Layer, precisions: Sequence[Precision], workload: Workload) -> list[Found | None]:
        """What is known of a layer whose output has to be floats: of kernels that then do not exist, by `floats`."""
        assert self._roofline is not None
        usual = self.find(layer, precisions, workload)
        other = self._floats.find(layer, precisions, workload) if self._floats else [None] * len(usual)
        needs = [self._roofline.capability(layer, one).needs_integer_output for one in precisions]
        return [two if is_other else one for one, two, is_other in zip(usual, other, needs, strict=True)]

    def _threads(self, workload: Workload) -> int:
        """Threads to look up: the workload's, or the table's only ones where no device says what others take."""
        has_choice = (self.device is not None and self.device.threads) or len(self._timed_threads) > 1
        return workload.threads if has_choice else self._timed_threads[0]

    @cached_property
    def _timed_threads(self) -> tuple[int, ...]:
        return tuple(sorted({timing.threads for timing in self.table.timings}))

    @cached_property
    def _source(self) -> str:
        return f"{len(self.table.timings)} timings of {self.table.device} ({self.table.runtime}), {self.table.digest}"

    def _warnings(self, table: CostTable, workload: Workload) -> tuple[str, ...]:
        found = []
        if workload.threads not in self._timed_threads:
            found.append(
                f"the table was timed with threads={listed(self._timed_threads)}: set workload.threads to that"
            )
        if self.device is None:
            found.append(
                f"the table of {self.name} has no device beside it: other operations, conversions between layers and "
                "starting the network are left out of the latency, and energy is not known"
            )
            return tuple(found)
        if self.table.device != self.device.id:
            found.append(f"the table was timed on {self.table.device}, the device is {self.device.id}")
        runs = [run for costs in table.layers.values() for run in costs.runs]
        beyond = sum(run[3] not in ("measured", "interpolated") for run in runs)
        if beyond:
            found.append(f"{beyond} of {len(runs)} choices lie beyond the table; the device's roofline prices them")
        return (*found, *(table.warnings if beyond else ()))

    def _timed(self, kind: str) -> str:
        """What the table has of a kind, in words."""
        mine = [timing for timing in self.table.timings if timing.site.kind == kind]
        if not mine:
            return f"it has {listed(sorted({timing.site.kind for timing in self.table.timings}))}, no {kind}"
        threads = sorted({timing.threads for timing in mine})
        precisions = dict.fromkeys(str(timing.precision) for timing in mine)
        return f"it has {kind} at {listed(precisions)} with threads={listed(threads)}"


class _Beyond(Roofline):
    """The roofline of a table's device: it prices what lies beyond the table, and all that is no layer."""

    def __init__(self, lookup: Lookup, device: Device) -> None:
        super().__init__(device)
        self._lookup = lookup

    def site_seconds(self, site: Site, precision: Precision, threads: int) -> float:
        """Seconds of one call from the main memory; NaN where the device cannot run it or its rates are not known."""
        run = self._lookup._capability(site.kind, precision, site.is_depthwise)
        if run.support == "refused":
            return math.nan
        compute_s, overhead, share, sharpness = self._rates(run, site.gemm, threads)
        weights = site.output_values if site.kind == "embedding" else site.weight_values
        inputs = site.input_values * (run.input_width(precision) + run.conversion_bits)
        bits = weights * run.weight_width(precision) + inputs + site.output_values * self.device.float_bits
        memory_s = bits / 8 / (rate_at(self.device.memory[-1].bandwidth, threads) * share)
        return overhead + float(join_seconds(np.array(compute_s), np.array(memory_s), sharpness))

    def _layer(
        self, network: Network, layer: Layer, precisions: Sequence[Precision], workload: Workload, hands_on: bool
    ) -> LayerCosts:
        costs = super()._layer(network, layer, precisions, workload, hands_on)
        find = self._lookup.find if hands_on else self._lookup._leaving_floats
        known = [(row, one) for row, one in enumerate(find(layer, precisions, workload)) if one]
        if not known:
            return costs
        rows, runs = [row for row, _ in known], list(costs.runs)
        seconds = layer.calls * np.array([found.seconds for _, found in known])
        costs.numbers[rows, ENERGY] += (seconds - costs.numbers[rows, LATENCY]) * self._idle_power
        costs.numbers[rows, LATENCY] = seconds
        for row, found in known:
            compute, bound, _, _, support = runs[row]
            if found.is_fallback:  # by the library's own account, whatever the device's list says
                compute, bound, support = "", "", "fallback"
            runs[row] = compute, bound, found.path, found.tier, support
        return LayerCosts(precisions, costs.numbers, runs)
