"""How much faster is a search with a second worker, and what does it cost when one is killed?

    OMP_NUM_THREADS=1 python experiments/workers/throughput.py [FOLDER] [TASK ...]   # throughput.csv

Every search starts with an empty store, in a process of its own, and begins to score when its workers are ready: what
is compared is the work, and not the start of processes. One worker and two take turns, and each ratio is within a turn.
With `killed`, a worker is killed in the middle of a measurement: `recovery_s` is the time until somebody else claims
what it had claimed.
"""

from __future__ import annotations

import csv
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT)]

from search.config import compose, make_job  # noqa: E402
from search.errors import BitplanError  # noqa: E402
from search.job import Job  # noqa: E402
from search.objective import Objective  # noqa: E402
from search.run import search  # noqa: E402
from search.trials import TrialLog  # noqa: E402
from search.workers.folder import FolderBoard  # noqa: E402

TURNS = {"digits": 3, "fashion_1000": 2}
READY_S = 600.0
SETTINGS = {
    "digits": ["task=digits", "strategy.evaluations=200"],
    "fashion_1000": [
        *("task=custom", "task._target_=fashion_1000.Fashion1000"),
        *("strategy.evaluations=40", "sensitivity.predictor=kl"),
    ],
}


def job_of(task: str, folder: Path, workers: int) -> Job:
    """A search that scores its choices, and then measures policies at random."""
    given = [*SETTINGS[task], "strategy=random", "tracking=none", "quantizer.repair=none", f"workers={workers}"]
    return make_job(compose([*given, f"run_root={folder}", f"run_dir={folder / 'run'}"]), folder / "run")


def run(task: str, folder: Path, workers: int) -> None:
    """One search, in this process; writes what took how long to `times.json`."""
    job, times = job_of(task, folder, workers), dict[str, float]()
    begin = job.strategy.search

    def begin_ready(space: Any, objective: Objective, rng: Any) -> None:
        until = time.monotonic() + READY_S
        while workers > 1 and objective._evaluator.foresight == 1:
            assert time.monotonic() < until, "no worker was ready"
            time.sleep(0.05)
        started = time.perf_counter()
        assert objective.sensitivity.columns
        scored = time.perf_counter()
        (folder / "measuring").touch()
        try:
            begin(space, objective, rng)
        finally:
            times.update(scoring_s=scored - started, measuring_s=time.perf_counter() - scored)

    job.strategy.search = begin_ready  # type: ignore[method-assign]
    search(job)
    (folder / "times.json").write_text(json.dumps(times))


def start(task: str, folder: Path, workers: int) -> subprocess.Popen[bytes]:
    """The same in a process of its own."""
    tasks = os.pathsep.join([str(HERE.parent / "sweep"), os.environ.get("PYTHONPATH", "")])  # where fashion_1000 is
    command = [sys.executable, __file__, "run", task, str(folder), str(workers)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": tasks})


def measured(task: str, workers: int) -> dict[str, Any]:
    """Times of one search, and what its trials were."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        if start(task, folder, workers).wait():
            raise BitplanError("a search failed; see above")
        return json.loads((folder / "times.json").read_text()) | counts(folder / "run")


def counts(run_dir: Path) -> dict[str, Any]:
    """What was measured, by whom, and how often."""
    trials = TrialLog(run_dir / "trials.jsonl").trials
    shards = [path.read_text().splitlines() for path in (run_dir / "workers").glob("*.jsonl")]
    done = [row["key"] for shard in shards for row in map(json.loads, shard) if row["event"] == "finished"]
    return {
        "evaluations": sum(trial.is_measured for trial in trials),
        "twice": len(done) - len(set(done)),
        "course": [(trial.digest, trial.quality) for trial in trials if trial.is_measured],
    }


def killed(task: str) -> dict[str, Any]:
    """A search of which the second worker is killed while it measures."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        process = start(task, folder, 2)
        claimed = folder / "run" / "workers" / "board" / "claimed"
        while not ((folder / "measuring").exists() and (mine := list(claimed.glob("*~measure-*~local-*")))):
            assert process.poll() is None, "the search ended before a worker could be killed"
            time.sleep(0.001)
        board = FolderBoard(claimed.parent)
        victim = next(facts["process"] for name, facts in board.workers().items() if facts["role"] == "worker")
        os.kill(victim, signal.SIGKILL)
        at = time.perf_counter()
        while any(path.exists() for path in mine):
            assert process.poll() is None, "what the dead worker had claimed was never opened again"
            time.sleep(0.005)
        recovery_s = time.perf_counter() - at
        if process.wait():
            raise BitplanError("a search failed; see above")
        return {"recovery_s": recovery_s} | counts(folder / "run")


def rows(task: str) -> Iterator[dict[str, Any]]:
    """The rows of the table for a task."""
    courses = []
    for turn in range(TURNS[task]):
        one, two = measured(task, 1), measured(task, 2)
        courses += [one["course"], two["course"]]
        for workers, found in ((1, one), (2, two)):
            yield {
                "task": task,
                "turn": turn,
                "workers": workers,
                "scoring_s": round(found["scoring_s"], 3),
                "measuring_s": round(found["measuring_s"], 3),
                "evaluations_per_s": round(found["evaluations"] / found["measuring_s"], 3),
                "scoring_ratio": round(one["scoring_s"] / found["scoring_s"], 3),
                "measuring_ratio": round(one["measuring_s"] / found["measuring_s"], 3),
                "done_twice": found["twice"],
                "load": round(os.getloadavg()[0], 1),
            }
    dead = killed(task)
    courses.append(dead["course"])
    lost = len(courses[0]) - min(len([pair for pair in course if pair in courses[0]]) for course in courses)
    yield {
        "task": task,
        "turn": "killed",
        "workers": 2,
        "recovery_s": round(dead["recovery_s"], 3),
        "done_twice": dead["twice"],
        "lost": lost,
        "load": round(os.getloadavg()[0], 1),
    }


def main(folder: Path, tasks: list[str]) -> None:
    """Measures, and writes the table."""
    folder.mkdir(parents=True, exist_ok=True)
    table: list[dict[str, Any]] = []
    for row in (row for task in tasks for row in rows(task)):
        table.append(row)
        with (folder / "throughput.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(dict.fromkeys(column for row in table for column in row)))
            writer.writeheader()
            writer.writerows(table)
    for task in tasks:
        for column in ("scoring_ratio", "measuring_ratio"):
            found = [row[column] for row in table if row["task"] == task and row["workers"] == 2 and column in row]
            print(f"{task}: {column} of two workers, median of {len(found)}: {statistics.median(found):.2f}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["run"]:
        run(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE, sys.argv[2:] or list(SETTINGS))
