"""Runs Vela, the Arm compiler for Ethos-U, on a TFLite file, and reads its report.

Vela runs as a command in a process of its own, since it can crash: 4-bit tensors end it with SIGFPE in release 5.2.0.
What it says is read from the files it writes, the summary (CSV) and the table of operators (its debug database).
"""

from __future__ import annotations

import csv
import io
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata, util
from pathlib import Path
from xml.etree import ElementTree

MEMORIES = ("sram", "dram", "on_chip_flash", "off_chip_flash")


@dataclass(frozen=True)
class Target:
    """What Vela compiles for.

    Attributes:
        accelerator: Such as `ethos-u55-128`.
        system_config: Section `System_Config.*` of Vela's configuration: clock and memories.
        memory_mode: Section `Memory_Mode.*`: what is kept in which memory.
        config: Text of a configuration of one's own, empty for the one that Vela brings along.
    """

    accelerator: str
    system_config: str
    memory_mode: str
    config: str = ""


@dataclass(frozen=True)
class OperatorReport:
    """What Vela says of one operator of the file, with all that it made of it.

    Attributes:
        cycles: Cycles until it is done; those of the operators add up to the network's.
        npu_cycles: Cycles of computing alone.
        weight_bytes: Encoded weights.
        runs_on_npu: False for what is left to the CPU, whose time Vela does not know.
    """

    cycles: int
    npu_cycles: int
    weight_bytes: int
    runs_on_npu: bool = True


@dataclass(frozen=True)
class NetworkReport:
    """What Vela says of a network.

    Attributes:
        cycles: Cycles of one inference.
        clock_hz: Cycles per second.
        macs: Multiply-accumulates.
        original_weight_bytes: Weights as 8-bit integers.
        encoded_weight_bytes: Weights as they lie in memory.
        memory_bytes: Peak use of each memory that is used.
        operators: For each operator of the file what Vela says of it; None where nothing is left of it.
    """

    cycles: int
    clock_hz: float
    macs: int
    original_weight_bytes: int
    encoded_weight_bytes: int
    memory_bytes: Mapping[str, int]
    operators: tuple[OperatorReport | None, ...]

    @property
    def latency_s(self) -> float:
        """Seconds of one inference."""
        return self.cycles / self.clock_hz


def require_vela() -> str:
    """The version of Vela that is installed.

    Raises:
        ValueError: If none is.
    """
    if util.find_spec("ethosu") is None:
        raise ValueError("Vela is not installed; pip install 'bitplan[vela]'")
    return _version()


@lru_cache(maxsize=1)
def _version() -> str:
    return metadata.version("ethos-u-vela")


def compile_tflite(data: bytes, operators: int, target: Target, timeout_s: float) -> NetworkReport:
    """Compiles a TFLite file of so many operators and returns what Vela says of it.

    Raises:
        ValueError: If Vela is not installed, crashes, refuses the file or the target, or takes longer than `timeout_s`.
    """
    require_vela()
    with tempfile.TemporaryDirectory(prefix="bitplan-vela-") as name:
        folder = Path(name)
        file = folder / "network.tflite"
        file.write_bytes(data)
        options = ["--accelerator-config", target.accelerator, "--system-config", target.system_config]
        options += ["--memory-mode", target.memory_mode, "--output-dir", name]
        options += ["--verbose-performance", "--enable-debug-db"]
        if target.config:
            (folder / "vela.ini").write_text(target.config, encoding="utf-8")
            options += ["--config", str(folder / "vela.ini")]
        _run([sys.executable, "-m", "ethosu.vela", str(file), *options], target, timeout_s)
        summary = folder / f"network_summary_{target.system_config}.csv"
        tables = (folder / "network_debug.xml").read_bytes()
        return _read_report(summary.read_text(encoding="utf-8"), read_tables(tables), operators)


def _run(command: list[str], target: Target, timeout_s: float) -> None:
    where = f"for {target.accelerator}, {target.system_config}, {target.memory_mode}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"Vela did not end within {timeout_s:g} s {where}; allow more with timeout_s") from error
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise ValueError(f"Vela {_version()} crashed with {name} {where}")
    if done.returncode:
        raise ValueError(f"Vela {_version()} ended with status {done.returncode} {where}: {_last_line(done)}")


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    """What Vela ended with: of a traceback, the error."""
    lines = (done.stderr.strip() or done.stdout.strip()).splitlines()
    return lines[-1] if lines else "it printed nothing"


def read_tables(debug: bytes) -> dict[str, list[dict[str, str]]]:
    """The tables of Vela's debug database, rows as column to text."""
    root = ElementTree.fromstring(debug)
    found = {}
    for table in root.iter("table"):
        found[table.attrib["name"]] = list(csv.DictReader(io.StringIO((table.text or "").strip())))
    return found


def _read_report(summary: str, tables: Mapping[str, list[dict[str, str]]], operators: int) -> NetworkReport:
    row = next(csv.DictReader(io.StringIO(summary)))
    used = {memory: round(float(row[f"{memory}_memory_used"]) * 1024) for memory in MEMORIES}
    return NetworkReport(
        cycles=int(row["cycles_total"]),
        clock_hz=float(row["core_clock"]),
        macs=int(row["nn_macs"]),
        original_weight_bytes=int(row["total_original_weights"]),
        encoded_weight_bytes=int(row["total_npu_encoded_weights"]),
        memory_bytes={memory: size for memory, size in used.items() if size},
        operators=_read_operators(tables, operators),
    )


def _read_operators(tables: Mapping[str, list[dict[str, str]]], operators: int) -> tuple[OperatorReport | None, ...]:
    """Adds up what became of each operator; Vela knows them by their position in the file."""
    positions = {row["id"]: int(row["ext_key"]) for row in tables["source"]}
    weights = {row["id"]: int(row["weight_total_bytes"] or 0) for row in tables["perf_debug"]}
    found: list[OperatorReport | None] = [None] * operators
    for row in tables["perf"]:
        position = positions[row["source_id"]]
        before = found[position] or OperatorReport(0, 0, 0)
        found[position] = OperatorReport(
            before.cycles + int(row["op_cycles"]),
            before.npu_cycles + int(row["npu_cycles"]),
            before.weight_bytes + weights.get(row["id"], 0),
            before.runs_on_npu and row["operator"] != "Passthrough",
        )
    return tuple(found)
