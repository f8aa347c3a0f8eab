"""The contract every backend fulfils, and what it reports."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from torch import Tensor

from hwmodels import Format, Precision
from search.errors import UnsupportedError
from search.plan import Plan
from search.quantize.simulate import QuantizedModel
from search.tasks.task import Task

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
    """

    name: str
    precision: str
    weight: Fidelity
    input: Fidelity
    compute: str = ""
    note: str = ""


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, layer by layer."""

    backend: str
    files: tuple[Path, ...]
    layers: tuple[LayerExport, ...]

    def require_faithful(self) -> None:
        """Raises UnsupportedError, naming the layers, where a tensor the plan quantizes is altered or left in float."""
        faults = []
        for layer in self.layers:
            planned = Precision.parse(layer.precision)
            for side, format, became in (
                ("weight", planned.weight, layer.weight),
                ("input", planned.input, layer.input),
            ):
                if became == "altered" or (became == "float" and not format.is_float):
                    faults.append(f"{side} of {layer.name} ({format}) is {became}")
        if faults:
            raise UnsupportedError(
                f"{self.backend} does not keep the plan: {'; '.join(faults)}. Export without --strict to accept that, "
                "or search again in a space the backend can express"
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
        promised: The metric the plan promises.
        promised_low: Lower end of what the plan's interval allows; None where it has no interval.
        promised_high: Upper end likewise.
        samples: Samples measured.
        agreement: Share of samples whose prediction (the largest output) is the simulation's.
        largest_difference: Largest absolute difference from the simulation's outputs.
        bytes_on_disk: Size of the artifact.
        planned_bytes: Weight bytes the plan predicts.
        latencies: The plan, float and uniform int8 on this machine.
        layers: What became of each layer, with the compute type found in the runtime's optimised graph.
    """

    backend: str
    quality: float
    promised: float
    promised_low: float | None
    promised_high: float | None
    samples: int
    agreement: float
    largest_difference: float
    bytes_on_disk: int
    planned_bytes: float
    latencies: tuple[Latency, ...] = ()
    layers: tuple[LayerExport, ...] = field(default=())


def channel_scale(simulated: QuantizedModel, layer: str, format: Format) -> Tensor:
    """Returns the scale of every output channel of a weight in a static integer format, shape `(channels,)`."""
    return simulated.weight_parameters(layer, format)["scale"].expand(simulated.network[layer].channels)


def refuse_points(backend: str, plan: Plan) -> None:
    """Raises UnsupportedError for a plan that quantizes tensors besides the inputs of layers."""
    if plan.points:
        raise UnsupportedError(
            f"{backend} cannot express this plan: it was searched with quantizer.placement=full, and only inputs of "
            "layers are quantized in the file; search with quantizer.placement=inputs"
        )


class Backend(ABC):
    """Writes plans in the form a runtime executes, and checks what the runtime makes of them.

    Attributes:
        name: What the command line calls it.
    """

    name: str

    @abstractmethod
    def export(self, plan: Plan, task: Task, path: Path) -> ExportReport:
        """Writes the artifact into the folder `path`.

        Raises:
            UnsupportedError: If the backend cannot express the plan or export the model.
        """

    @abstractmethod
    def verify(self, plan: Plan, task: Task, path: Path) -> Verification:
        """Runs the artifact in `path` over the task's report split, in a fresh process."""
