"""The search space: what may be decided, and the two coordinates every strategy moves along.

A unit is one layer or one tie. Its weight format is one decision. Input formats belong to tensors: layers that read the
same tensor share its format, so that the input format is a decision of its own, about one tensor. A point of the space
is therefore an integer vector with one entry per unit and one per input, each the index of a format in that
decision's list, ordered from few bits to many.
"""

from __future__ import annotations

import fnmatch
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from hwmodels import FLOAT, Format, Network, Precision
from hwmodels.precision import Side
from search.errors import ConfigError, closest
from search.policy import Policy


@dataclass(frozen=True)
class Decision:
    """One entry of a point: the weight format of a unit, or the format of a tensor that layers read.

    Attributes:
        name: The unit's first layer, or the tensor.
        side: `weight` or `input`.
        layers: The layers whose format it decides.
        formats: What it may be, from few bits to many; a single one where it is pinned or fixed.
    """

    name: str
    side: Side
    layers: tuple[str, ...]
    formats: tuple[Format, ...]

    @property
    def is_free(self) -> bool:
        """Whether there is anything to decide."""
        return len(self.formats) > 1


@dataclass(frozen=True)
class Unit:
    """One layer, or one tie of layers with the same precision.

    Attributes:
        name: The first layer's name.
        layers: Its layers, in execution order.
        choices: The precisions it may take.
        weight: Index of the decision about its weight format.
        input: Index of the decision about its input format.
    """

    name: str
    layers: tuple[str, ...]
    choices: tuple[Precision, ...]
    weight: int
    input: int


@dataclass(frozen=True)
class SearchSpace:
    """The choices of every unit of a network."""

    decisions: tuple[Decision, ...]
    units: tuple[Unit, ...]
    weight_only: frozenset[str] = frozenset()  # layers whose input stays in float

    @property
    def free(self) -> tuple[int, ...]:
        """Indices of the decisions that are open."""
        return tuple(index for index, decision in enumerate(self.decisions) if decision.is_free)

    @property
    def size(self) -> int:
        """Number of policies."""
        return math.prod(len(decision.formats) for decision in self.decisions)

    @cached_property
    def layer_choices(self) -> dict[str, tuple[Precision, ...]]:
        """Layer name to the precisions it may take."""
        return {
            layer: tuple(dict.fromkeys(self.precision_of(layer, choice) for choice in unit.choices))
            for unit in self.units
            for layer in unit.layers
        }

    def precision_of(self, layer: str, choice: Precision) -> Precision:
        """Returns what a unit's choice means for one of its layers: weight-only layers keep float inputs."""
        return Precision(choice.weight) if layer in self.weight_only else choice

    def decode(self, point: Sequence[int]) -> Policy:
        """Turns a point into its policy."""
        chosen = [decision.formats[index] for decision, index in zip(self.decisions, point, strict=True)]
        return Policy(
            {
                layer: self.precision_of(layer, Precision(chosen[unit.weight], chosen[unit.input]))
                for unit in self.units
                for layer in unit.layers
            }
        )

    def encode(self, policy: Mapping[str, Precision]) -> tuple[int, ...]:
        """Turns a policy into its point.

        Raises:
            ConfigError: If the policy lies outside the space; the message names the first layer that does.
        """
        point = []
        for decision in self.decisions:
            formats = {getattr(policy[layer], decision.side) for layer in decision.layers} or set(decision.formats)
            outside = sorted(map(str, formats - set(decision.formats)))
            if outside or len(formats) != 1:
                given = ", ".join(outside or sorted(map(str, formats)))
                raise ConfigError(
                    f"layer {decision.layers[0]}: {decision.side} format {given} is outside the space; "
                    f"allowed, and the same for {', '.join(decision.layers)}: {', '.join(map(str, decision.formats))}"
                )
            point.append(decision.formats.index(formats.pop()))
        return tuple(point)

    def restricted(self, formats: Mapping[int, tuple[Format, ...]]) -> SearchSpace:
        """The space with only some of its formats.

        Args:
            formats: Index of a decision to what it may still be, in the decision's order.
        """
        decisions = tuple(
            replace(one, formats=formats.get(index, one.formats)) for index, one in enumerate(self.decisions)
        )
        return SearchSpace(decisions, _with_choices(self.units, decisions), self.weight_only)

    def sample(self, rng: np.random.Generator) -> Policy:
        """Draws a policy uniformly."""
        return self.decode([int(rng.integers(len(decision.formats))) for decision in self.decisions])

    def neighbours(self, policy: Mapping[str, Precision]) -> Iterator[Policy]:
        """Yields the policies one step of one decision away."""
        point = self.encode(policy)
        for index in self.free:
            for step in (-1, 1):
                moved = point[index] + step
                if 0 <= moved < len(self.decisions[index].formats):
                    yield self.decode((*point[:index], moved, *point[index + 1 :]))

    def __iter__(self) -> Iterator[Policy]:
        """Yields every policy; mind `size`."""
        ranges = (range(len(decision.formats)) for decision in self.decisions)
        return (self.decode(point) for point in itertools.product(*ranges))


def build_space(
    network: Network,
    weight: Sequence[str],
    input: Sequence[str],
    pins: Mapping[str, str] | None = None,
    ties: Sequence[Sequence[str]] | None = None,
) -> SearchSpace:
    """Builds the space of a network.

    Args:
        network: The network whose layers are decided about.
        weight: Names of the weight formats each layer may take.
        input: Names of the input formats each tensor may take; weight-only layers keep float inputs.
        pins: Layer name, glob pattern, `first` or `last`, to the precision that is fixed: `int8` fixes the weight
            format, `int8/uint8` the input format too.
        ties: Lists of layer names or glob patterns; the layers each list matches get the same precision.

    Raises:
        ConfigError: If a format, pattern, pin or tie is wrong, or pins contradict each other.
    """
    weights, inputs = _formats("weight", weight), _formats("input", input)
    pinned_weight, pinned_input = _pins(network, pins or {})
    units = _units(network, ties or [])

    weight_only = frozenset(layer.name for layer in network if not layer.quantizes_input)

    decisions = [Decision(unit[0], "weight", unit, _agree("weight", unit, pinned_weight, weights)) for unit in units]
    unit_input: dict[tuple[str, ...], int] = {}
    for tensor, members in _shared_inputs(network, units).items():
        layers = tuple(layer for unit in members for layer in unit if layer not in weight_only)
        allowed = _agree("input", layers, pinned_input, inputs) if layers else (FLOAT,)
        unit_input |= dict.fromkeys(members, len(decisions))
        decisions.append(Decision(tensor, "input", layers, allowed))

    bare = [Unit(unit[0], unit, (), index, unit_input[unit]) for index, unit in enumerate(units)]
    return SearchSpace(tuple(decisions), _with_choices(bare, decisions), weight_only)


def _with_choices(units: Iterable[Unit], decisions: Sequence[Decision]) -> tuple[Unit, ...]:
    """The units with every pair of their decisions' formats as choices."""
    pairs = [(unit, decisions[unit.weight].formats, decisions[unit.input].formats) for unit in units]
    return tuple(replace(u, choices=tuple(Precision(w, a) for w, a in itertools.product(*both))) for u, *both in pairs)


def _formats(side: Side, names: Sequence[str]) -> tuple[Format, ...]:
    """Parses the formats of `space.weight` or `space.input`, ordered from few bits to many."""
    key = f"space.{side}"
    if not names:
        raise ConfigError(f"{key} is empty; name at least one format, such as int8, uint8 or float")
    try:
        formats = {Format.parse(name) for name in names}
        for format in formats:
            format.check(side)
    except ValueError as error:
        raise ConfigError(f"{key}: {error}") from error
    return tuple(sorted(formats, key=lambda format: (_size(format), format.is_float, format.signed, str(format))))


def _size(format: Format) -> tuple[int, float]:
    """Bits per value, then what is stored beside them, on a matrix of a usual size."""
    side = 1 << 10
    return format.bits, format.effective_bits(side * side, format.groups((side, side)))


def match_layers(network: Network, pattern: str, key: str) -> tuple[str, ...]:
    """Lists the layers that a name, a glob pattern, `first` or `last` stands for.

    Raises:
        ConfigError: If none does.
    """
    if pattern in network:
        return (pattern,)
    if pattern in ("first", "last"):
        return (network.names[0 if pattern == "first" else -1],)
    found = tuple(name for name in network.names if fnmatch.fnmatchcase(name, pattern))
    if not found:
        raise ConfigError(
            f"{key}: no layer matches {pattern!r}{closest(pattern, network.names)}; "
            f"the network's layers are {', '.join(network.names)}"
        )
    return found


def _pins(network: Network, pins: Mapping[str, str]) -> tuple[dict[str, Format], dict[str, Format]]:
    """Resolves pins to the fixed weight format and the fixed input format of layers."""
    weight: dict[str, Format] = {}
    input_: dict[str, Format] = {}
    for pattern, name in pins.items():
        key = f"space.pins.{pattern}"
        try:
            precision = Precision.parse(str(name))
        except ValueError as error:
            raise ConfigError(f"{key}: {error}") from error
        for layer in match_layers(network, str(pattern), key):
            if weight.setdefault(layer, precision.weight) != precision.weight:
                raise ConfigError(f"{key}={name} contradicts another pin, which fixes {layer} to {weight[layer]}")
            if "/" not in str(name):
                continue
            if not network[layer].quantizes_input and precision.input != FLOAT:
                raise ConfigError(
                    f"{key}={name}: {layer} is weight-only, its input stays in float; pin it to {precision.weight}"
                )
            if input_.setdefault(layer, precision.input) != precision.input:
                raise ConfigError(
                    f"{key}={name} contradicts another pin, which fixes the input of {layer} to {input_[layer]}"
                )
    return weight, input_


def _units(network: Network, ties: Sequence[Sequence[str]]) -> list[tuple[str, ...]]:
    """Partitions the layers into ties and single layers, in execution order."""
    unit_of = {name: frozenset([name]) for name in network.names}
    for number, patterns in enumerate(ties):
        key = f"space.ties[{number}]"
        tied = frozenset(name for pattern in patterns for name in match_layers(network, pattern, key))
        merged = frozenset().union(*(unit_of[name] for name in tied))
        unit_of |= dict.fromkeys(merged, merged)
    return list(dict.fromkeys(tuple(n for n in network.names if n in unit_of[name]) for name in network.names))


def _shared_inputs(network: Network, units: Sequence[tuple[str, ...]]) -> dict[str, list[tuple[str, ...]]]:
    """Groups the units that must share an input format, as layers that read one tensor do; keyed by a tensor's name."""
    groups: dict[str, tuple[set[str], list[tuple[str, ...]]]] = {}
    for unit in units:
        tensors = [name for layer in unit if network[layer].quantizes_input for name in network[layer].reads]
        name, members = (tensors or [f"{unit[0]}.input"])[0], [unit]
        for key in [key for key, (read, _) in groups.items() if read & set(tensors)]:
            read, earlier = groups.pop(key)
            tensors, members = [*read, *tensors], [*earlier, *members]
            name = key
        groups[name] = (set(tensors), members)
    return {name: members for name, (_, members) in groups.items()}


def _agree(
    side: str, layers: Sequence[str], pinned: Mapping[str, Format], allowed: tuple[Format, ...]
) -> tuple[Format, ...]:
    """Returns the formats open to layers that share one: the pinned one where any of them is pinned."""
    fixed = {layer: pinned[layer] for layer in layers if layer in pinned}
    if len(set(fixed.values())) > 1:
        given = ", ".join(f"{layer} to {format}" for layer, format in fixed.items())
        raise ConfigError(f"space.pins fixes {given}, but these layers share their {side} format; pin them alike")
    return tuple(set(fixed.values())) or allowed
