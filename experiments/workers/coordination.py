"""What does it cost to share work, and where does a storage saturate?

    python experiments/workers/coordination.py [FOLDER]   # coordination.csv and coordination.png, a few minutes

The work is a look-up in a table and costs nothing, so that all that is measured is coordination: posting, claiming,
finishing, and seeing the outcomes. Every worker is a process of its own. PostgreSQL is started for the purpose.
"""

from __future__ import annotations

import csv
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from postgres import running_postgres  # noqa: E402

from search.figures.style import BASELINE, FRONT, INK, WINNER, legend, panels, png  # noqa: E402
from search.workers.board import Board, Outcome, Work  # noqa: E402
from search.workers.opening import open_board  # noqa: E402

WORKERS = (1, 2, 4, 8, 16)
TRIALS = {"folder": 400, "journal": 200, "postgresql": 200}
LAYERS = 50
BEAT_S = 1.0
IDLE_S = 0.005  # between looks, of workers without work and of the search
AXES = {
    "trials_per_second": "trials per second",
    "coordination_ms_per_trial": "milliseconds of a worker per trial",
    "worker_cpu_ms_per_trial": "processor milliseconds per trial",
}
COLOURS = {"folder": BASELINE, "journal": WINNER, "postgresql": FRONT}
TABLE = [[random.Random(layer).random() / 2**bits for bits in range(9)] for layer in range(LAYERS)]
"""The drop that each layer causes at 0 to 8 bits."""


def work(where: str, name: str) -> None:
    """One worker: joins, waits for a line of input, looks up what policies cost until the board is closed.

    Prints the processor seconds that this took.
    """
    board = open_board(where)
    board.beat(name, {"name": name})
    sys.stdin.readline()
    busy, beaten = time.process_time(), time.monotonic()
    while True:
        if time.monotonic() - beaten > BEAT_S:
            board.beat(name, {"name": name})
            beaten = time.monotonic()
        task = board.claim(name)
        if task is not None:
            drop = sum(TABLE[layer][bits] for layer, bits in enumerate(task.content["bits"]))
            board.finish(task, Outcome(name, {"drop": drop}))
        elif board.is_open:
            time.sleep(IDLE_S)
        else:
            break
    print(time.process_time() - busy)


def measure(where: str, workers: int, trials: int) -> dict[str, float]:
    """Posts trials, has workers go through them, and checks what comes back.

    Returns:
        Milliseconds per trial of posting; seconds from the moment when the workers may begin to the last outcome seen;
        processor milliseconds per trial of the workers together, and of the process that searches.
    """
    board = open_board(where)
    board.open({"trials": trials})
    generator = random.Random(workers)
    policies = [[generator.randint(2, 8) for _ in range(LAYERS)] for _ in range(trials)]
    open_ = {f"policy-{number}": bits for number, bits in enumerate(policies)}
    with _joined(where, [f"worker-{number}" for number in range(workers)], board) as processes:
        start = time.monotonic()
        board.post([Work(key, "measure", {"bits": bits}) for key, bits in open_.items()])
        posted_s = time.monotonic() - start
        start, busy = time.monotonic(), time.process_time()
        for process in processes:
            assert process.stdin
            process.stdin.write("begin\n")
            process.stdin.flush()
        while open_:
            for key in list(open_):
                outcome = board.outcome(key)
                if outcome is not None:
                    bits = open_.pop(key)
                    assert outcome.content["drop"] == sum(TABLE[i][b] for i, b in enumerate(bits))
            time.sleep(IDLE_S)
        seconds, searched_s = time.monotonic() - start, time.process_time() - busy
        board.close()
        worked_s = sum(float(process.communicate()[0]) for process in processes)
    return {
        "seconds": seconds,
        "post_ms_per_trial": 1000 * posted_s / trials,
        "worker_cpu_ms_per_trial": 1000 * worked_s / trials,
        "search_cpu_ms_per_trial": 1000 * searched_s / trials,
    }


@contextmanager
def _joined(where: str, names: list[str], board: Board) -> Iterator[list[subprocess.Popen[str]]]:
    """Workers that have joined, and have left afterwards."""
    command = [sys.executable, str(Path(__file__)), "--worker", where]
    processes = [
        subprocess.Popen([*command, name], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in names
    ]
    while set(board.workers()) != set(names):
        time.sleep(0.05)
    yield processes
    assert [process.wait(120) for process in processes] == [0] * len(processes)


def rows(places: dict[str, Callable[[], str]]) -> Iterator[dict[str, Any]]:
    """Measures every storage with every number of workers, the storages in turn."""
    for workers in WORKERS:
        for storage, place in places.items():
            trials = TRIALS[storage]
            found = measure(place(), workers, trials)
            seconds = found.pop("seconds")
            yield {
                "storage": storage,
                "workers": workers,
                "trials": trials,
                "seconds": round(seconds, 3),
                "trials_per_second": round(trials / seconds, 1),
                "coordination_ms_per_trial": round(1000 * workers * seconds / trials, 2),
                **{name: round(value, 2) for name, value in found.items()},
                "cores": os.cpu_count(),
                "load_average": round(os.getloadavg()[0], 1),
            }


def draw(found: list[dict[str, Any]]) -> bytes:
    """Trials per second, and what a trial takes of a worker and of processors, over the number of workers."""
    figure, axes = panels(11.0, [3.0], columns=3, room=0.4)
    lines = {}
    for storage, colour in COLOURS.items():
        mine = [row for row in found if row["storage"] == storage]
        counts = [row["workers"] for row in mine]
        for axis, name in zip(axes, AXES, strict=True):
            [lines[storage]] = axis.plot(counts, [row[name] for row in mine], "o-", color=colour, markersize=4)
    for axis, name in zip(axes, AXES.values(), strict=True):
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xticks(WORKERS, list(map(str, WORKERS)))
        axis.set_xlabel("worker processes", color=INK)
        axis.set_ylabel(name, color=INK)
    legend(figure, lines)
    return png(figure)


def main() -> None:
    with TemporaryDirectory() as folder, running_postgres() as server:

        def run() -> str:
            path = Path(folder) / f"run-{time.monotonic_ns()}"
            path.mkdir()
            return str(path)

        def journal() -> str:
            return str(Path(folder) / f"journal-{time.monotonic_ns()}.log")

        out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE
        found = []
        for row in rows({"folder": run, "journal": journal, "postgresql": server.make_database}):
            print(row, flush=True)
            found.append(row)
    with (out / "coordination.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    (out / "coordination.png").write_bytes(draw(found))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        work(sys.argv[2], sys.argv[3])
    else:
        main()
