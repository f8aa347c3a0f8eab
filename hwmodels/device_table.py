"""What the device files that come with the package rest on, as a Markdown table.

`python -m hwmodels.device_table` writes it into the README of the device files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import get_args

from hwmodels.device import FOLDER, Device, DeviceClass, list_devices, load_device

README = FOLDER / "README.md"
BEGIN, END = "<!-- python -m hwmodels.device_table -->", "<!-- end of the table -->"
DEVICE_KINDS = get_args(DeviceClass)
SHARED = ("energy", "calibration", "launch")  # what these rest on is said once, above the table


def device_table() -> str:
    """One row per shipped device: its tier, whether it knows latencies, and the numbers not to lean on."""
    rows = ["| file | device | tier | latencies | rests on secondary sources, memory or assumption | unknown |"]
    rows += ["|---|---|---|---|---|---|"]
    devices = map(load_device, list_devices())
    for device in sorted(devices, key=lambda one: (DEVICE_KINDS.index(one.kind), one.id)):
        unknown = (place for place, quantity in device.leaves() if not quantity.is_known)
        cells = (
            f"`{device.id}`",
            device.name,
            device.standing,
            _latencies(device),
            _places(device.shaky),
            _places(unknown),
        )
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def refresh(path: Path = README) -> None:
    """Replaces the table between the two marks of a Markdown file.

    Raises:
        ValueError: If the file has no marks.
    """
    before, begin, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no lines {BEGIN} and {END}")
    aside = path.with_suffix(".new")
    aside.write_text(f"{before}{BEGIN}\n{device_table()}\n{END}{after}", encoding="utf-8")
    os.replace(aside, path)


def _latencies(device: Device) -> str:
    """How latencies are known: priced, or published for whole networks only."""
    if device.knows_time:
        return "priced"
    return f"{len(device.anchors)} published" if device.anchors else "none"


def _places(places: Iterable[str]) -> str:
    """The keys of `places`, each once, without what all devices share."""
    found = dict.fromkeys(_shortened(place) for place in places if not place.startswith(SHARED))
    return ", ".join(key for key in found if not key.endswith(".energy")) or "-"


def _shortened(place: str) -> str:
    """`compute.int8` for `compute.int8.peak.2`: numbers of threads and what goes without saying are left out."""
    return ".".join(part for part in place.split(".") if part != "peak" and not part.isdigit())


if __name__ == "__main__":
    refresh()
