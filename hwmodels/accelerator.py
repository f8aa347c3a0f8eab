"""What the accelerators of research papers share: a file of sourced numbers each, and a price for integers alone.

Their papers say how many cycles a matrix product takes, and nothing of what runs between layers. So other operations,
conversions and starting the network are free here, floats are refused, and energy is an index of counted operations
and bytes.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from hwmodels.base import Choices, CostModel, fixed_storage, storage_columns
from hwmodels.cost import COSTS, Bound, CostTable, LayerCosts, Tier, Workload
from hwmodels.device import OperationEnergy, closest, listed, read_yaml
from hwmodels.network import Layer, Network
from hwmodels.precision import Precision
from hwmodels.quantity import Quantity, expect, expect_positive
from hwmodels.site import Site

FOLDER = Path(__file__).with_name("accelerators")
LATENCY, ENERGY = COSTS.index("latency_s"), COSTS.index("energy_j")


@dataclass(frozen=True)
class Accelerator:
    """What every such accelerator has; subclasses add their array.

    Attributes:
        id: Short name, the file's.
        name: What people call it.
        description: What it is and what its numbers rest on, in words.
        clock: Clock frequency; where it is assumed, latencies are good for ratios only.
        sigma: Standard deviation of the logarithm of true over predicted latency, common to all layers.
        energy: Energy of operations, and of the bytes that are loaded.
    """

    schema: Literal[1]
    id: str
    name: str
    description: str
    clock: Quantity
    sigma: Quantity
    energy: OperationEnergy
    __pydantic_config__: ClassVar[Any] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        expect("clock", "Hz", self.clock)
        expect_positive("clock", self.clock)
        expect("sigma", "1", self.sigma)

    def expect_counts(self, *names: str) -> None:
        """Raises ValueError unless these fields are whole numbers of at least 1."""
        for name in names:
            given: Quantity = getattr(self, name)
            expect(name, "1", given)
            if not (given.is_known and given.number >= 1 and given.number == int(given.number)):
                raise ValueError(f"{name} must be a whole number of at least 1, got {given.value}")

    @property
    def tier(self) -> Tier:
        """How far its latencies can be trusted."""
        return "index" if self.clock.confidence == "assumed" else "datasheet"

    @property
    def quantities(self) -> dict[str, Quantity]:
        """Every number by the name of its field, those of `energy` as `energy.int8_add`."""
        own = {item.name: getattr(self, item.name) for item in fields(self)}
        own |= {f"energy.{item.name}": getattr(self.energy, item.name) for item in fields(self.energy)}
        return {name: value for name, value in own.items() if isinstance(value, Quantity)}


Kind = TypeVar("Kind", bound=Accelerator)


def list_accelerators() -> tuple[str, ...]:
    """Names of the accelerators that come with the package."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_accelerator(kind: type[Kind], name: str | Path) -> Kind:
    """Loads an accelerator by its name, or from a YAML file of the same schema.

    Args:
        kind: What it must be.
        name: One of `list_accelerators()`, or a path that ends in `.yaml` or `.yml`.

    Raises:
        ValueError: If there is no such accelerator or file, or the file is not valid; the message names the key.
    """
    import pydantic

    path = Path(name)
    if path.suffix not in (".yaml", ".yml"):
        known = list_accelerators()
        if str(name) not in known:
            raise ValueError(
                f"no accelerator {str(name)!r}{closest(name, known)}; known accelerators: {listed(known)}; "
                "a path that ends in .yaml loads your own"
            )
        path = FOLDER / f"{name}.yaml"
    try:
        return pydantic.TypeAdapter(kind).validate_python(read_yaml(path))
    except pydantic.ValidationError as error:
        problems = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or kind.__name__}: {item['msg']}" for item in error.errors()
        )
        raise ValueError(f"{path} is not a valid {kind.__name__}: {problems}") from error


@dataclass(frozen=True)
class Priced:
    """What calls of layers cost, one row per layer and precision.

    Attributes:
        cycles: Clock cycles.
        joules: Energy.
        compute_bound: Whether computing takes longer than loading.
    """

    cycles: np.ndarray
    joules: np.ndarray
    compute_bound: np.ndarray


class AcceleratorModel(CostModel):
    """Prices integers on an accelerator; subclasses say what a call of a layer costs.

    Attributes:
        accelerator: What it is a model of.
        widths: Widths that it multiplies in, the narrowest first; others are rounded up.
        load_bits: Bits of weights that it loads in a cycle; embeddings are looked up at that rate.
        compute: What multiplications run in, in a word.
    """

    compute: str

    def __init__(self, accelerator: Accelerator, widths: tuple[int, ...], load_bits: float) -> None:
        self.accelerator, self.widths, self.load_bits = accelerator, widths, load_bits
        self.name = accelerator.id
        self._runs: dict[tuple[Precision, bool], tuple[Any, ...]] = {}

    @abstractmethod
    def price(self, sites: Sequence[Site], rows: np.ndarray, weight_bits: np.ndarray, input_bits: np.ndarray) -> Priced:
        """Prices single calls of layers.

        Args:
            sites: The calls.
            rows: For each row the index of its site, shape `(rows,)`.
            weight_bits: Bits of a weight, of the model's `widths`.
            input_bits: Bits of an input.
        """

    def refusal(self, layer: Layer, precision: Precision) -> str | None:
        weight, input_ = precision.weight, precision.input
        allowed = f"allowed: integers of 1 to {self.widths[-1]} bits with a static scale, such as int4/uint8"
        is_lookup = layer.kind == "embedding"
        if not layer.quantizes_input and not is_lookup:
            return f"{self.name} multiplies integers only, and a weight-only {layer.kind} reads floats"
        if is_lookup and not input_.is_float:
            return f"an embedding is weight-only: use {weight}, not {precision}"
        for side, format in (("weights", weight), ("inputs", input_)):
            if side == "inputs" and is_lookup:
                continue
            if not (format.is_static_integer and format.bits <= self.widths[-1]):
                return f"{self.name} has no {side} in {format}; {allowed}"
        return None

    def cost_table(self, network: Network, choices: Choices, workload: Workload) -> CostTable:
        """Prices every choice of every layer; other operations and conversions are free.

        Raises:
            ValueError: If a precision is not of static integers; the message names the layer and what is allowed.
        """
        self._check(network, choices)
        priced = self._price(network, choices, workload)
        clock, columns = self.accelerator.clock.number, {}
        start = 0
        for name, precisions in choices.items():
            here, layer = slice(start, start + len(precisions)), network[name]
            start = here.stop
            values = storage_columns(layer, precisions, workload)
            values[:, LATENCY] = layer.calls * priced.cycles[here] / clock
            values[:, ENERGY] = layer.calls * priced.joules[here]
            bound = priced.compute_bound[here].tolist()
            runs = [self._run(*one) for one in zip(precisions, bound, strict=True)]
            columns[name] = LayerCosts(precisions, values, runs)
        tiers: dict[str, Tier] = {"weight_bytes": "exact", "activation_bytes": "exact", "bit_ops": "exact"}
        return CostTable(
            columns,
            fixed_storage(network),
            {"latency_s": self.accelerator.tier, "energy_j": self.accelerator.energy.tier, **tiers},
            f"cycles of {self.name} ({self.accelerator.name}) at {clock:g} Hz; energy is an index",
            sigmas={self.name: self.accelerator.sigma.number},
            fixed_path=self.name,
            warnings=self._warnings,
        )

    def _check(self, network: Network, choices: Choices) -> None:
        """Raises ValueError where a precision is refused."""
        runs: dict[tuple[bool, bool], set[Precision]] = defaultdict(set)
        for name, precisions in choices.items():
            layer = network[name]
            known = runs[layer.kind == "embedding", layer.quantizes_input]
            for precision in set(precisions) - known:
                why = self.refusal(layer, precision)
                if why is not None:
                    raise ValueError(f"layer {name}: {why}")
                known.add(precision)

    def _price(self, network: Network, choices: Choices, workload: Workload) -> Priced:
        """Prices one call of every layer at each of its precisions, all in one go."""
        sites = [Site.of(network[name], workload) for name in choices]
        counts = [len(precisions) for precisions in choices.values()]
        rows = np.repeat(np.arange(len(sites)), counts)
        precisions = [precision for row in choices.values() for precision in row]
        width = {bits: min(one for one in self.widths if one >= bits) for bits in range(1, self.widths[-1] + 1)}
        weight_bits = np.array([width[precision.weight.bits] for precision in precisions], dtype=np.float64)
        input_bits = np.array([width.get(precision.input.bits, 0) for precision in precisions], dtype=np.float64)

        cycles, joules = np.zeros((2, len(rows)))
        compute_bound = np.zeros(len(rows), dtype=bool)
        is_lookup = np.array([site.kind == "embedding" for site in sites], dtype=bool)[rows]
        if len(at := np.flatnonzero(~is_lookup)):
            priced = self.price(sites, rows[at], weight_bits[at], input_bits[at])
            cycles[at], joules[at], compute_bound[at] = priced.cycles, priced.joules, priced.compute_bound
        if len(at := np.flatnonzero(is_lookup)):
            bits = numbers([(site.output_values,) for site in sites], rows[at])[0] * weight_bits[at]
            cycles[at] = bits / self.load_bits
            joules[at] = bits / 8 * self.accelerator.energy.memory.number
        return Priced(cycles, joules, compute_bound)

    def _run(self, precision: Precision, compute_bound: bool) -> tuple[Any, ...]:
        """How a layer runs: the fields of `LayerCost` after `cost`."""
        key = precision, compute_bound
        if key not in self._runs:
            sides = (precision.weight,) if precision.input.is_float else (precision.weight, precision.input)
            support = "native" if all(side.bits in self.widths for side in sides) else "storage"
            bound: Bound = "compute" if compute_bound else "memory"
            self._runs[key] = self.compute, bound, self.name, self.accelerator.tier, support
        return self._runs[key]

    @property
    def _warnings(self) -> tuple[str, ...]:
        between = f"{self.name}: what runs between layers is not priced"
        if self.accelerator.tier != "index":
            return (between,)
        return (between, f"{self.name}: its clock is nominal, so latencies are good for ratios only")


def of_pairs(function: Callable[[int, int], float], weight_bits: np.ndarray, input_bits: np.ndarray) -> np.ndarray:
    """A function of weight and input bits, element by element, called once for every pair that occurs."""
    pairs, place = np.unique(np.stack([weight_bits, input_bits]), axis=1, return_inverse=True)
    values = np.array([function(int(w), int(a)) for w, a in pairs.T], dtype=np.float64)
    found: np.ndarray = values[place.reshape(-1)]
    return found


def numbers(records: Sequence[tuple[int, ...]], rows: np.ndarray) -> np.ndarray:
    """Numbers that every site has, shape `(numbers, rows)`: for each row those of its site."""
    found: np.ndarray = np.array(records, dtype=np.float64).T[:, rows]
    return found
