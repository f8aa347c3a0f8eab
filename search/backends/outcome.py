"""What backends report: what became of every layer, and what an artifact delivered."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hwmodels import Format, Precision
from hwmodels.precision import Side
from search.errors import UnsupportedError
from search.policy import Policy

Fidelity = Literal["exact", "contained", "altered", "float"]
"""Computes what the simulation computes; the same values in wider storage; other values; not quantized."""


@dataclass(frozen=True)
class LayerExport:
    """What became of one layer.

    Attributes:
        name: The layer.
        precision: What the plan asked for, such as `int3/uint6`.
        weight: How faithfully the weight was exported.
        input: How faithfully the input was exported.
        compute: Type the runtime really multiplies in, such as `int8` or `fp32`; empty where it was not looked at.
        note: Why, where it is not plainly exact; which values change where it is `altered`.
        runs: The precision that runs instead, where a tensor is altered or left in float; empty where it is the plan's.
    """

    name: str
    precision: str
    weight: Fidelity
    input: Fidelity
    compute: str = ""
    note: str = ""
    runs: str = ""

    @property
    def sides(self) -> tuple[tuple[Side, Format, Fidelity], ...]:
        """Weight and input: the format that was planned, and what became of it."""
        planned = Precision.parse(self.precision)
        return ("weight", planned.weight, self.weight), ("input", planned.input, self.input)

    @property
    def faults(self) -> tuple[str, ...]:
        """What is altered, or left in float although the plan quantizes it, in words."""
        return tuple(
            f"{side} of {self.name} ({format}) is {became}"
            for side, format, became in self.sides
            if became == "altered" or (became == "float" and not format.is_float)
        )

    @property
    def departs(self) -> bool:
        """Whether another precision runs than was planned."""
        return bool(self.runs) and Precision.parse(self.runs) != Precision.parse(self.precision)


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, layer by layer.

    Attributes:
        backend: Name of the backend.
        files: The artifact's files.
        layers: What became of each layer.
        recalibrated: Whether the backend chose the ranges itself.
    """

    backend: str
    files: tuple[Path, ...]
    layers: tuple[LayerExport, ...]
    recalibrated: bool = False

    @property
    def policy(self) -> Policy:
        """The precisions that really run."""
        return Policy.from_dict({layer.name: layer.runs or layer.precision for layer in self.layers})

    def require_faithful(self) -> None:
        """Raises UnsupportedError, naming the layers, where a tensor the plan quantizes is altered or left in float."""
        faults = [fault for layer in self.layers for fault in layer.faults]
        if faults:
            raise UnsupportedError(
                f"{self.backend} does not keep the plan: {'; '.join(faults)}. Export without --strict to accept that, "
                f"or search for what it can express: export={self.backend}"
            )


@dataclass(frozen=True)
class Latency:
    """Measured seconds per forward pass, of runs interleaved with those it is compared with."""

    name: str
    batch: int
    median_s: float
    low_s: float
    high_s: float


@dataclass(frozen=True)
class Verification:
    """What an exported plan delivered on the report split.

    Attributes:
        backend: Name of the backend.
        quality: The metric as the artifact achieved it.
        low: Lower end of its 95% interval, from the paired drop against float; None where there is none.
        high: Upper end likewise.
        promised: The metric the plan promises.
        promised_low: Lower end of what the plan's interval allows; None where it has no interval.
        promised_high: Upper end likewise.
        higher_is_better: The metric's direction.
        samples: Samples measured.
        agreement: Share of predictions (the largest output) that are the simulation's, of the precisions that run.
        largest_difference: Largest absolute difference from the simulation's outputs.
        bytes_on_disk: Size of the artifact.
        planned_bytes: Weight bytes the plan predicts.
        other_bytes: What the artifact must hold beside them: biases and other parameters, and layers in float.
        header_bytes: What its files may hold beside tensors, such as names and a graph, before bytes count as missed.
        latencies: The plan, float and uniform int8 on this machine.
        predicted_s: The latency the plan predicts; None where it predicts none.
        hardware: The device it predicts that for, which need not be this machine.
        layers: What became of each layer.
    """

    backend: str
    quality: float
    low: float | None
    high: float | None
    promised: float
    promised_low: float | None
    promised_high: float | None
    higher_is_better: bool
    samples: int
    agreement: float
    largest_difference: float
    bytes_on_disk: int
    planned_bytes: float
    other_bytes: float = 0.0
    header_bytes: int = 0
    latencies: tuple[Latency, ...] = ()
    predicted_s: float | None = None
    hardware: str = ""
    layers: tuple[LayerExport, ...] = ()

    @property
    def shortfalls(self) -> tuple[str, ...]:
        """What the artifact does not deliver, in words; empty where it keeps the plan's promise."""
        found = []
        worst = self.promised_low if self.higher_is_better else self.promised_high
        worst = self.promised if worst is None else worst
        if self.quality < worst if self.higher_is_better else self.quality > worst:
            found.append(f"quality {self.quality:.4f} is worse than the plan's interval allows ({worst:.4f})")
        allowed = 1.02 * (self.planned_bytes + self.other_bytes) + self.header_bytes
        if self.bytes_on_disk > allowed:
            found.append(
                f"{self.bytes_on_disk:,} bytes on disk are more than planned ({allowed:,.0f} with 2% and a header of "
                f"{self.header_bytes:,})"
            )
        others = [
            f"{layer.name} runs as {layer.runs}, not as {layer.precision}" for layer in self.layers if layer.departs
        ]
        if others:
            more = f"; and {len(others) - 3} more layers" if len(others) > 3 else ""
            found.append(f"{'; '.join(others[:3])}{more}")
        return tuple(found)

    @property
    def verdict(self) -> Literal["delivered", "short"]:
        """Whether the artifact keeps what the plan promised."""
        return "short" if self.shortfalls else "delivered"


@dataclass(frozen=True)
class Validation:
    """What the reader of a real package, or its documented schema, said of an artifact that was not run.

    Attributes:
        backend: Name of the backend.
        proof: `validated` by the package, or `emitted`: checked against its documentation only.
        by: The package and version that read it, or the document.
        checks: What was checked, in words.
        layers: What became of each layer.
    """

    backend: str
    proof: Literal["validated", "emitted"]
    by: str
    checks: tuple[str, ...]
    layers: tuple[LayerExport, ...]
