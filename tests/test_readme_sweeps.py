# The README's sweeps, each cut down to two jobs.
from __future__ import annotations

import csv
import shlex
import tempfile
from pathlib import Path

import pytest
import slurm
from readme import README, run

pytestmark = pytest.mark.system

SWEEPS = [
    shlex.split(line, comments=True)
    for line in README.partition("## From laptop to cluster")[2].partition("\n## ")[0].splitlines()
    if line.startswith("bitplan search -m ")
]


def two_jobs(command: list[str]) -> list[str]:
    """A sweep cut down to two jobs of two evaluations each: of all lists but the last, the first value is left."""
    lists = [word for word in command if "," in word]
    words = [word if word in lists[-1:] else word.split(",")[0] for word in command[1:]]
    words = [",".join(word.split(",")[:2]) for word in words]
    return [*words, "strategy.evaluations=2", "quantizer.repair=none", "tracking=none"]


def check_sweep(folder: Path, output: str) -> None:
    (table,) = folder.glob("runs/**/sweep.csv")
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["job"], row["status"], row["verdict"]) for row in rows] == [(n, "finished", "met") for n in "01"]
    assert all((table.parent / row["directory"] / "plan.json").is_file() for row in rows)
    assert "sweep.csv" in output


ON_SLURM = ["hydra/launcher=slurm" in command for command in SWEEPS]


@pytest.mark.parametrize("command", [c for c, slurm in zip(SWEEPS, ON_SLURM, strict=True) if not slurm], ids=" ".join)
def test_sweeps_run_on_a_laptop(command: list[str], tmp_path: Path) -> None:
    if "hydra/launcher=local" in command:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra `joblib`")
    check_sweep(tmp_path, run(["-m", "search", *two_jobs(command)], tmp_path))


@pytest.mark.skipif(not slurm.is_installed(), reason="needs Slurm and Munge: apt-get install slurm-wlm munge")
def test_the_same_sweeps_run_on_slurm(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra `slurm`")
    commands = [command for command, is_slurm in zip(SWEEPS, ON_SLURM, strict=True) if is_slurm]
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, slurm.single_node(Path(folder)) as node:
        for number, command in enumerate(commands):
            there = tmp_path / str(number)
            there.mkdir()
            output = run(["-m", "search", *two_jobs(command)], there, {**node.environment, "OMP_NUM_THREADS": "1"})
            check_sweep(there, output)
        done = ["COMPLETED"] * 2 * len(commands)  # Slurm says so a moment after the results are there
        slurm.wait_for(lambda: [job["JobState"] for job in node.jobs()] == done, "all jobs to be completed")
