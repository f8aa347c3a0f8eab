"""The contract every backend fulfils.

A backend says beforehand what it makes of a layer's precision (`express`), which layers must share one (`ties`), writes
a plan as its own files (`write`), and runs them (`run`). `export` and `verify` put the same frame around all of them:
a folder that appears whole or not at all, with a manifest; and a check that the folder is the plan's, undamaged.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar, Literal

from torch import nn

from hwmodels import Layer, Network, Precision
from hwmodels.precision import FLOAT_PRECISION, Side
from search.backends.artifact import check_folder, new_folder, write_manifest
from search.backends.outcome import ExportReport, LayerExport, Validation, Verification
from search.errors import DataError, UnsupportedError
from search.legal import Refusal
from search.plan import Plan
from search.tasks.task import Task

Proof = Literal["executed", "validated", "emitted"]
"""How this project proves a backend: by running it, by the real package's own reader, by its documentation."""

Keep = Literal["exact", "contained", "any"]
"""Which candidates a search for a backend keeps: what it stores as planned, also in wider storage, everything."""

KEEPS: dict[Keep, frozenset[str]] = {
    "exact": frozenset({"contained", "altered", "float"}),
    "contained": frozenset({"altered", "float"}),
    "any": frozenset(),
}
"""What each way refuses of a tensor that is to be quantized."""


HEADER_BYTES = 16384
"""What files may hold whatever the network, beside what they hold per layer."""


class Backend(ABC):
    """Writes plans in the form that a runtime or a quantizer executes, and checks what becomes of them.

    Attributes:
        name: What the command line calls it; the extra that installs its packages has the same name.
        proof: How this project proves it.
        reason: Why it is not executed here; empty where it is.
        packages: Distributions that it reads or writes with, whose versions the manifest holds.
        ranges: `plan` where the artifact carries the plan's ranges; `own` where the backend finds its own from a
            configuration: all that it quantizes is altered then, and no candidate is left out for that alone.
        recalibrates: Whether it can find ranges of its own in place of the plan's.
        places: Whether it quantizes the tensors between layers too, as `quantizer.placement=full` does.
        header_bytes: What its files may hold per layer beside tensors, such as names and a graph.
        usage: How to load the artifact: at most four lines for the README beside it.
    """

    name: ClassVar[str]
    proof: ClassVar[Proof]
    reason: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ()
    ranges: ClassVar[Literal["plan", "own"]] = "plan"
    recalibrates: ClassVar[bool] = False
    places: ClassVar[bool] = False
    header_bytes: ClassVar[int] = 2048
    usage: ClassVar[str] = ""

    @abstractmethod
    def express(self, layer: Layer, precision: Precision) -> LayerExport:
        """Says what becomes of a layer in a precision, by its kind and shape alone: before a search, and in reports."""

    @abstractmethod
    def write(self, plan: Plan, task: Task, folder: Path, recalibrate: bool) -> Sequence[LayerExport]:
        """Writes the artifact into an empty folder, the same bytes every time; returns what became of each layer.

        Raises:
            UnsupportedError: If the backend cannot export the model.
        """

    @abstractmethod
    def check(self, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...]) -> Verification | Validation:
        """Runs the artifact over the task's report split in a fresh process, or has the real package read it."""

    def takes(self, model: nn.Module) -> None:
        """Raises UnsupportedError where a model is of no kind that the backend takes: asked before a search."""
        return None

    def ties(self, network: Network) -> list[list[str]]:
        """Lists the layers that the backend runs as one, which must share a precision; none by default."""
        return []

    def refuses(self, layer: Layer, precision: Precision, keep: Keep = "exact") -> Refusal | None:
        """Why a candidate is left out of a search for this backend; None if it stays."""
        found, refused = self.express(layer, precision), KEEPS[keep]
        runs = Precision.parse(found.runs or found.precision)
        for (side, format, became), running in zip(found.sides, (runs.weight, runs.input), strict=True):
            is_own_range = self.ranges == "own" and became == "altered" and running == format
            if became in refused and not format.is_float and not is_own_range:
                why = self._note(layer, precision, side) or found.note
                return Refusal(f"{self.name} would leave the {side} {became}{': ' if why else ''}{why}", (side,))
        return None

    def _note(self, layer: Layer, precision: Precision, side: Side) -> str:
        """What is said of one side alone, the other in float."""
        alone = Precision(precision.weight) if side == "weight" else Precision(input=precision.input)
        return self.express(layer, alone).note

    def export(
        self, plan: Plan, task: Task, path: Path, recalibrate: bool = False, strict: bool = False
    ) -> ExportReport:
        """Writes the artifact, a README and a manifest into the folder `path`, which appears whole or not at all.

        Args:
            plan: What to export.
            task: The plan's.
            path: A new folder, an empty one, or one that an export wrote, which is replaced.
            recalibrate: Whether the backend finds ranges of its own in place of the plan's.
            strict: Whether to refuse what the backend alters or leaves in float.

        Raises:
            UnsupportedError: If the backend cannot express the plan, find ranges, or export the model.
            DataError: If `path` holds something else.
        """
        if plan.points and not self.places:
            raise UnsupportedError(
                f"{self.name} cannot express this plan: it was searched with quantizer.placement=full, and only inputs "
                "of layers are quantized there; search with quantizer.placement=inputs"
            )
        if recalibrate and not self.recalibrates:
            why = "always finds its own ranges" if self.ranges == "own" else "finds no ranges of its own"
            raise UnsupportedError(f"{self.name} {why}; export without --recalibrate")
        with new_folder(path) as folder:
            layers = tuple(self.write(plan, task, folder, recalibrate))
            files = tuple(sorted(path / file.relative_to(folder) for file in folder.rglob("*") if file.is_file()))
            report = ExportReport(self.name, files, layers, recalibrate)
            if strict:
                report.require_faithful()
            write_manifest(folder, plan, report, self.usage, self.versions())
        return report

    def verify(self, plan: Plan, task: Task, path: Path) -> Verification | Validation:
        """Checks what `export` wrote to `path`: by running it, or with the real package's own reader.

        Raises:
            DataError: If the folder is missing, damaged, or not this plan's.
            UnsupportedError: If the runtime refuses it.
        """
        found = self.check(plan, task, path, check_folder(path, plan, self.name))
        if isinstance(found, Validation):
            return found
        return replace(found, header_bytes=HEADER_BYTES + len(found.layers) * self.header_bytes)

    def versions(self) -> dict[str, str]:
        """The installed versions of its packages."""
        found = {}
        for package in self.packages:
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                continue
        return found


class Emitter(Backend):
    """A backend whose files are not run here: they are read back, and given to the real package's own reader."""

    @abstractmethod
    def read(self, folder: Path) -> Mapping[str, Precision]:
        """Reads the precisions that the files give to layers, without the real package.

        Raises:
            DataError: If a file does not keep to its documented schema.
        """

    @abstractmethod
    def validate(self, plan: Plan, task: Task, folder: Path) -> tuple[str, tuple[str, ...]]:
        """Has the real package read the files.

        Returns:
            The package and its version, or the document where no package can be had; and what was checked, in words.

        Raises:
            UnsupportedError: If it refuses them.
        """

    def check(self, plan: Plan, task: Task, folder: Path, layers: tuple[LayerExport, ...]) -> Validation:
        """Reads the files back, compares them with what runs, and has the real package read them."""
        said, runs = self.read(folder), ExportReport(self.name, (), layers).policy
        for name, precision in runs.items():
            if said.get(name, FLOAT_PRECISION) != precision:
                found = said.get(name, FLOAT_PRECISION)
                raise DataError(f"the files in {folder} say {found} of layer {name}, the manifest {precision}")
        unknown = next((name for name in said if name not in runs), None)
        if unknown:
            raise DataError(f"the files in {folder} name {unknown}, which is no layer of the plan")
        by, checks = self.validate(plan, task, folder)
        back = f"all {len(runs)} layers read back as exported"
        return Validation(
            self.name, "validated" if self.proof == "validated" else "emitted", by, (back, *checks), layers
        )
