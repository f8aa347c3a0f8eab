"""The calibrated roofline: time from operations and bytes, by way of how near kernels come to a device's peaks.

    t = t0 + ((C / (P e_c))^p + (B / (BW e_m))^p)^(1/p)

C operations (two per multiply-accumulate), B bytes moved, P and BW the device's peaks, t0 the overhead of an operation,
e_c and e_m the shares of the peaks that kernels reach, p how sharply one limit hands over to the other. The raw
roofline is the limit t0 = 0, e_c = e_m = 1, p = infinity (Williams, Waterman and Patterson, CACM 2009).
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

from hwmodels.base import Choices, CostModel, fixed_storage, storage_cost
from hwmodels.cost import Cost, CostTable, LayerCost, Tier, Workload
from hwmodels.device import FLOAT_COMPUTE, Capability, Device, Efficiency, OperationEnergy, load_device, worst_tier
from hwmodels.network import Layer, Network
from hwmodels.precision import FLOAT_BITS, Precision

FLOAT_BYTES = FLOAT_BITS // 8
ACCUMULATOR_BITS = 32


class Roofline(CostModel):
    """Prices precisions by what the device's capabilities say really runs, on the calibrated roofline."""

    def __init__(self, device: str | Path | Device) -> None:
        """Takes a device, its name, or the path of its YAML file.

        Raises:
            ValueError: If there is no such device, or its file is not valid.
        """
        self.device = device if isinstance(device, Device) else load_device(device)
        self.name = self.device.id

    def cost_table(self, network: Network, choices: Choices, workload: Workload) -> CostTable:
        """Prices every choice of every layer; `fixed` holds the other operations and parameters.

        Raises:
            ValueError: If the device has no figures for the workload's threads, or cannot run a precision.
        """
        if workload.threads not in self.device.threads:
            known = ", ".join(map(str, self.device.threads))
            raise ValueError(
                f"device {self.name} has figures for {known} threads, got workload.threads={workload.threads}"
            )
        layers = {
            name: {precision: self._layer_cost(network, network[name], precision, workload) for precision in precisions}
            for name, precisions in choices.items()
        }
        tiers: dict[str, Tier] = {
            "latency_s": worst_tier(efficiency.tier for efficiency in self.device.efficiency.values()),
            "energy_j": self.device.energy.tier,
            "weight_bytes": "exact",
            "activation_bytes": "exact",
            "bit_ops": "exact",
        }
        source = f"roofline of {self.device.id} ({self.device.description}); energy from counted operations and bytes"
        return CostTable(layers, self._fixed_cost(network, workload), tiers, source)

    def _layer_cost(self, network: Network, layer: Layer, precision: Precision, workload: Workload) -> LayerCost:
        if not layer.quantizes_input and not precision.input.is_float:
            raise ValueError(
                f"layer {layer.name} is weight-only, its input stays in float: use {precision.weight}, not {precision}"
            )
        run = self.device.capability(layer.kind, precision)
        macs = layer.macs * workload.batch / layer.calls
        traffic = layer_traffic(layer, precision, run, workload.batch)
        quantizing = quantize_traffic(layer, precision, run, workload.batch)

        efficiency = self.device.efficiency[run.compute]
        peak = self.device.compute[run.compute][workload.threads].value
        floats = math.prod(layer.input_shape[1:]) + math.prod(layer.output_shape[1:])
        bandwidth = self._bandwidth(network, floats * workload.batch * FLOAT_BYTES, workload.threads)
        compute_s = 2 * macs / (peak * efficiency.compute.value)
        memory_s = traffic / (bandwidth * efficiency.memory.value)
        seconds = roofline_seconds(compute_s, memory_s, efficiency)
        if quantizing:
            seconds += roofline_seconds(0.0, quantizing / (bandwidth * efficiency.memory.value), efficiency)

        mac_j = mac_energy(self.device.energy, run.compute, run.weight_width(precision), run.held_input_bits)
        joules = macs * mac_j + (traffic + quantizing) * self.device.energy.memory.value
        stored = storage_cost(layer, precision, workload)
        cost = replace(stored, latency_s=layer.calls * seconds, energy_j=layer.calls * joules)
        return LayerCost(cost, run.compute, "compute" if compute_s >= memory_s else "memory")

    def _fixed_cost(self, network: Network, workload: Workload) -> Cost:
        """Prices the other operations, which read and write floats, and the other parameters."""
        efficiency = self.device.efficiency[FLOAT_COMPUTE]
        seconds = joules = 0.0
        for operation in network.operations:
            values = sum(network.tensors[name].values for name in (*operation.reads, *operation.writes))
            traffic = values * workload.batch * FLOAT_BYTES
            bandwidth = self._bandwidth(network, traffic, workload.threads)
            seconds += roofline_seconds(0.0, traffic / (bandwidth * efficiency.memory.value), efficiency)
            joules += traffic * self.device.energy.memory.value
        return replace(fixed_storage(network), latency_s=seconds, energy_j=joules)

    def _bandwidth(self, network: Network, activation_bytes: float, threads: int) -> float:
        """Bandwidth of the level that keeps the float network, and an operation's tensors, from pass to pass.

        Judged by the float network so that a layer's cost does not depend on the precision of the others.
        """
        resident = (network.weight_count + network.other_parameters) * FLOAT_BYTES
        return self.device.level(resident + activation_bytes, threads).bandwidth[threads].value


def layer_traffic(layer: Layer, precision: Precision, run: Capability, batch: int) -> float:
    """Bytes one call of a layer moves: weights and inputs as the runtime holds them, outputs in float."""
    inputs, outputs = (math.prod(shape[1:]) * batch for shape in (layer.input_shape, layer.output_shape))
    weights = outputs if layer.kind == "embedding" else layer.weight_count  # a look-up reads the rows it returns
    return weights * run.weight_width(precision) / 8 + inputs * run.held_input_bits / 8 + outputs * FLOAT_BYTES


def quantize_traffic(layer: Layer, precision: Precision, run: Capability, batch: int) -> float:
    """Bytes moved to quantize the input of one call: floats read and integers written, none for float inputs.

    Where the kernel reads floats all the same, the integers are turned back, at the same traffic again. Layers that
    read one tensor are charged a pass each.
    """
    if precision.input.is_float:
        return 0.0
    integer_bytes = math.ceil(precision.input.bits / 8)
    passes = 2 if run.held_input_bits == FLOAT_BITS else 1
    return passes * math.prod(layer.input_shape[1:]) * batch * float(FLOAT_BYTES + integer_bytes)


def roofline_seconds(compute_s: float, memory_s: float, efficiency: Efficiency) -> float:
    """Joins the seconds of computing and of moving bytes: `t0 + (compute_s^p + memory_s^p)^(1/p)`."""
    p = efficiency.sharpness.value
    shorter, longer = sorted((compute_s, memory_s))
    ratio = shorter / longer if longer else 0.0
    joined: float = longer * (1 + ratio**p) ** (1 / p)  # the powers of the times themselves would underflow
    return efficiency.overhead.value + joined


def mac_energy(energy: OperationEnergy, compute: str, weight_bits: int, input_bits: int) -> float:
    """Joules of one multiply-accumulate.

    Integer multipliers grow as (w a / 64)^0.99 from 8 x 8 bits, adders as (b / 8)^0.87 from 8 bits, with accumulators
    of 32 bits: powers through the 8-bit and 32-bit figures of Horowitz, "Computing's energy problem", ISSCC 2014.
    """
    if compute == FLOAT_COMPUTE:
        return energy.fp32_multiply.value + energy.fp32_add.value
    multiply: float = energy.int8_multiply.value * (weight_bits * input_bits / 64) ** 0.99
    add: float = energy.int8_add.value * (ACCUMULATOR_BITS / 8) ** 0.87
    return multiply + add
