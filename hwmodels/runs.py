"""How a device runs a kind of layer at each of several precisions, in columns: resolved once, priced for many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hwmodels.capability import Capability
from hwmodels.conversion import left_as, read_as
from hwmodels.device import Device
from hwmodels.energy import mac_energy
from hwmodels.network import Layer
from hwmodels.precision import Format, Precision


@dataclass(frozen=True)
class Runs:
    """How a device runs one kind of layer at each of several precisions.

    Attributes:
        precisions: The precisions.
        ways: The capabilities that they meet, each once.
        way: Index of each precision's, shape `(precisions,)`.
        formats: The weight formats that occur, each once.
        format: Index of each precision's, shape `(precisions,)`.
        weight_width: Bits of a weight in memory while running, scales left out, shape `(precisions,)`.
        is_packed: Whether weights are held in their own format with its scales, shape `(precisions,)`.
        input_width: Bits at which inputs are read, shape `(precisions,)`.
        mac_energy: Joules of a multiply-accumulate, shape `(precisions,)`.
        read: What each needs of its input; see `hwmodels.conversion`.
        left: What each can leave for the next layer.
    """

    precisions: tuple[Precision, ...]
    ways: tuple[Capability, ...]
    way: np.ndarray
    formats: tuple[Format, ...]
    format: np.ndarray
    weight_width: np.ndarray
    is_packed: np.ndarray
    input_width: np.ndarray
    mac_energy: np.ndarray
    read: tuple[str, ...]
    left: tuple[str, ...]

    @cached_property
    def read_of(self) -> Mapping[Precision, str]:
        """What each precision needs of its input."""
        return dict(zip(self.precisions, self.read, strict=True))

    @cached_property
    def left_of(self) -> Mapping[Precision, str]:
        """What each precision can leave for the next layer."""
        return dict(zip(self.precisions, self.left, strict=True))

    def weight_bytes(self, layer: Layer) -> np.ndarray:
        """Bytes of a layer's weights in memory while running, shape `(precisions,)`."""
        own = np.array([layer.weight_bits(format) for format in self.formats])[self.format]
        held: np.ndarray = np.where(self.is_packed, own, layer.weight_count * self.weight_width) / 8
        return held


def resolve(device: Device, layer: Layer, precisions: Sequence[Precision], capabilities: Sequence[Capability]) -> Runs:
    """Gathers how a device runs layers like `layer`, given what it can do with each precision."""
    ways = tuple({id(one): one for one in capabilities}.values())
    numbers = {id(one): number for number, one in enumerate(ways)}
    formats = tuple(dict.fromkeys(precision.weight for precision in precisions))
    both = list(zip(capabilities, precisions, strict=True))
    weight_width = [run.weight_width(precision) for run, precision in both]
    input_width = [run.input_width(precision) for run, precision in both]
    return Runs(
        tuple(precisions),
        ways,
        np.array([numbers[id(one)] for one in capabilities], dtype=np.intp),
        formats,
        np.array([formats.index(precision.weight) for precision in precisions], dtype=np.intp),
        np.array(weight_width, dtype=np.float64),
        np.array([run.held_weight_bits is None for run in capabilities]),
        np.array(input_width, dtype=np.float64),
        np.array(
            [
                mac_energy(device.energy, run.compute, weight, input_)
                for run, weight, input_ in zip(capabilities, weight_width, input_width, strict=True)
            ]
        ),
        tuple(read_as(layer, precision, run, device.float_bits) for run, precision in both),
        tuple(left_as(run) for run in capabilities),
    )
