"""Fits written into device files: the calibration's blocks are replaced, everything else stays as it was."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hwmodels.calibrate import NO_TILE, VECTOR_ROWS, Fit
from hwmodels.device import Calibration
from hwmodels.quantity import Quantity


def calibration_of(fit: Fit, data: str, source: str) -> Calibration:
    """The fit as a device's calibration; `data` is the digest `sha256:...` of the table, `source` names it.

    Raises:
        ValueError: If `data` is no digest.
    """

    def fitted(value: float, unit: Any) -> Quantity:
        return Quantity(_rounded(value), unit, source, "fitted")

    return Calibration(
        overhead=fitted(fit.overhead, "s"),
        compute=fitted(fit.compute, "1"),
        memory=fitted(fit.memory, "1"),
        sharpness=fitted(fit.sharpness, "1"),
        tier="calibrated",
        sigma=fitted(fit.sigma, "1"),
        tile=fit.tile,
        data=data,
        samples=fit.samples,
        holdout_error=fitted(fit.median_error, "1") if fit.held_out else None,
        step=fitted(fit.step, "s"),
        splits_sums=fit.splits_sums,
        vector_rows=0 if fit.vector_overhead is None else VECTOR_ROWS,
        vector_overhead=None if fit.vector_overhead is None else fitted(fit.vector_overhead, "s"),
    )


def _rounded(value: float) -> float:
    """Four significant digits: more than any fit is good for."""
    return float(f"{value:.4g}")


def calibrate_device(device: str | Path, fits: Mapping[str, Fit], data: str, source: str) -> str:
    """Returns the text of a device file with calibrations of `fits` in it; all else is as it was, comments included.

    Args:
        device: Path of the file, or its text.
        fits: Path to its fit; paths that the file has are replaced where they stand, others are added.
        data: Digest of the table, `sha256:...`.
        source: What was fitted, in words.

    Raises:
        ValueError: If the text has no block `calibration:`, or `data` is no digest.
    """
    text = device.read_text(encoding="utf-8") if isinstance(device, Path) else device
    lines = text.splitlines()
    starts = [number for number, line in enumerate(lines) if re.match(r"calibration:\s*(#.*)?$", line)]
    if len(starts) != 1:
        raise ValueError(f"the device file must have one block calibration: of its own, found {len(starts)}")
    begin = starts[0] + 1
    end = next((row for row in range(begin, len(lines)) if re.match(r"[^\s#]", lines[row])), len(lines))
    while end > begin and (not lines[end - 1].strip() or lines[end - 1].startswith("#")):
        end -= 1  # what stands before the next block belongs to it
    blocks = _blocks(lines[begin:end])
    replaced = {name: _block(name, calibration_of(fit, data, source)) for name, fit in fits.items()}
    _keep_anchors(blocks, replaced)
    body = [line for block in (blocks | replaced).values() for line in block]
    return "\n".join([*lines[:begin], *body, *lines[end:]]) + "\n"


def calibrate_file(path: Path, fits: Mapping[str, Fit], data: str, source: str) -> None:
    """Writes calibrations of `fits` into a device file, in one step."""
    text = calibrate_device(path, fits, data, source)
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _blocks(lines: list[str]) -> dict[str, list[str]]:
    """The lines of each path of a calibration block, comments with the path they precede."""
    blocks: dict[str, list[str]] = {}
    waiting: list[str] = []
    current = waiting
    for line in lines:
        if re.match(r"  \S", line) and not line.lstrip().startswith("#"):
            current = blocks.setdefault(line.strip().split(":")[0].strip("\"'"), waiting)
            waiting = []
        elif re.match(r"  #", line):
            current = waiting
        current.append(line)
    return blocks | ({"": waiting} if waiting else {})


def _keep_anchors(blocks: Mapping[str, list[str]], replaced: Mapping[str, list[str]]) -> None:
    """Raises ValueError if a block that goes is one that a block which stays refers to."""
    anchors = {
        name: found.group(1)
        for name in replaced
        for line in blocks.get(name, [])
        if (found := re.search(r"&(\w+)", line))
    }
    for name, block in blocks.items():
        for gone, anchor in anchors.items():
            if name not in replaced and any(re.search(rf"\*{anchor}\b", line) for line in block):
                raise ValueError(f"calibration.{name} refers to that of {gone} (*{anchor}): fit both, or write it out")


def _block(name: str, calibration: Calibration) -> list[str]:
    """The YAML lines of one calibration."""
    lines = [f"  {name}:", f"    tier: {calibration.tier}"]
    for key in ("overhead", "compute", "memory", "sharpness", "step", "vector_overhead", "sigma", "holdout_error"):
        quantity = getattr(calibration, key)
        if quantity is not None:
            lines.append(f"    {key}: {_inline(quantity)}")
    if calibration.splits_sums:
        lines.append("    splits_sums: true")
    if calibration.vector_rows:
        lines.append(f"    vector_rows: {calibration.vector_rows}")
    tile = calibration.tile
    if tile != NO_TILE:
        lines.append(f"    tile: {{m: {tile.m}, n: {tile.n}, k: {tile.k}, source: {_quoted(tile.source)}}}")
    return [*lines, f"    data: {_quoted(calibration.data)}", f"    samples: {calibration.samples}"]


def _inline(quantity: Quantity) -> str:
    unit = _quoted(quantity.unit) if quantity.unit == "1" else quantity.unit
    return (
        f"{{value: {_number(quantity.number)}, unit: {unit}, source: {_quoted(quantity.source)}, "
        f"confidence: {quantity.confidence}}}"
    )


def _number(value: float) -> str:
    """A float that YAML 1.1 reads as one: with a point, and a sign in the exponent."""
    text = f"{value:.4g}"
    mantissa, e, exponent = text.partition("e")
    return f"{mantissa}{'' if '.' in mantissa else '.0'}{e}{exponent}"


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
