"""The folder an export writes: the artifact, five lines on how to load it, and a manifest with digests.

A folder appears whole or not at all, and exporting twice gives the same bytes. `manifest.json` names the plan and the
backend, what became of every layer, and the SHA-256 of every file.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from textwrap import dedent
from typing import Literal
from uuid import uuid4

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hwmodels import Precision
from search.backends.outcome import ExportReport, LayerExport
from search.errors import DataError, one_line
from search.files import write_json
from search.plan import Plan

MANIFEST, README = "manifest.json", "README.md"
SCHEMA = "bitplan-export/1"


class Manifest(BaseModel):
    """What `manifest.json` says of a folder; `files` maps paths in it to their SHA-256."""

    model_config = ConfigDict(extra="forbid", strict=True)

    schema_: Literal["bitplan-export/1"] = Field(alias="schema")
    backend: str
    plan: str
    plan_tensors: str
    task: str
    model: str
    recalibrated: bool
    versions: dict[str, str]
    files: dict[str, str]
    layers: tuple[LayerExport, ...]


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`, and puts it in the place of `path` when the block ends without an error.

    Raises:
        DataError: If `path` holds something that no export wrote, or cannot be written.
    """
    path = Path(os.path.realpath(path))  # a link stays, and what it points to is replaced
    aside = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        if path.exists() and not _is_replaceable(path):
            raise DataError(f"{path} holds something that no export wrote; name a new folder with --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        aside.mkdir()
    except OSError as error:
        raise DataError(f"no folder can be written at {path}: {one_line(error)}; name another with --out") from error
    try:
        yield aside
        if path.exists():
            old = path.with_name(f".{path.name}.{uuid4().hex}.old")
            os.replace(path, old)
            os.replace(aside, path)
            shutil.rmtree(old)
        else:
            os.replace(aside, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _is_replaceable(path: Path) -> bool:
    """Whether a folder is empty or an export's, damaged or not: other programs have manifests of that name, too."""
    if not path.is_dir():
        return False
    file = path / MANIFEST
    if file.is_file():
        return SCHEMA.encode() in file.read_bytes()
    return not any(path.iterdir())


def write_manifest(folder: Path, plan: Plan, report: ExportReport, usage: str, versions: Mapping[str, str]) -> None:
    """Writes README and manifest beside an artifact.

    Args:
        folder: Holds the artifact and nothing else.
        plan: What was exported.
        report: What became of it.
        usage: How to load the artifact, at most four lines.
        versions: Of the packages it was written with.
    """
    title = f"# {plan.task}, plan {plan.digest}, for {report.backend}"
    (folder / README).write_text(f"{title}\n{dedent(usage).strip()}\n", encoding="utf-8")
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    write_json(
        folder / MANIFEST,
        {
            "schema": SCHEMA,
            "backend": report.backend,
            "plan": plan.digest,
            "plan_tensors": plan.tensors.sha256,
            "task": plan.task,
            "model": plan.model.fingerprint,
            "recalibrated": report.recalibrated,
            "versions": dict(versions),
            "files": {str(file.relative_to(folder)): _digest(file) for file in files},
            "layers": [asdict(layer) for layer in report.layers],
        },
    )


def check_folder(path: Path, plan: Plan, backend: str) -> tuple[LayerExport, ...]:
    """Checks that a folder is an undamaged export of a plan for a backend; returns what became of each layer.

    Raises:
        DataError: If it is not.
    """
    manifest = read_manifest(path)
    again = f"export it again with `bitplan export PLAN --to {backend} --out {path}`"
    if manifest.backend != backend:
        raise DataError(f"{path} was exported for {manifest.backend}, not for {backend}; {again}")
    if (manifest.plan, manifest.plan_tensors) != (plan.digest, plan.tensors.sha256):
        raise DataError(f"{path} was exported from plan {manifest.plan}, not from {plan.digest}; {again}")
    for name, digest in manifest.files.items():
        if not (path / name).is_file():
            raise DataError(f"{path} lacks {name}; {again}")
        if _digest(path / name) != digest:
            raise DataError(f"{path / name} is damaged: its sha256 is not the manifest's; {again}")
    said = {layer.name: layer.precision for layer in manifest.layers}
    if said != {name: str(precision) for name, precision in plan.policy.items()}:
        raise DataError(f"{path / MANIFEST} is damaged: its layers are not those of plan {plan.digest}; {again}")
    return manifest.layers


def read_manifest(path: Path) -> Manifest:
    """Reads the manifest of an export.

    Raises:
        DataError: If there is none, or it is damaged.
    """
    file = path / MANIFEST
    again = f"`bitplan export PLAN --to BACKEND --out {path}`"
    if not file.is_file():
        raise DataError(f"no {file}; write it first with {again}")
    try:
        content = file.read_text(encoding="utf-8")
        json.loads(content)
        manifest = Manifest.model_validate_json(content)
        for layer in manifest.layers:
            Precision.parse(layer.runs or layer.precision)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(
            f"{file} is no manifest of schema {SCHEMA!r}: {where}: {first['msg']}; export again with {again}"
        ) from error
    except ValueError as error:  # of JSON, UTF-8 and precisions
        raise DataError(f"{file} is damaged: {one_line(error)}; export again with {again}") from error
    outside = next((name for name in manifest.files if Path(name).is_absolute() or ".." in Path(name).parts), None)
    if outside or not set(manifest.files) - {README}:
        what = f"names {outside}, which is not in the folder" if outside else "names no file of an artifact"
        raise DataError(f"{file} is damaged: it {what}; export again with {again}")
    return manifest


def artifact_files(path: Path) -> list[Path]:
    """The files of the artifact proper, as the manifest lists them: without README, and what was put there since."""
    return sorted(path / name for name in read_manifest(path).files if name != README)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
