"""Ethos-U as its own compiler sees it: Vela compiles the whole network and estimates its cycles.

A layer compiled alone says little: its feature maps lie in the slow memory, and nothing overlaps with it. So the table
of costs comes from whole networks with one precision throughout, a compilation for each that is held differently, and
`confirm` compiles the very policy. The estimate is Arm's, who call it approximate; it knows no energy.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from hwmodels.base import Choices, CostModel, fixed_storage, storage_columns
from hwmodels.cost import COSTS, Bound, BoundaryCost, Cost, CostReport, CostTable, LayerCosts, Tier, Workload
from hwmodels.memory import peak_activation_bytes
from hwmodels.network import Layer, Network, Tensor
from hwmodels.precision import Precision
from hwmodels.vela.cache import cache_key, default_folder, load_report, save_report
from hwmodels.vela.compiler import NetworkReport, Target, compile_tflite, require_vela
from hwmodels.vela.held import Held
from hwmodels.vela.tflite import TfliteFile, check_kind, write_tflite

ACCELERATORS = tuple(
    f"ethos-{family}-{macs}"
    for family, sizes in {"u55": (32, 64, 128, 256), "u65": (256, 512), "u85": (128, 256, 512, 1024, 2048)}.items()
    for macs in sizes
)
"""Vela's names of what it compiles for: the family and its multiply-accumulates per cycle."""

SYSTEM_CONFIGS = {
    "u55": "Ethos_U55_High_End_Embedded",
    "u65": "Ethos_U65_High_End",
    "u85": "Ethos_U85_SYS_DRAM_Mid",
}
MEMORY_MODES = {"u55": "Shared_Sram", "u65": "Dedicated_Sram_384KB", "u85": "Dedicated_Sram_384KB"}
"""Those of the accelerators' device files; for U55 and U85 also what Vela takes where it is told nothing."""

SIGMA = 0.3
"""Standard deviation of the logarithm of true over estimated time, common to all layers: assumed, since Arm names no
error; its estimate of one linear layer went from 94 to 13 thousand cycles between releases 5.0 and 5.1
(github.com/pytorch/executorch, issue 21459)."""

INT8_CODES = range(-127, 128)  # of int8
LATENCY, ENERGY = COSTS.index("latency_s"), COSTS.index("energy_j")
TIERS: dict[str, Tier] = {
    "latency_s": "datasheet",
    "weight_bytes": "exact",
    "activation_bytes": "exact",
    "bit_ops": "exact",
}


@dataclass(frozen=True)
class _Share:
    """What one layer has of a compilation, with the operations that follow it: cycles, and those spent on waiting."""

    cycles: int = 0
    waiting: int = 0  # of operators that memory takes longer for than computing

    @property
    def bound(self) -> Bound:
        return "memory" if 2 * self.waiting > self.cycles else "compute"


class Vela(CostModel):
    """Prices precisions on an Arm Ethos-U by compiling the network with Vela.

    Weights of fewer than 8 bits are coded in fewer bytes, which saves time where weights are what is waited for;
    inputs of 16 bits take about twice the cycles of 8. Weights are drawn at random unless they are given: trained ones
    are coded in fewer bytes. `weight_bytes` and `activation_bytes` are counted as for every device; what Vela made of
    them is said in the report's `source`, and in full by `compile`.
    """

    def __init__(
        self,
        accelerator: str = "ethos-u55-128",
        system_config: str = "",
        memory_mode: str = "",
        config: str | Path = "",
        cache: str | Path = "",
        timeout_s: float = 600.0,
        weights: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Takes what Vela compiles for.

        Args:
            accelerator: Vela's name, such as `ethos-u55-128`.
            system_config: Clock and memories, a section of Vela's configuration; by default that of the accelerator's
                device file.
            memory_mode: What is kept in which memory, likewise.
            config: Path of a configuration of one's own, in Vela's format; by default the one that Vela brings along.
            cache: Folder of what was compiled before; by default in the user's cache folder.
            timeout_s: Longest a compilation may take.
            weights: Layer name to its weight as int8, in the module's shape; fewer bits are rounded from it.

        Raises:
            ValueError: If Vela is not installed, there is no such accelerator, or the system is one of another family.
        """
        if accelerator not in ACCELERATORS:
            near = difflib.get_close_matches(accelerator, ACCELERATORS, 1)
            hint = f"; did you mean {near[0]}" if near else ""
            raise ValueError(f"no accelerator {accelerator!r}{hint}; Vela has {', '.join(ACCELERATORS)}")
        for name, values in (weights or {}).items():
            if values.dtype != np.int8:
                raise ValueError(f"weights[{name!r}] must be int8, got {values.dtype}")
        self.version = require_vela()
        family = accelerator.split("-")[1]
        text = Path(config).read_text(encoding="utf-8") if config else ""
        if not config and system_config and not system_config.startswith(f"Ethos_{family.upper()}_"):
            raise ValueError(
                f"system_config={system_config} is none of {accelerator}; Vela's begin with Ethos_{family.upper()}_, "
                f"such as {SYSTEM_CONFIGS[family]}"
            )
        self.target = Target(
            accelerator, system_config or SYSTEM_CONFIGS[family], memory_mode or MEMORY_MODES[family], text
        )
        self.name = f"vela-{accelerator}"
        self.timeout_s = timeout_s
        self._folder = Path(cache) if cache else default_folder()
        self._weights = dict(weights or {})
        self._network: Network | None = None  # that `_known` is about
        self._known: dict[tuple[Held, ...], tuple[TfliteFile, NetworkReport]] = {}

    def refusal(self, layer: Layer, precision: Precision) -> str | None:
        try:
            check_kind(layer)
            Held.of(layer, precision)
        except ValueError as error:
            return str(error)
        return None

    def compile(self, network: Network, policy: Mapping[str, Precision]) -> NetworkReport:
        """All that Vela says of a policy; layers that it leaves out are at int8/int8.

        Raises:
            ValueError: If the NPU cannot run the network or hold the policy, or Vela fails.
        """
        return self._compile(network, self._held(network, policy))[1]

    def cost_table(self, network: Network, choices: Choices, workload: Workload) -> CostTable:
        """Prices every choice from networks with one precision throughout.

        A layer's latency counts the operations that follow it, which run in its width; boundaries price the
        requantizing between 8 and 16 bits by the values of the tensor. `fixed` holds what no layer precedes, and layers
        without choices at int8/int8.

        Raises:
            ValueError: If the NPU cannot run the network or hold a precision, or Vela fails.
        """
        held = {
            name: {precision: Held.of(network[name], precision) for precision in precisions}
            for name, precisions in choices.items()
        }
        distinct = dict.fromkeys(one for precisions in held.values() for one in precisions.values())
        uniform = {one: self._compile(network, dict.fromkeys(network.names, one)) for one in (_INT8, *distinct)}
        shares = {one: _shares(network, *compiled) for one, compiled in uniform.items()}
        clock = uniform[_INT8][1].clock_hz / workload.batch
        layers = {}
        for name, precisions in choices.items():
            values = storage_columns(network[name], precisions, workload)
            mine = [shares[held[name][precision]].get(name, _Share()) for precision in precisions]
            values[:, LATENCY] = [share.cycles / clock for share in mine]
            values[:, ENERGY] = math.nan
            runs = [self._run(precision, share) for precision, share in zip(precisions, mine, strict=True)]
            layers[name] = LayerCosts(precisions, values, runs)
        rest = sum(share.cycles for name, share in shares[_INT8].items() if name not in choices)
        fixed = replace(fixed_storage(network), latency_s=rest / clock, energy_j=math.nan)
        return CostTable(
            layers,
            fixed,
            TIERS,
            f"{self._source}; sums of layers of networks with one precision throughout",
            self._boundaries(network, held, clock),
            {self.name: SIGMA},
            self.name,
            self._warnings,
        )

    def confirm(self, network: Network, policy: Mapping[str, Precision], workload: Workload) -> CostReport:
        """What Vela says of a whole policy: the network compiled at those very precisions.

        Raises:
            ValueError: If the NPU cannot run the network or hold the policy, or Vela fails.
        """
        file, report = self._compile(network, self._held(network, policy))
        shares = _shares(network, file, report)
        layers = {}
        for name, precision in policy.items():
            values = storage_columns(network[name], (precision,), workload)
            share = shares.get(name, _Share())
            values[:, LATENCY], values[:, ENERGY] = workload.batch * share.cycles / report.clock_hz, math.nan
            layers[name] = LayerCosts((precision,), values, [self._run(precision, share)])[precision]
        total = sum((layer.cost for layer in layers.values()), start=fixed_storage(network))
        seconds = workload.batch * report.latency_s
        peak = peak_activation_bytes(network, policy) * workload.batch
        used = ", ".join(f"{size:,} bytes of {memory}" for memory, size in report.memory_bytes.items())
        encoded = f"{report.encoded_weight_bytes:,} bytes of weights encoded from {report.original_weight_bytes:,}"
        return CostReport(
            replace(total, latency_s=seconds, energy_j=math.nan, activation_bytes=peak),
            layers,
            TIERS,
            f"{self._source}; whole network: {report.cycles:,} cycles, {encoded}, {used}",
            {self.name: seconds},
            {self.name: SIGMA},
            self._warnings,
        )

    @property
    def _source(self) -> str:
        target = self.target
        return f"Vela {self.version} for {target.accelerator}, {target.system_config}, {target.memory_mode}"

    @property
    def _warnings(self) -> tuple[str, ...]:
        warnings = [f"{self.name}: Arm calls Vela's cycles an approximate estimate, not a measurement"]
        if not self._weights:
            warnings.append(f"{self.name}: weights are random; trained ones are encoded in fewer bytes")
        return tuple(warnings)

    def _run(self, precision: Precision, share: _Share) -> tuple[str, Bound, str, Tier, str]:
        """How a precision runs: the fields of `LayerCost` after `cost`."""
        compute = "int16" if precision.input.bits > 8 else "int8"
        support = "native" if precision.weight.bits == 8 else "storage"
        return compute, share.bound, self.name, "datasheet", support

    def _held(self, network: Network, policy: Mapping[str, Precision]) -> dict[str, Held]:
        return {layer.name: Held.of(layer, policy[layer.name]) if layer.name in policy else _INT8 for layer in network}

    def _compile(self, network: Network, held: Mapping[str, Held]) -> tuple[TfliteFile, NetworkReport]:
        """Compiles a network unless that was done before, here or by whoever shares the folder."""
        if self._network is not network:
            self._network, self._known = network, {}
        key = tuple(held[name] for name in network.names)
        if key not in self._known:
            file = write_tflite(network, held, self._weights)
            digest = cache_key(self.version, self.target, file.data)
            report = load_report(self._folder, digest)
            if report is None:
                report = compile_tflite(file.data, len(file.owners), self.target, self.timeout_s)
                save_report(self._folder, digest, report)
            _check_runs(file, report)
            self._known[key] = replace(file, data=b""), report  # megabytes that nobody reads again
        return self._known[key]

    def _boundaries(
        self, network: Network, held: Mapping[str, Mapping[Precision, Held]], clock: float
    ) -> tuple[BoundaryCost, ...]:
        """What requantizing costs between layers that may differ in width; nothing where all are of one.

        A tensor that a layer and an addition both read is requantized once and priced for each.
        """
        if len({one.bits for precisions in held.values() for one in precisions.values()}) < 2:
            return ()
        cycles, sources = self._requantizing(network), _sources(network)
        bits = {name: {precision: str(one.bits) for precision, one in row.items()} for name, row in held.items()}
        found = []

        def meet(tensor: Tensor, first: str, second: str, to_second: bool) -> None:
            """Adds what it costs that a tensor comes in the width of one layer and is read in that of another."""
            if first in bits and second in bits and first != second:
                wide, narrow = (Cost(latency_s=tensor.values * cycles[width] / clock) for width in (16, 8))
                costs = (
                    {("8", "16"): wide, ("16", "8"): narrow} if to_second else {("8", "16"): narrow, ("16", "8"): wide}
                )
                found.append(BoundaryCost(tensor.name, first, second, bits[first], bits[second], costs, self.name))

        for tensor in network.tensors.values():
            consumer = next((reader for reader in tensor.consumers if reader in held), "")
            meet(tensor, sources.get(tensor.producer or "", ""), consumer, to_second=True)
        for operation in network.operations:  # which run in the width of the first tensor they read
            for other in operation.reads[1:]:
                joined = network.tensors[other]
                meet(joined, sources[operation.name], sources.get(joined.producer or "", ""), to_second=False)
        return tuple(found)

    def _requantizing(self, network: Network) -> dict[int, float]:
        """Cycles per value of requantizing to 8 and to 16 bits, from networks whose layers alternate in width."""
        cycles, values = {8: 0, 16: 0}, {8: 0, 16: 0}
        for widths in ((8, 16), (16, 8)):
            held = {name: Held(INT8_CODES, widths[number % 2]) for number, name in enumerate(network.names)}
            file, report = self._compile(network, held)
            for number, (count, bits) in file.requantized.items():
                if (operator := report.operators[number]) is not None:
                    cycles[bits] += operator.cycles
                    values[bits] += count
        return {bits: cycles[bits] / max(values[bits], 1) for bits in cycles}


_INT8 = Held(INT8_CODES, 8)


def _shares(network: Network, file: TfliteFile, report: NetworkReport) -> dict[str, _Share]:
    """Layer to its share of the cycles; the empty name has what no layer precedes."""
    sources = _sources(network)
    shares: dict[str, _Share] = {}
    for owner, operator in zip(file.owners, report.operators, strict=True):
        if operator is not None:
            name = sources[owner]
            before = shares.get(name, _Share())
            waiting = operator.cycles if operator.cycles > operator.npu_cycles else 0
            shares[name] = _Share(before.cycles + operator.cycles, before.waiting + waiting)
    return shares


def _sources(network: Network) -> dict[str, str]:
    """Layers to themselves, and operations to the layer they follow, by the first tensor they read; else to nothing."""
    operations = {operation.name: operation for operation in network.operations}
    found: dict[str, str] = {}
    for name in network.order:
        reads = operations[name].reads if name in operations else ()
        producer = network.tensors[reads[0]].producer if reads else None
        found[name] = name if name in network else found.get(producer or "", "")
    return found


def _check_runs(file: TfliteFile, report: NetworkReport) -> None:
    """Raises ValueError if Vela left something to the CPU."""
    left: Sequence[str] = [
        owner
        for owner, operator in zip(file.owners, report.operators, strict=True)
        if operator is not None and not operator.runs_on_npu
    ]
    if left:
        raise ValueError(
            f"Vela leaves {', '.join(dict.fromkeys(left))} to the CPU, whose time it does not know: the network "
            "cannot be priced on this target"
        )
