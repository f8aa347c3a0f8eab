# Killing a search at any moment and repeating the command: the same plan, and no completed evaluation done again.
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SETTINGS = ["tracking=none", "strategy.evaluations=12", "space.weight=[int2,int4,int8]", "space.input=[uint4,uint8]"]
SCORING = "scoring"  # a folder with one file for every choice scored
LOGS = ("trials.jsonl", "report.jsonl")


def start(run_dir: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "search", *SETTINGS, *more, f"run_dir={run_dir}", f"run_root={run_dir.parent}"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(run_dir: Path, *more: str) -> str:
    process = start(run_dir, *more)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return output


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def scored(run_dir: Path) -> list[Path]:
    """What has been scored."""
    return list((run_dir / SCORING).glob("[!.]*.npz"))


def kill_when(run_dir: Path, log: str, count: int, *more: str) -> None:
    """Sends SIGKILL as soon as `log` has `count` lines, or the folder of scores as many files."""
    process = start(run_dir, *more)
    while len(scored(run_dir) if log == SCORING else lines(run_dir / log)) < count:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(run_dir)
    return run_dir


@pytest.mark.system
def test_killed_again_and_again_it_ends_with_the_same_plan(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    done: dict[str, list[str]] = {log: [] for log in LOGS}
    kill_when(run_dir, SCORING, 4)
    for log, count in (("trials.jsonl", 1), ("trials.jsonl", 7), ("report.jsonl", 3)):
        kill_when(run_dir, log, count)
        for name in LOGS:
            now = [line for line in lines(run_dir / name) if line.endswith("}")]
            assert now[: len(done[name])] == done[name]
            done[name] = now
    finish(run_dir)
    for name in LOGS:
        after = lines(run_dir / name)
        assert after[: len(done[name])] == done[name], f"{name}: what was measured before the kill was measured again"
        assert len(after) == len(lines(undisturbed / name))
    assert (run_dir / "plan.json").read_bytes() == (undisturbed / "plan.json").read_bytes()
    assert (run_dir / "plan.safetensors").read_bytes() == (undisturbed / "plan.safetensors").read_bytes()


@pytest.mark.system
def test_a_torn_line_is_dropped_and_measured_again(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    kill_when(run_dir, "trials.jsonl", 3)
    log = run_dir / "trials.jsonl"
    log.write_bytes(log.read_bytes()[:-20])
    finish(run_dir)
    assert [json.loads(line)["digest"] for line in lines(log)] == [
        json.loads(line)["digest"] for line in lines(undisturbed / "trials.jsonl")
    ]


@pytest.mark.system
def test_other_settings_in_the_same_directory_are_refused(undisturbed: Path) -> None:
    process = start(undisturbed, "seed=3")
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "seed=0" in output
    assert "seed=3" in output
    assert "Traceback" not in output


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["haq", "rl", "tpe", "nsga2", "evolution", "greedy", "random"])
def test_every_family_goes_on_to_the_same_plan(strategy: str, tmp_path: Path) -> None:
    """The contract cuts the log of each strategy anywhere; here the whole command is killed."""
    settings = (f"strategy={strategy}",)
    finish(tmp_path / "a" / "whole", *settings)
    kill_when(tmp_path / "b" / "cut", "trials.jsonl", 5, *settings)
    before = lines(tmp_path / "b" / "cut" / "trials.jsonl")
    finish(tmp_path / "b" / "cut", *settings)
    assert lines(tmp_path / "b" / "cut" / "trials.jsonl")[: len(before)] == before
    for name in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "a" / "whole" / name).read_bytes() == (tmp_path / "b" / "cut" / name).read_bytes()
