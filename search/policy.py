"""A policy: which precision every layer gets."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property

from hwmodels import Network, Precision


class Policy(Mapping[str, Precision]):
    """An immutable mapping from layer name to precision, with a digest that names it in logs and caches."""

    def __init__(self, precisions: Mapping[str, Precision]) -> None:
        self._precisions = dict(precisions)

    def __getitem__(self, layer: str) -> Precision:
        return self._precisions[layer]

    def __iter__(self) -> Iterator[str]:
        return iter(self._precisions)

    def __len__(self) -> int:
        return len(self._precisions)

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Policy) and self._precisions == other._precisions

    def __repr__(self) -> str:
        return f"Policy({self.to_dict()})"

    @cached_property
    def digest(self) -> str:
        """Twelve hexadecimal digits that depend on the layers and their precisions, not on their order."""
        text = json.dumps(self.to_dict(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, str]:
        """Layer name to precision name, such as `{"conv1": "int4/uint8"}`."""
        return {layer: str(precision) for layer, precision in self._precisions.items()}

    @classmethod
    def from_dict(cls, names: Mapping[str, str]) -> Policy:
        """Reads what `to_dict` wrote."""
        return cls({layer: Precision.parse(name) for layer, name in names.items()})

    @classmethod
    def uniform(cls, network: Network, precision: Precision) -> Policy:
        """Gives every layer `precision`, its input left in float where the layer is weight-only."""
        weight_only = Precision(precision.weight)
        return cls({layer.name: precision if layer.quantizes_input else weight_only for layer in network})

    def average_weight_bits(self, network: Network) -> float:
        """Mean nominal bits per weight."""
        return sum(self[layer.name].weight.bits * layer.weight_count for layer in network) / network.weight_count

    def effective_bits(self, network: Network) -> float:
        """Mean stored bits per weight, scales and zero points counted."""
        bits = sum(layer.weight_bits(self[layer.name].weight) for layer in network)
        return bits / network.weight_count
