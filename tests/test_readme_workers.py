# The README's commands about workers and review, typed one after the other.
from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from readme import ON_RUNS, README, run

pytestmark = pytest.mark.system


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
