# What the README tells a new user to type, typed.
from __future__ import annotations

import csv
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
import slurm

from search.backends.matrix import table
from search.budget import Budget
from search.cli import main, parser
from search.config import compose, plain
from search.job import RecoverSettings, SpaceSettings, settings
from search.quantize.settings import QuantizerSettings
from search.sensitivity.settings import SensitivitySettings

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
COMMANDS = [
    [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("bitplan ")]
    for kind, block in BLOCKS
    if kind == "sh"
]
QUICKSTART, *OTHERS = (commands for commands in COMMANDS if commands)
REFERENCE = [command for commands in OTHERS for command in commands if command[1] in ("search", "resolve")]
ON_RUNS = ("worker", "status", "merge", "sync", "best", "compare")
"""Commands that need runs to be about; see `test_workers_and_review`."""
TOOLS = [command for commands in OTHERS for command in commands if command[1] not in ("search", "resolve", *ON_RUNS)]
SWEEPS = [
    shlex.split(line, comments=True)
    for line in README.partition("## From laptop to cluster")[2].partition("\n## ")[0].splitlines()
    if line.startswith("bitplan search -m ")
]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]


def run(arguments: list[str], folder: Path, environment: Mapping[str, str] | None = None) -> str:
    process = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def bitplan(command: list[str], folder: Path) -> str:
    return run(["-m", "search", *(command[1:] if command[1:] != ["search"] else [])], folder)


def test_the_quickstart_runs_from_top_to_bottom(tmp_path: Path) -> None:
    output = [bitplan(command, tmp_path) for command in QUICKSTART]
    assert "met by plan" in output[0]
    assert (tmp_path / "runs" / "mlflow.db").is_file()
    assert (tmp_path / "runs" / "three" / "report.html").stat().st_size > 100_000


@pytest.mark.parametrize("command", REFERENCE, ids=" ".join)
def test_every_search_of_the_reference_composes(command: list[str]) -> None:
    assert command[0] == "bitplan"
    if command[1] == "resolve":
        command = [*command[:2], *parser().parse_args(command[1:]).overrides]
    else:
        assert command[1] == "search"
    words = [word for word in command[2:] if not word.startswith(("-", "hydra/", "hydra.", "job"))]
    if "-m" in command:
        words = [word.split(",")[0] for word in words]
    values = plain(compose(words))
    settings(SpaceSettings, values["space"], "space")
    settings(SensitivitySettings, values["sensitivity"], "sensitivity")
    settings(QuantizerSettings, values["quantizer"], "quantizer")
    settings(RecoverSettings, values["recover"], "recover")
    settings(Budget, values["budget"], "budget")


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


@pytest.mark.cluster
@pytest.mark.parametrize("command", [c for c, slurm in zip(SWEEPS, ON_SLURM, strict=True) if not slurm], ids=" ".join)
def test_sweeps_run_on_a_laptop(command: list[str], tmp_path: Path) -> None:
    if "hydra/launcher=local" in command:
        pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra `joblib`")
    check_sweep(tmp_path, run(["-m", "search", *two_jobs(command)], tmp_path))


@pytest.mark.cluster
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


@pytest.mark.parametrize("command", TOOLS, ids=" ".join)
def test_every_other_command_of_the_reference_runs(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fewer = ["--sites", "1", "--samples", "1"] if command[1] == "profile" else []
    assert main([*command[1:], *fewer]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip()


@pytest.mark.cluster
def test_workers_and_review(tmp_path: Path) -> None:
    def commands(heading: str) -> list[list[str]]:
        block = README.partition(f"{heading}\n")[2].partition("\n## ")[0]
        return [shlex.split(line, comments=True) for line in block.splitlines() if line.startswith("bitplan ")]

    many, review = commands("### Many workers on one search"), commands("## Review")
    assert {command[1] for command in [*many, *review]} == {"search", *ON_RUNS}

    def fewer(command: list[str]) -> list[str]:
        cut = {"workers=4": "workers=2", "strategy.evaluations=200": "strategy.evaluations=150"}
        words = [cut.get(word, word) for word in command[1:]]
        words = [word.replace("postgresql://me@db/bitplan", "far.journal") for word in words]
        return [word.replace("http://tracking:5000", f"sqlite:///{tmp_path}/other.db") for word in words]

    searches = [fewer(command) for command in many if command[1] == "search"]
    workers = [fewer(command) for command in many if command[1] == "worker"]
    for search, worker in zip(searches, workers, strict=True):
        words = [*search, "space.weight=[int2,int4,int8]", "space.input=[uint8]", "strategy.evaluations=150"]
        process = subprocess.Popen(
            [sys.executable, "-m", "search", *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 120
        sign = tmp_path / (worker[1] if len(worker) == 2 else worker[2]) / ("run.json" if len(worker) == 2 else "")
        while not sign.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        said = run(["-m", "search", *worker], tmp_path)
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output
        assert "met by plan" in output
        assert "measured" in said, said
    assert "finished" in run(["-m", "search", *fewer(next(c for c in many if c[1] == "status"))], tmp_path)
    for machine in ("a", "b"):
        shutil.copytree(
            tmp_path / "runs" / ("shared" if machine == "a" else "far"), tmp_path / f"from_{machine}" / "runs" / machine
        )
    for command in [*many, *review]:
        if command[1] in ("merge", "sync", "best", "compare"):
            assert run(["-m", "search", *fewer(command)], tmp_path).strip()
    assert (tmp_path / "compare.html").stat().st_size > 1_000_000
    assert (tmp_path / "other.db").is_file()


def test_the_table_of_backends_is_what_they_say() -> None:
    assert table() in README


def test_the_python_example_runs(tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(PYTHON[0])
    run(["example.py"], tmp_path)
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize("block", PYTHON[1:], ids=lambda block: block.splitlines()[0].split(":")[0].removeprefix("# "))
def test_every_extension_runs_by_the_command_it_names(block: str, tmp_path: Path) -> None:
    name, command = re.match(r"# (\S+): bitplan (.*)", block).groups()  # type: ignore[union-attr]
    assert len([line for line in block.splitlines() if line.strip()]) <= 21  # under 20 lines, and the one naming it
    (tmp_path / name).write_text(block)
    output = run(["-m", "search", *shlex.split(command), "tracking=none", "strategy.evaluations=8"], tmp_path)
    assert "budget" in output.lower()
