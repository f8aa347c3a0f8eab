"""The calibrated roofline: time from operations and bytes, by way of how near kernels come to a device's peaks.

    t = t0 + ((C / (P e_c))^p + (B / (BW e_m))^p + (s k)^p)^(1/p)

C operations (two per multiply-accumulate, padded to the kernels' tiles), B bytes moved, k products summed into each
output value, P and BW the device's peaks, t0 the overhead of an operation, e_c and e_m the shares of the peaks that
kernels reach, s the seconds of a step along k, which show where outputs are too few to fill the device (s sqrt(k) where
kernels split long sums), p how sharply one limit hands over to the other; the five are fitted per path, which is a kind
of kernel. The raw roofline is the limit t0 = s = 0, e_c = e_m = 1, p = infinity (Williams, Waterman and Patterson, CACM
2009).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hwmodels.base import Choices, CostModel, fixed_storage, storage_columns
from hwmodels.capability import Capability
from hwmodels.conversion import (
    CONVERTED_BITS,
    FLOATS,
    READ_DYNAMIC,
    READ_FLOAT,
    READ_TURNED,
    Handover,
    conversion_traffic,
    handovers,
)
from hwmodels.cost import COSTS, Bound, BoundaryCost, Cost, CostTable, LayerCosts, Tier, Workload
from hwmodels.device import Calibration, Device, MemoryLevel, load_device, worst_tier
from hwmodels.network import Layer, Network
from hwmodels.precision import Precision
from hwmodels.quantity import rate_at
from hwmodels.runs import Runs, resolve
from hwmodels.sequence import earlier_bytes
from hwmodels.site import Gemm, Site

LATENCY, ENERGY = COSTS.index("latency_s"), COSTS.index("energy_j")
BOUNDS: tuple[Bound, ...] = ("compute", "memory", "overhead")


@dataclass(frozen=True)
class Parts:
    """What the time of one layer is made of, over all its calls.

    Attributes:
        operations: Two per multiply-accumulate, padding left out.
        traffic: Bytes moved, conversions left out.
        level: Name of the memory level they move through.
        compute_s: Seconds of computing: its share of what computing and moving bytes take together, where the p-th
            powers of both add up.
        memory_s: Seconds of moving bytes: the rest of that.
        overhead_s: Seconds of starting.
        conversion_s: Seconds of converting what it reads.
    """

    operations: float
    traffic: float
    level: str
    compute_s: float
    memory_s: float
    overhead_s: float
    conversion_s: float


class Roofline(CostModel):
    """Prices precisions by what the device's capabilities say really runs, on the calibrated roofline."""

    def __init__(self, device: str | Path | Device) -> None:
        """Takes a device, its name, or the path of its YAML file.

        Raises:
            ValueError: If there is no such device, or its file is not valid.
        """
        self.device = device if isinstance(device, Device) else load_device(device)
        self.name = self.device.id
        self._found: dict[tuple[str, bool, Precision, bool], Capability] = {}
        self._resolved: dict[tuple[str, bool, bool, tuple[Precision, ...], bool], Runs] = {}

    def capability(self, layer: Layer, precision: Precision, leaves_floats: bool = False) -> Capability:
        """How the device runs a layer at a precision, in general or where its output has to be floats.

        Raises:
            ValueError: If nothing in the device's list matches.
        """
        key = layer.kind, layer.is_depthwise, precision, leaves_floats
        if key not in self._found:
            self._found[key] = self.device.capability(layer.kind, precision, layer.is_depthwise, leaves_floats)
        return self._found[key]

    def refusal(self, layer: Layer, precision: Precision) -> str | None:
        run = self.capability(layer, precision)
        return run.note if run.support == "refused" else None

    def cost_table(self, network: Network, choices: Choices, workload: Workload) -> CostTable:
        """Prices every choice of every layer; `fixed` holds the other operations and parameters.

        Raises:
            ValueError: If the device has no figures for the workload's threads, or cannot run a precision.
        """
        self.device.check_threads(workload.threads)
        alike: dict[tuple[Precision, ...], tuple[Precision, ...]] = {}  # one object for equal choices: quick to look up
        choices = {name: alike.setdefault(tuple(given), tuple(given)) for name, given in choices.items()}
        met = handovers(network, choices)
        handed = {one.producer for one in met}
        layers = {
            name: self._layer(network, network[name], precisions, workload, name in handed)
            for name, precisions in choices.items()
        }
        between = [one for one in met if one.producer is not None]
        boundaries = [self._boundary(network, one, choices, workload, layers, handed) for one in between]
        for handover in met:
            if handover.producer is None:
                leaves_floats = handover.consumer not in handed
                self._add_passes(layers[handover.consumer], network, handover, workload, leaves_floats)
        tiers: dict[str, Tier] = {
            "latency_s": worst_tier([run[3] for costs in layers.values() for run in costs.runs] or [self.device.tier]),
            "energy_j": self.device.energy.tier,
            "weight_bytes": "exact",
            "activation_bytes": "exact",
            "bit_ops": "exact",
        }
        energy = "calibrated" if self.device.energy.is_calibrated else "an index of counted operations and bytes"
        return CostTable(
            layers,
            self._fixed_cost(network, workload),
            tiers,
            f"roofline of {self.device.id} ({self.device.name}, {self.device.runtime}); energy is {energy}",
            tuple(boundaries),
            {name: path.sigma.number for name, path in self.device.calibration.items()},
            self.device.float_compute,
            self.device.warnings,
        )

    def parts(self, network: Network, policy: Mapping[str, Precision], workload: Workload) -> dict[str, Parts]:
        """What the time of every layer is made of; with the fixed cost they add up to the network's latency.

        Raises:
            ValueError: As `cost_table`.
        """
        device, threads = self.device, workload.threads
        device.check_threads(threads)
        met = {one.consumer: one for one in handovers(network, {name: (policy[name],) for name in policy})}
        handed = {one.producer for one in met.values()}
        runs = {name: self._resolve(network[name], (policy[name],), name not in handed) for name in policy}
        found = {}
        for name, run in runs.items():
            layer = network[name]
            site = Site.of(layer, workload)
            level = self._level(network, site.input_values + site.output_values, threads)
            compute_s, overhead, share, sharpness = self._rates(run.ways[0], site.gemm, threads)
            traffic = float(self._traffic(layer, site, run, name in handed)[0])
            memory_s = traffic / (rate_at(level.bandwidth, threads) * share)
            joined = float(join_seconds(np.array(compute_s), np.array(memory_s), sharpness))
            computing = joined * (compute_s / joined) ** sharpness
            conversion = 0.0
            if name in met:
                left = runs[met[name].producer or ""].left[0] if met[name].producer else FLOATS
                read = run.read[0]
                conversion = self._conversions(network, layer, [(left, read)], workload)[left, read].latency_s
            found[name] = Parts(
                operations=layer.calls * 2.0 * site.macs,
                traffic=layer.calls * traffic,
                level=level.name,
                compute_s=layer.calls * computing,
                memory_s=layer.calls * (joined - computing),
                overhead_s=layer.calls * overhead,
                conversion_s=conversion,
            )
        return found

    def _layer(
        self,
        network: Network,
        layer: Layer,
        precisions: Sequence[Precision],
        workload: Workload,
        hands_on: bool,
    ) -> LayerCosts:
        """Prices one layer, conversions left out; a layer that hands on leaves integers where it can."""
        device, threads = self.device, workload.threads
        runs = self._resolve(layer, precisions, leaves_floats=not hands_on)
        site = Site.of(layer, workload)
        level = self._level(network, site.input_values + site.output_values, threads)

        rates = np.array([self._rates(way, site.gemm, threads) for way in runs.ways])
        compute_s, overhead, share, sharpness = rates[runs.way].T
        traffic = self._traffic(layer, site, runs, hands_on)
        memory_s = traffic / (rate_at(level.bandwidth, threads) * share)
        seconds = overhead + join_seconds(compute_s, memory_s, sharpness)
        joules = site.macs * runs.mac_energy + traffic * self._byte_energy(level) + seconds * self._idle_power

        numbers = storage_columns(layer, precisions, workload)
        numbers[:, LATENCY], numbers[:, ENERGY] = layer.calls * seconds, layer.calls * joules
        bounds = np.argmax([compute_s, memory_s, overhead], axis=0)
        known = [
            [(way.compute, bound, way.path, device.calibration[way.path].tier, way.support) for bound in BOUNDS]
            for way in runs.ways
        ]
        described = [known[way][bound] for way, bound in zip(runs.way.tolist(), bounds.tolist(), strict=True)]
        return LayerCosts(runs.precisions, numbers, described)

    def _resolve(self, layer: Layer, precisions: Sequence[Precision], leaves_floats: bool) -> Runs:
        """How the device runs layers of this kind at each precision, found out once."""
        key = layer.kind, layer.is_depthwise, layer.quantizes_input, tuple(precisions), leaves_floats
        if key not in self._resolved:
            found = [self._run(layer, precision, leaves_floats) for precision in precisions]
            self._resolved[key] = resolve(self.device, layer, precisions, found)
        return self._resolved[key]

    def _run(self, layer: Layer, precision: Precision, leaves_floats: bool) -> Capability:
        """How the device runs a layer at a precision that is legal."""
        if not layer.quantizes_input and not precision.input.is_float:
            raise ValueError(
                f"layer {layer.name} is weight-only, its input stays in float: use {precision.weight}, not {precision}"
            )
        run = self.capability(layer, precision, leaves_floats)
        if run.support == "refused":
            raise ValueError(f"device {self.name} cannot run {layer.kind} {layer.name} at {precision}: {run.note}")
        return run

    def _rates(self, run: Capability, gemm: Gemm, threads: int) -> tuple[float, ...]:
        """Seconds of computing, overhead, memory share and sharpness of one way to run."""
        path = self.device.calibration[run.path]
        reached = self.device.peak(run.compute, threads) * path.compute.number
        overhead, sharpness = path.start_s(gemm.m) * (1 + run.extra_kernels), path.sharpness.number
        compute_s, steps_s = padded_operations(gemm, path) / reached, path.steps_s(gemm.m, gemm.k)
        if steps_s:
            compute_s = float(join_seconds(np.array(compute_s), np.array(steps_s), sharpness))
        return compute_s, overhead, path.memory.number, sharpness

    def _traffic(self, layer: Layer, site: Site, runs: Runs, hands_on: bool) -> np.ndarray:
        """Bytes one call moves: weights and inputs as the runtime holds them, outputs as the next layer wants them."""
        is_look_up = layer.kind == "embedding"  # which reads the rows it returns
        weights = site.output_values * runs.weight_width / 8 if is_look_up else runs.weight_bytes(layer)
        leaves_integers = hands_on & np.array([way.requantizes for way in runs.ways])
        outputs = np.where(leaves_integers, CONVERTED_BITS, self.device.float_bits)[runs.way]
        converting = np.array([way.conversion_bits for way in runs.ways])[runs.way]
        activations = site.input_values * (runs.input_width + converting) + site.output_values * outputs
        moved: np.ndarray = weights + activations / 8
        return moved

    def _add_passes(
        self, costs: LayerCosts, network: Network, handover: Handover, workload: Workload, leaves_floats: bool
    ) -> None:
        """Adds to a layer's costs what converting its input takes, which comes in floats."""
        layer = network[handover.consumer]
        read = self._resolve(layer, costs.precisions, leaves_floats).read
        converting = self._conversions(network, layer, [(FLOATS, label) for label in read], workload)
        added = {label: (cost.latency_s, cost.energy_j) for (_, label), cost in converting.items()}
        costs.numbers[:, [LATENCY, ENERGY]] += np.array([added[label] for label in read])

    def _boundary(
        self,
        network: Network,
        handover: Handover,
        choices: Choices,
        workload: Workload,
        layers: Mapping[str, LayerCosts],
        handed: Collection[str | None],
    ) -> BoundaryCost:
        """What converting between two layers takes, and running the first otherwise where integers are not wanted."""
        producer, consumer = handover.producer or "", handover.consumer
        left = self._resolve(network[producer], choices[producer], leaves_floats=False)
        read = self._resolve(network[consumer], choices[consumer], leaves_floats=consumer not in handed)
        pairs = [(one, other) for one in dict.fromkeys(left.left) for other in dict.fromkeys(read.read)]
        costs = self._conversions(
            network, network[consumer], [*pairs, *((FLOATS, other) for _, other in pairs)], workload
        )
        labels, path = left.left_of, self.device.float_compute
        if any(way.needs_integer_output for way in left.ways):
            labels, costs = self._with_detours(network, producer, left, layers[producer], costs, workload)
        return BoundaryCost(handover.tensor, producer, consumer, labels, read.read_of, costs, path)

    def _with_detours(
        self,
        network: Network,
        producer: str,
        left: Runs,
        priced: LayerCosts,
        costs: Mapping[tuple[str, str], Cost],
        workload: Workload,
    ) -> tuple[dict[Precision, str], dict[tuple[str, str], Cost]]:
        """Labels that tell kernels that exist only where they requantize, and costs with what runs in their place.

        Only the producer's own seconds change: that it might want another input then is left out.
        """
        otherwise = self._layer(network, network[producer], left.precisions, workload, hands_on=False)
        labels, detours = {}, {}
        for row, (precision, way) in enumerate(zip(left.precisions, left.way.tolist(), strict=True)):
            needs = left.ways[way].needs_integer_output
            labels[precision] = f"{left.left[row]} of {way}" if needs else left.left[row]
            if needs:
                more = otherwise.numbers[row] - priced.numbers[row]
                detours[labels[precision]] = Cost(latency_s=float(more[LATENCY]), energy_j=float(more[ENERGY]))
        with_detours = dict(costs)
        for (one, other), cost in costs.items():
            for label, detour in detours.items():
                if label.startswith(f"{one} of "):
                    is_wanted = other not in (READ_FLOAT, READ_DYNAMIC, READ_TURNED)
                    with_detours[label, other] = cost if is_wanted else costs[FLOATS, other] + detour
        return labels, with_detours

    def _conversions(
        self, network: Network, layer: Layer, pairs: Sequence[tuple[str, str]], workload: Workload
    ) -> dict[tuple[str, str], Cost]:
        """What converting the input of a layer costs, by what it is left and what it is read as."""
        path = self.device.calibration[self.device.float_compute]
        values = Site.of(layer, workload).input_values * layer.calls
        level = self._level(network, values, workload.threads)
        bandwidth = rate_at(level.bandwidth, workload.threads) * path.memory.number
        costs = {}
        for left, read in dict.fromkeys(pairs):
            passes, traffic = conversion_traffic(left, read, values, self.device.float_bits)
            seconds = passes * path.overhead.number + traffic / bandwidth
            joules = traffic * self._byte_energy(level) + seconds * self._idle_power
            costs[left, read] = Cost(latency_s=seconds, energy_j=joules)
        return costs

    def _fixed_cost(self, network: Network, workload: Workload) -> Cost:
        """Prices the other operations, which read and write floats, the other parameters, and starting the network."""
        path = self.device.calibration[self.device.float_compute]
        seconds, joules = self.device.launch.number if self.device.launch.is_known else 0.0, 0.0
        for operation in network.operations:
            if network.is_fused(operation):
                continue
            values = workload.batch * sum(network.tensors[n].values for n in (*operation.reads, *operation.writes))
            traffic = values * self.device.float_bits / 8 + earlier_bytes(network, operation, workload)
            level = self._level(network, values, workload.threads)
            bandwidth = rate_at(level.bandwidth, workload.threads) * path.memory.number
            seconds += path.overhead.number + traffic / bandwidth
            joules += traffic * self._byte_energy(level)
        return replace(fixed_storage(network), latency_s=seconds, energy_j=joules + seconds * self._idle_power)

    def _level(self, network: Network, values: int, threads: int) -> MemoryLevel:
        """The memory level that keeps the float network, and an operation's values, from pass to pass.

        Judged by the float network so that a layer's cost does not depend on the precision of the others.
        """
        resident = network.weight_count + network.other_parameters + values
        return self.device.level(resident * self.device.float_bits / 8, threads)

    def _byte_energy(self, level: MemoryLevel) -> float:
        """Joules of a byte moved from and to a level."""
        return (level.energy or self.device.energy.memory).number

    @property
    def _idle_power(self) -> float:
        """Watts drawn whatever is run; none where unknown."""
        power = self.device.energy.idle_power
        return power.number if power.is_known else 0.0


def padded_operations(gemm: Gemm, path: Calibration) -> float:
    """Operations of a product, two per multiply-accumulate, its sides padded to the path's tile."""
    tile = path.tile
    m, n, k = (math.ceil(size / step) * step for size, step in zip(gemm, (tile.m, tile.n, tile.k), strict=False))
    return 2.0 * m * n * k * gemm.groups


def join_seconds(compute_s: np.ndarray, memory_s: np.ndarray, sharpness: np.ndarray | float) -> np.ndarray:
    """Joins the seconds of computing and of moving bytes: `(compute_s^p + memory_s^p)^(1/p)`, element by element."""
    longer, shorter = np.maximum(compute_s, memory_s), np.minimum(compute_s, memory_s)
    ratio = np.divide(shorter, longer, out=np.zeros_like(longer), where=longer > 0)
    joined: np.ndarray = longer * (1 + ratio**sharpness) ** (1 / np.asarray(sharpness))  # powers of times underflow
    return joined
