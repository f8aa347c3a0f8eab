# The README's quickstart and its examples, typed.
from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from readme import PYTHON, QUICKSTART, run

pytestmark = pytest.mark.system


def bitplan(command: list[str], folder: Path) -> str:
    return run(["-m", "search", *(command[1:] if command[1:] != ["search"] else [])], folder)


def test_the_quickstart_runs_from_top_to_bottom(tmp_path: Path) -> None:
    output = [bitplan(command, tmp_path) for command in QUICKSTART]
    assert "met by plan" in output[0]
    assert (tmp_path / "runs" / "mlflow.db").is_file()
    assert (tmp_path / "runs" / "three" / "report.html").stat().st_size > 100_000


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
