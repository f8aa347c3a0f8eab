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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from hwmodels.base import Choices, CostModel, storage_columns
from hwmodels.boundary import boundary_cost, conversion_costs, with_detours
from hwmodels.capability import Capability, find_capability
from hwmodels.conversion import CONVERTED_BITS, FLOATS, INTEGERS, handed_bits
from hwmodels.cost import COSTS, NOTHING, Bound, BoundaryCost, Cost, CostTable, LayerCosts, Tier, Workload
from hwmodels.device import Calibration, Device, load_device, worst_tier
from hwmodels.flow import Flow, Handover, Owner, float_flow, integer_flow
from hwmodels.network import Layer, Network
from hwmodels.operations import Passes, fixed_cost, idle_power, owned_costs
from hwmodels.parts import Parts, Terms
from hwmodels.precision import Precision
from hwmodels.quantity import rate_at
from hwmodels.runs import Runs, resolve
from hwmodels.site import Gemm, Site, mean_size

LATENCY, ENERGY = COSTS.index("latency_s"), COSTS.index("energy_j")
BOUNDS: tuple[Bound, ...] = ("compute", "memory", "overhead")


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
        self._refusals: dict[tuple[str, bool, Precision], str | None] = {}
        self._resolved: dict[tuple[Precision, ...], dict[tuple[str, bool, bool, bool], Runs]] = {}
        self._recent: tuple[Sequence[Precision], dict[tuple[str, bool, bool, bool], Runs]] = (), {}

    def capability(self, layer: Layer, precision: Precision, leaves_floats: bool = False) -> Capability:
        """How the device runs a layer at a precision, in general or where its output has to be floats.

        Raises:
            ValueError: If nothing in the device's list matches.
        """
        key = layer.kind, layer.is_depthwise, precision, leaves_floats
        if key not in self._found:
            self._found[key] = self.device.capability(layer.kind, precision, layer.is_depthwise, leaves_floats)
        return self._found[key]

    def with_integer_operations(self) -> Roofline:
        """The same device, additions, concatenations and pooling in integers: what `quantizer.placement=full` runs."""
        return Roofline(replace(self.device, operations="integer"))

    def refusal(self, layer: Layer, precision: Precision) -> str | None:
        key = layer.kind, layer.is_depthwise, precision
        if key not in self._refusals:  # asked of every layer of every policy that is priced
            run = find_capability(self.device.capabilities, layer.kind, precision, layer.is_depthwise)
            missing = f"none of the capabilities in its file is about {layer.kind} at {precision}"
            why = run.note if run is not None and run.support == "refused" else None
            self._refusals[key] = missing if run is None else why
        return self._refusals[key]

    def cost_table(self, network: Network, choices: Choices, workload: Workload) -> CostTable:
        """Prices every choice of every layer; `fixed` holds the other operations and parameters.

        Raises:
            ValueError: If the device has no figures for the workload's threads, or cannot run a precision.
        """
        self.device.check_threads(workload.threads)
        alike: dict[tuple[Precision, ...], tuple[Precision, ...]] = {}  # one object for equal choices: quick to look up
        choices = {name: alike.setdefault(tuple(given), tuple(given)) for name, given in choices.items()}
        flow = self._flow(network, choices)
        layers = {
            name: self._layer(network, network[name], precisions, workload, name in flow.handing_on)
            for name, precisions in choices.items()
        }
        between = [one for one in flow.handovers if one.producer is not None]
        boundaries = [self._boundary(network, one, layers, flow, workload) for one in between]
        for price in (self._conversions, self._moves):
            for name, more in price(network, choices, flow, workload).items():
                layers[name].numbers[:, [LATENCY, ENERGY]] += more
        tiers: dict[str, Tier] = {
            "energy_j": self.device.energy.tier,
            "weight_bytes": "exact",
            "activation_bytes": "exact",
            "bit_ops": "exact",
        }
        if self.device.knows_time:
            used = {run[3] for costs in layers.values() for run in costs.runs if run[3]}
            tiers["latency_s"] = worst_tier(used | {self.device.calibration[self.device.float_compute].tier})
        energy = "calibrated" if self.device.energy.is_calibrated else "an index of counted operations and bytes"
        return CostTable(
            layers,
            fixed_cost(self.device, network, flow, workload),
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
        choices = {name: (precision,) for name, precision in policy.items()}
        table, flow = self.cost_table(network, choices, workload), self._flow(network, choices)
        converting = {one.consumer: one.cost(policy[one.producer], policy[one.consumer]) for one in table.boundaries}
        seconds = {name: cost.latency_s for name, cost in converting.items()}
        received = self._conversions(network, choices, flow, workload)
        moved = self._moves(network, choices, flow, workload)
        found = {}
        for name, precisions in choices.items():
            layer, hands_on = network[name], name in flow.handing_on
            runs = self._resolve(layer, precisions, leaves_floats=not hands_on)
            moving_s, received_s = (float(one[name][0, 0]) if name in one else 0.0 for one in (moved, received))
            terms = self._terms(network, layer, runs, workload, hands_on)
            found[name] = terms.parts(layer.calls, moving_s, received_s + seconds.get(name, 0.0))
        return found

    def _flow(self, network: Network, choices: Choices) -> Flow:
        """How tensors pass between the layers that take precisions."""
        return (float_flow if self.device.operations == "float" else integer_flow)(network, choices)

    def _layer(
        self,
        network: Network,
        layer: Layer,
        precisions: Sequence[Precision],
        workload: Workload,
        hands_on: bool,
    ) -> LayerCosts:
        """Prices one layer, conversions left out; a layer that hands on leaves integers where it can."""
        runs = self._resolve(layer, precisions, leaves_floats=not hands_on)
        terms = self._terms(network, layer, runs, workload, hands_on)
        seconds = terms.overhead_s + terms.joined_s
        byte_energy = Passes.of(self.device, network, workload).byte_energy(terms.level)
        joules = terms.macs * runs.mac_energy + terms.traffic * byte_energy + seconds * self._idle_power

        numbers = storage_columns(layer, precisions, workload)
        numbers[:, LATENCY], numbers[:, ENERGY] = layer.calls * seconds, layer.calls * joules
        bounds = np.argmax([terms.compute_s, terms.memory_s, terms.overhead_s], axis=0)
        calibration = self.device.calibration
        known = [
            [(way.compute, bound, way.path, calibration[way.path].tier, way.support) for bound in BOUNDS]
            for way in runs.ways
        ]
        described = [known[way][bound] for way, bound in zip(runs.way.tolist(), bounds.tolist(), strict=True)]
        for row in np.flatnonzero(np.isnan(seconds)).tolist():  # without a peak or bandwidth neither is what binds
            compute, _, path, _, support = described[row]
            described[row] = compute, "", path, "", support
        return LayerCosts(runs.precisions, numbers, described)

    def _terms(self, network: Network, layer: Layer, runs: Runs, workload: Workload, hands_on: bool) -> Terms:
        """The terms of one call of a layer, of the mean size of its calls."""
        site = Site.of(layer, workload)
        size = mean_size(layer, site, workload)
        level = Passes.of(self.device, network, workload).level(site.input_values + site.output_values)
        rates = np.array([self._rates(way, site.gemm, workload.threads) for way in runs.ways])
        compute_s, overhead_s, share, sharpness = rates[runs.way].T
        traffic = self._traffic(layer, site, size, runs, hands_on)
        memory_s = traffic / (rate_at(level.bandwidth, workload.threads) * share)
        compute_s *= size
        joined_s = join_seconds(compute_s, memory_s, sharpness)
        return Terms(size * site.macs, compute_s, memory_s, joined_s, overhead_s, sharpness, traffic, level)

    def _resolve(self, layer: Layer, precisions: Sequence[Precision], leaves_floats: bool) -> Runs:
        """How the device runs layers of this kind at each precision, found out once."""
        if precisions is not self._recent[0]:  # hashing scores of precisions takes longer than looking them up
            self._recent = precisions, self._resolved.setdefault(tuple(precisions), {})
        known = self._recent[1]
        key = layer.kind, layer.is_depthwise, layer.quantizes_input, leaves_floats
        if key not in known:
            found = [self._run(layer, precision, leaves_floats) for precision in precisions]
            known[key] = resolve(self.device, layer, precisions, found)
        return known[key]

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

    def _traffic(self, layer: Layer, site: Site, size: float, runs: Runs, hands_on: bool) -> np.ndarray:
        """Bytes one call moves: weights and inputs as the runtime holds them, outputs as the next layer wants them."""
        is_look_up = layer.kind == "embedding"  # which reads the rows it returns
        weights = site.output_values * runs.weight_width / 8 if is_look_up else runs.weight_bytes(layer)
        leaves_integers = hands_on & np.array([way.requantizes for way in runs.ways])
        outputs = np.where(leaves_integers, CONVERTED_BITS, self.device.float_bits)[runs.way]
        converting = np.array([way.conversion_bits for way in runs.ways])[runs.way]
        activations = site.input_values * (runs.input_width + converting) + site.output_values * outputs
        moved: np.ndarray = weights + size * activations / 8
        return moved

    def _conversions(self, network: Network, choices: Choices, flow: Flow, workload: Workload) -> dict[str, np.ndarray]:
        """Seconds and joules of converting what comes in floats, by layer, each of shape `(precisions, 2)`."""
        passes, found = Passes.of(self.device, network, workload), {}
        for one in flow.handovers:
            if one.producer is None:
                layer = network[one.consumer]
                runs = self._resolve(layer, choices[layer.name], leaves_floats=layer.name not in flow.handing_on)
                costs = conversion_costs(passes, ((FLOATS, read) for read in runs.read), _read(layer, workload))
                found[layer.name] = _columns([costs[FLOATS, read] for read in runs.read])
        return found

    def _moves(self, network: Network, choices: Choices, flow: Flow, workload: Workload) -> dict[str, np.ndarray]:
        """Seconds and joules of operations that move a layer's tensors, by layer, each of shape `(precisions, 2)`.

        With them what the layer itself writes for operations beyond `CONVERTED_BITS` of a value.
        """
        if not flow.owners:
            return {}
        passes, float_bits = Passes.of(self.device, network, workload), self.device.float_bits
        owned, found = owned_costs(self.device, network, flow, workload), {}
        for name, precisions in choices.items():
            layer = network[name]
            runs = self._resolve(layer, precisions, leaves_floats=name not in flow.handing_on)
            read, made = (_columns([owned.get(Owner(name, reads), NOTHING)]) / 8 for reads in (True, False))
            values = flow.values_left[name] * workload.batch
            by_label = {}
            for left, label in dict.fromkeys(zip(runs.left, runs.read, strict=True)):
                bits = handed_bits(label, float_bits)
                left_bits, written_bits = (bits, bits - CONVERTED_BITS) if left == INTEGERS else (float_bits, 0)
                wider = _columns([passes.cost(values, values * written_bits / 8)])
                by_label[left, label] = read * bits + made * left_bits + wider
            found[name] = np.concatenate([by_label[pair] for pair in zip(runs.left, runs.read, strict=True)])
        return found

    def _boundary(
        self,
        network: Network,
        handover: Handover,
        layers: Mapping[str, LayerCosts],
        flow: Flow,
        workload: Workload,
    ) -> BoundaryCost:
        """What converting between two layers takes, and running the first otherwise where integers are not wanted."""
        producer, consumer = network[handover.producer or ""], network[handover.consumer]
        priced, is_last = layers[producer.name], consumer.name not in flow.handing_on
        left = self._resolve(producer, priced.precisions, leaves_floats=False)
        read = self._resolve(consumer, layers[consumer.name].precisions, leaves_floats=is_last)
        passes = Passes.of(self.device, network, workload)
        boundary = boundary_cost(passes, handover, left, read, _read(consumer, workload))
        if handover.through_operations or not any(way.needs_integer_output for way in left.ways):
            return boundary
        otherwise = self._layer(network, producer, left.precisions, workload, hands_on=False)
        more = (otherwise.numbers - priced.numbers)[:, [LATENCY, ENERGY]]
        return with_detours(boundary, left, [Cost(*row) for row in more.tolist()])

    @property
    def _idle_power(self) -> float:
        return idle_power(self.device)


def _read(layer: Layer, workload: Workload) -> int:
    """Values that all calls of a layer read."""
    site = Site.of(layer, workload)
    return round(site.input_values * layer.calls * mean_size(layer, site, workload))


def _columns(costs: Sequence[Cost]) -> np.ndarray:
    """Latency and energy, shape `(costs, 2)`."""
    return np.array([(cost.latency_s, cost.energy_j) for cost in costs])


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
