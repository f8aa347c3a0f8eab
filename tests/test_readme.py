# What the README tells a new user to type, typed.
from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

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
TOOLS = [command for commands in OTHERS for command in commands if command[1] not in ("search", "resolve")]
PYTHON = [block for kind, block in BLOCKS if kind == "python"]


def run(arguments: list[str], folder: Path) -> str:
    process = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, timeout=300, check=False
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
    words = [word for word in command[2:] if not word.startswith(("-", "hydra/", "job"))]
    if "-m" in command:
        words = [word.split(",")[0] for word in words]
    values = plain(compose(words))
    settings(SpaceSettings, values["space"], "space")
    settings(SensitivitySettings, values["sensitivity"], "sensitivity")
    settings(QuantizerSettings, values["quantizer"], "quantizer")
    settings(RecoverSettings, values["recover"], "recover")
    settings(Budget, values["budget"], "budget")


@pytest.mark.parametrize("command", TOOLS, ids=" ".join)
def test_every_other_command_of_the_reference_runs(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    fewer = ["--sites", "1", "--samples", "1"] if command[1] == "profile" else []
    assert main([*command[1:], *fewer]) == 0, capsys.readouterr().err
    assert capsys.readouterr().out.strip()


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
