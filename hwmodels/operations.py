"""What lies between the layers: the other operations and the passes that convert, priced by the bytes they move.

Operations read and write floats, unless the device says that its graphs are integers throughout: then a tensor is as
wide as its owner has it (`hwmodels.flow`). A tensor has one owner, so what moving it takes can be added to its owner's
cost; what the operation does besides stays fixed.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace

from hwmodels.base import fixed_storage
from hwmodels.cost import Cost, Workload
from hwmodels.device import Device, MemoryLevel
from hwmodels.flow import Flow, Owner
from hwmodels.network import Network
from hwmodels.quantity import rate_at
from hwmodels.sequence import earlier_bytes


@dataclass(frozen=True)
class Passes:
    """Prices what moves bytes and computes next to nothing, on the device's float path.

    Attributes:
        device: The device.
        resident: Values that the float network keeps from pass to pass.
        threads: Worker threads.
    """

    device: Device
    resident: int
    threads: int

    @classmethod
    def of(cls, device: Device, network: Network, workload: Workload) -> Passes:
        """Passes over the tensors of a network."""
        return cls(device, network.weight_count + network.other_parameters, workload.threads)

    def level(self, values: float) -> MemoryLevel:
        """The memory level that keeps the float network, and an operation's values, from pass to pass.

        Judged by the float network so that a layer's cost does not depend on the precision of the others.
        """
        return self.device.level((self.resident + values) * self.device.float_bits / 8, self.threads)

    def byte_energy(self, level: MemoryLevel) -> float:
        """Joules of a byte moved from and to a level."""
        return (level.energy or self.device.energy.memory).number

    def cost(self, values: float, traffic: float, passes: int = 0) -> Cost:
        """Latency and energy of moving `traffic` bytes of so many values, and of starting `passes` times."""
        path, level = self.device.calibration[self.device.float_compute], self.level(values)
        bandwidth = rate_at(level.bandwidth, self.threads) * path.memory.number
        seconds = passes * path.overhead.number + traffic / bandwidth
        return Cost(seconds, traffic * self.byte_energy(level) + seconds * idle_power(self.device))


def idle_power(device: Device) -> float:
    """Watts drawn whatever is run; none where unknown."""
    power = device.energy.idle_power
    return power.number if power.is_known else 0.0


def fixed_cost(device: Device, network: Network, flow: Flow, workload: Workload) -> Cost:
    """Prices the other operations and parameters, and starting the network; tensors with an owner are left out."""
    passes = Passes.of(device, network, workload)
    launch = device.launch.number if device.launch.is_known else 0.0
    total = replace(fixed_storage(network), latency_s=launch, energy_j=launch * idle_power(device))
    for operation in network.operations:
        if network.is_fused(operation):
            continue
        touched = (*operation.reads, *operation.writes)
        values = workload.batch * sum(network.tensors[name].values for name in touched)
        floats = workload.batch * sum(network.tensors[name].values for name in touched if name not in flow.owners)
        traffic = floats * device.float_bits / 8 + earlier_bytes(network, operation, workload)
        total += passes.cost(values, traffic, 1)
    return total


def owned_costs(device: Device, network: Network, flow: Flow, workload: Workload) -> dict[Owner, Cost]:
    """What operations spend on moving the tensors of each owner, for each byte that a value takes."""
    if not flow.owners:
        return {}
    passes = Passes.of(device, network, workload)
    costs: dict[Owner, Cost] = defaultdict(Cost)
    for operation in network.operations:
        if network.is_fused(operation):
            continue
        touched = (*operation.reads, *operation.writes)
        values = workload.batch * sum(network.tensors[name].values for name in touched)
        for name in touched:
            if name in flow.owners:
                costs[flow.owners[name]] += passes.cost(values, workload.batch * network.tensors[name].values)
    return dict(costs)
