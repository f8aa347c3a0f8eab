"""What Vela said, kept on disk: a file for each compilation, named by all that went into it."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from hwmodels.vela.compiler import NetworkReport, OperatorReport, Target


def default_folder() -> Path:
    """Where reports are kept: `bitplan/vela` in the user's cache folder (`XDG_CACHE_HOME`, by default `~/.cache`)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitplan" / "vela"


def cache_key(version: str, target: Target, data: bytes) -> str:
    """Digest of Vela's version, the target and the TFLite file: the network, its widths and its weights."""
    head = json.dumps([version, *astuple(target)])
    return hashlib.sha256(head.encode() + b"\0" + data).hexdigest()


def load_report(folder: Path, key: str) -> NetworkReport | None:
    """The report kept under a key, None where there is none.

    Raises:
        ValueError: If the file is there and cannot be read.
    """
    file = folder / f"{key}.json"
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    try:
        return from_values(json.loads(text))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is no report of Vela; delete it, and it is compiled again") from error


def save_report(folder: Path, key: str, report: NetworkReport) -> None:
    """Keeps a report; whoever reads meanwhile sees all of it or nothing."""
    folder.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=folder, suffix=".part")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(report), file)
        os.replace(aside, folder / f"{key}.json")
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def from_values(values: Mapping[str, Any]) -> NetworkReport:
    """Reads what `dataclasses.asdict` made of a report, also when it went through JSON."""
    operators = tuple(OperatorReport(**one) if one else None for one in values["operators"])
    return NetworkReport(**{**values, "operators": operators})
