"""What the device can run at all: the rest is dropped from the space before anything is scored."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from hwmodels import FLOAT, CostModel, Format, Layer, Network
from hwmodels.precision import FLOAT_PRECISION, Precision, Side
from search.errors import ConfigError
from search.space import SearchSpace, Unit

Entry = tuple[int, Format]  # a decision's index and one of its formats


@dataclass(frozen=True)
class Dropped:
    """A format that a decision lost because the device cannot run it.

    Attributes:
        decision: Name of the decision.
        side: `weight` or `input`.
        layers: The layers that decision is about.
        format: The format's name.
        why: What the device says.
    """

    decision: str
    side: Side
    layers: tuple[str, ...]
    format: str
    why: str


class Refusal(NamedTuple):
    """Why a layer cannot have a precision, and which sides of it are at fault."""

    why: str
    sides: tuple[Side, ...] = ("weight", "input")


class Target(Protocol):
    """What can refuse to run a layer in a precision: a device, or a backend."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def remedy(self) -> str:
        """What to do where it leaves nothing."""

    @property
    def leaves_float(self) -> bool:
        """Whether a tensor that it can run in none of the formats stays in float, instead of being an error."""

    def refuses(self, layer: Layer, precision: Precision) -> Refusal | None:
        """Why it cannot run a layer in a precision; None if it can."""


@dataclass(frozen=True)
class DeviceTarget:
    """A device as a target: of a pair of formats that it has no kernel for, either may be at fault."""

    cost_model: CostModel

    @property
    def name(self) -> str:
        """The device's name."""
        return self.cost_model.name

    @property
    def remedy(self) -> str:
        """Where its capabilities are listed."""
        return f"`bitplan hardware show {self.name}` lists what it can run"

    @property
    def leaves_float(self) -> bool:
        """A device runs what it is asked to."""
        return False

    def refuses(self, layer: Layer, precision: Precision) -> Refusal | None:
        """What the cost model says."""
        why = self.cost_model.refusal(layer, precision)
        return None if why is None else Refusal(why)


def runnable(
    space: SearchSpace, network: Network, cost_model: CostModel, targets: Iterable[Target] = ()
) -> tuple[SearchSpace, tuple[Dropped, ...]]:
    """Drops from a space what the device, or another target, refuses to run.

    The choices of a unit are all pairs of its formats. Where a target refuses some of the pairs, the format most of
    whose pairs it refuses goes first, the wider of two, until no refused pair is left. A tensor that a backend can
    quantize in none of its formats stays in float.

    Raises:
        ConfigError: If a decision would be left without any format.
    """
    device = DeviceTarget(cost_model)
    dropped: tuple[Dropped, ...] = ()
    for target in (device, *targets):
        space, more = _runnable(space, network, target)
        dropped += more
    for decision in space.decisions if targets else ():
        for layer in decision.layers if decision.formats == (FLOAT,) else ():
            if refusal := device.refuses(network[layer], FLOAT_PRECISION):
                raise ConfigError(
                    f"{layer} can be quantized in none of space.{decision.side} and would stay in float, which "
                    f"{device.name} cannot run: {refusal.why}"
                )
    return space, dropped


def _runnable(space: SearchSpace, network: Network, target: Target) -> tuple[SearchSpace, tuple[Dropped, ...]]:
    formats = [list(decision.formats) for decision in space.decisions]
    dropped: dict[Entry, str] = {}
    while refused := _refused(space, network, target, formats):
        blame: Counter[Entry] = Counter()
        for pair, _ in refused:
            blame.update(pair)
        entry = max(blame, key=lambda one: (blame[one] / _pairs(space, formats, one), one[1].bits, str(one[1])))
        why = next(why for pair, why in refused if entry in pair)
        if len(formats[entry[0]]) == 1:
            other = [one for pair, _ in refused if entry in pair for one in pair if one != entry]
            entry = next((one for one in other if len(formats[one[0]]) > 1), entry)
        index, format = entry
        formats[index].remove(format)
        dropped[entry] = why
        if not formats[index] and target.leaves_float and not format.is_float:
            formats[index] = [FLOAT]
        if not formats[index]:
            decision = space.decisions[index]
            raise ConfigError(
                f"{target.name} can run none of space.{decision.side} = "
                f"{', '.join(map(str, decision.formats))} for {', '.join(decision.layers[:4])}: {why}. {target.remedy}"
            )
    if not dropped:
        return space, ()
    kept = space.restricted({index: tuple(allowed) for index, allowed in enumerate(formats)})
    return kept, tuple(_record(space, entry, why) for entry, why in dropped.items())


def without(space: SearchSpace, dropped: Iterable[Mapping[str, Any]]) -> SearchSpace:
    """The space without what was dropped from it, as run.json records it."""
    gone = {(entry["side"], entry["decision"], entry["format"]) for entry in dropped}
    kept = {
        index: tuple(format for format in one.formats if (one.side, one.name, str(format)) not in gone)
        for index, one in enumerate(space.decisions)
    }
    return space.restricted({index: formats or (FLOAT,) for index, formats in kept.items()}) if gone else space


def in_words(dropped: Sequence[Dropped]) -> tuple[str, ...]:
    """What was dropped, a sentence for each reason and side."""
    formats: dict[tuple[Side, str], dict[str, None]] = defaultdict(dict)
    layers: dict[tuple[Side, str], dict[str, None]] = defaultdict(dict)
    for entry in dropped:
        formats[entry.side, entry.why][entry.format] = None
        layers[entry.side, entry.why] |= dict.fromkeys(entry.layers)
    return tuple(
        f"{side} format{'s'[: len(names) > 1]} {', '.join(names)} dropped for {_count([*layers[side, why]])}: {why}"
        for (side, why), names in formats.items()
    )


def _count(layers: Sequence[str]) -> str:
    return ", ".join(layers) if len(layers) <= 3 else f"{len(layers)} layers"


def _refused(
    space: SearchSpace, network: Network, target: Target, formats: list[list[Format]]
) -> list[tuple[tuple[Entry, ...], str]]:
    """The entries at fault in every pair that the target refuses for some layer, with its reason."""
    found = []
    for unit in space.units:
        for weight, input_ in itertools.product(formats[unit.weight], formats[unit.input]):
            refusal = next(_refusals(space, network, target, unit.layers, Precision(weight, input_)), None)
            if refusal is not None:
                entries: dict[Side, Entry] = {"weight": (unit.weight, weight), "input": (unit.input, input_)}
                found.append((tuple(entries[side] for side in refusal.sides), refusal.why))
    return found


def _refusals(
    space: SearchSpace, network: Network, target: Target, layers: tuple[str, ...], choice: Precision
) -> Iterator[Refusal]:
    for layer in layers:
        refusal = target.refuses(network[layer], space.precision_of(layer, choice))
        if refusal is not None:
            yield refusal


def _pairs(space: SearchSpace, formats: list[list[Format]], entry: Entry) -> int:
    """In how many pairs an entry takes part."""
    partners = [unit.input if unit.weight == entry[0] else unit.weight for unit in space.units if _about(unit, entry)]
    return sum(len(formats[partner]) for partner in partners)


def _about(unit: Unit, entry: Entry) -> bool:
    return entry[0] in (unit.weight, unit.input)


def _record(space: SearchSpace, entry: Entry, why: str) -> Dropped:
    decision = space.decisions[entry[0]]
    return Dropped(decision.name, decision.side, decision.layers, str(entry[1]), why)
