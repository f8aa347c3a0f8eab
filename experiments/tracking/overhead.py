"""What MLflow costs a search of 1,000 trials: wall and processor seconds with tracking and without.

    python experiments/tracking/overhead.py [--postgres]

The trials are those of a real log: their policies, costs and qualities are written to `trials.jsonl` one by one, as a
search does, after as much computing as one evaluation of the digits network takes. Searches with tracking and without
take turns. With `--postgres`, an `mlflow server` on a PostgreSQL server (started by `tests/postgres.py`) is measured,
too. Writes overhead.csv beside this file.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from urllib.request import urlopen

import pandas as pd
import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from rundirs import make_plan, start  # noqa: E402

from search.policy import Policy  # noqa: E402
from search.rundir import RunDirectory  # noqa: E402
from search.tracking.live import Mirrored  # noqa: E402
from search.tracking.settings import TrackingSettings  # noqa: E402
from search.trials import Trial, TrialLog  # noqa: E402

TRIALS, LAYERS, FRONT, SECONDS, REPEATS = 1000, 50, 30, 0.1, 3
COSTS = (
    "latency_s",
    "energy_j",
    "weight_bytes",
    "activation_bytes",
    "bit_ops",
    "average_weight_bits",
    "effective_bits",
)


def compute(seconds: float) -> None:
    """Works as an evaluation does, for that many processor seconds of this thread."""
    weight = torch.ones(256, 256)
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        weight @ weight


def make_trial(number: int, generator: torch.Generator) -> Trial:
    """A trial with all that the log of a real one holds."""
    bits = torch.randint(2, 9, (LAYERS,), generator=generator).tolist()
    policy = Policy.from_dict({f"stage.{layer}.conv": f"int{bit}/uint8" for layer, bit in enumerate(bits)})
    mean = sum(bits) / LAYERS
    quality = 0.95 - 0.4 / mean**2 + 0.01 * float(torch.rand(1, generator=generator))
    metrics = {"quality": quality, "drop": 0.95 - quality, "drop_low": 0.0, "drop_high": 0.1, "samples": 350.0}
    costs = {name: mean * (1 + rank) for rank, name in enumerate(COSTS)}
    return Trial(number, policy, 1.0, metrics | {"predicted": 0.05}, costs, SECONDS, "complete", 1e-3)


def search(run: RunDirectory, seconds: float) -> None:
    """Does what a search does to its run directory."""
    log, generator = TrialLog(run.file("trials.jsonl")), torch.Generator().manual_seed(0)
    for number in range(TRIALS):
        compute(seconds)
        log.append(make_trial(number, generator))
    rows = [
        {"role": "winner" if rank == 0 else "front", "name": f"trial {trial.number}", "trial": trial.number}
        | {"digest": trial.digest, "quality": trial.quality, "drop": trial.drop, "verdict": "met", **trial.cost}
        | {"policy": str(trial.policy.to_dict()).replace("'", '"')}
        for rank, trial in enumerate(log.trials[:FRONT])
    ]
    run.write_table("front.csv", pd.DataFrame(rows))
    best = pd.Series([trial.quality for trial in log.trials]).cummax()
    history = {"trial": range(TRIALS), "evaluations": range(1, TRIALS + 1), "seconds": range(TRIALS)}
    history |= {"best_loss": 1 - best, "hypervolume": best, "primary_hypervolume": best}
    run.write_table("history.csv", pd.DataFrame(history))
    make_plan().save(run.file("plan.json"))
    run.update(status="finished", finished=time.time(), evaluations=TRIALS)


def processor_seconds() -> tuple[float, float]:
    """Of this process, and of all processes that it started and waited for."""
    own, others = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime, others.ru_utime + others.ru_stime


def measure(store: str, uri: str | None, folder: Path, seconds: float) -> dict[str, object]:
    """Runs one search, mirrored to a store or not."""
    settings = TrackingSettings(enabled=store != "none", uri=uri)
    run = start(folder / "run", run_id=f"{time.time_ns():032x}")
    run.claim()
    processor, clock = processor_seconds(), time.perf_counter()
    with Mirrored(run.path, settings, folder) as mirrored:
        mirrored.start(run)
        search(run, seconds)
        searched = time.perf_counter()
    ended = time.perf_counter()
    own, others = (after - before for before, after in zip(processor, processor_seconds(), strict=True))
    run.release()
    return {
        "store": store,
        "trials": TRIALS,
        "evaluation_s": seconds,
        "search_wall_s": round(searched - clock, 3),
        "end_wall_s": round(ended - searched, 3),
        "search_processor_s": round(own, 3),
        "tracking_processor_s": round(others, 3),
    }


@contextmanager
def mlflow_server() -> Iterator[str]:
    """An MLflow server on a PostgreSQL server."""
    from postgres import running_postgres

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with running_postgres() as postgres, tempfile.TemporaryDirectory() as folder:
        database = postgres.make_database().replace("postgresql://", "postgresql+psycopg://")
        command = [sys.executable, "-m", "mlflow", "server", "--port", str(port), "--workers", "1"]
        command += ["--backend-store-uri", database, "--artifacts-destination", folder]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        process = subprocess.Popen(command, **quiet, env=environment, start_new_session=True)
        try:
            while True:
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                    break
                except OSError:
                    time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def main() -> None:
    """Measures and writes overhead.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--postgres", action="store_true", help="measure an MLflow server on PostgreSQL, too")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="processor seconds of an evaluation")
    parser.add_argument("--repeats", type=int, default=REPEATS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    compute(1.0)
    rows = []
    with mlflow_server() if options.postgres else nullcontext() as url:
        stores = [("none", None), ("sqlite", None), *([("server on postgresql", url)] if url else [])]
        for _ in range(options.repeats):
            for store, uri in stores:
                folder = Path(tempfile.mkdtemp())
                try:
                    rows.append(measure(store, uri, folder, options.seconds))
                finally:
                    shutil.rmtree(folder)
                print(rows[-1], flush=True)
                pd.DataFrame(rows).to_csv(Path(__file__).with_name("overhead.csv"), index=False)


if __name__ == "__main__":
    main()
