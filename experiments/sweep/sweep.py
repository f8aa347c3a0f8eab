"""Runs one real sweep on Slurm, kills one of its jobs, and writes what MLflow, `bitplan compare` and the log say of it.

    python experiments/sweep/sweep.py [--reduced] [--work FOLDER] [--out FOLDER]

Uses the Slurm of this machine, or starts one of a single node if there is none (as root, or as any user; Debian's
packages slurm-wlm and munge). Resumable: `--work` of an earlier attempt goes on with it.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent.parent / "tests"))  # where a Slurm of one node is kept

from slurm import is_installed, single_node, wait_for  # noqa: E402

from search.events import EventLog  # noqa: E402
from search.trials import TrialLog  # noqa: E402

FULL = (
    *("task=digits,fashion_1000", "hardware=neoverse_v1,h100_sxm,hexagon_8gen3"),
    *("strategy=auto,tpe,evolution", "seed=0,1"),
)
REDUCED = ("task=digits", "hardware=neoverse_v1,hexagon_8gen3", "strategy=auto,tpe", "seed=0")
SETTINGS = ("strategy.evaluations=12", "sensitivity=fast", "quantizer.repair=batch_norm", "space.input=[uint8,float]")
BUDGET = ("budget.size_ratio=0.12", "budget.latency_ratio=1")
"""No slower than the float network: what that takes differs from device to device."""
BITPLAN = (sys.executable, "-m", "search")
KILLED_AFTER = 3
"""Trials that the killed job has measured by then."""


@contextmanager
def some_slurm(cpus: int) -> Iterator[Mapping[str, str]]:
    """The environment of a Slurm: this machine's, or one of a single node that ends with the block."""
    if shutil.which("sinfo") and subprocess.run(["sinfo"], capture_output=True, check=False).returncode == 0:
        yield os.environ
        return
    if not is_installed():
        sys.exit("there is no Slurm here: apt-get install slurm-wlm munge")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, single_node(Path(folder), cpus=cpus) as node:
        yield node.environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reduced", action="store_true", help="4 jobs on one task, to try it")
    parser.add_argument("--work", type=Path, default=Path("runs/sweep"), help="where the runs go")
    parser.add_argument("--out", type=Path, default=HERE, help="where the results go")
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="jobs at once on a Slurm of one node")
    arguments = parser.parse_args()
    work, out = arguments.work, arguments.out.resolve()  # the former stands in the tables: as short as it was given
    out.mkdir(parents=True, exist_ok=True)
    sweep = work / "sweep"
    command = [*BITPLAN, "search", "-m", "--config-dir", str(HERE / "configs"), "hydra/launcher=slurm"]
    command += ["hydra.launcher.cpus_per_task=1", f"run_root={work}", f"run_dir={sweep}"]
    command += [*(REDUCED if arguments.reduced else FULL), *SETTINGS, *BUDGET]
    with some_slurm(arguments.cpus) as slurm:
        environment = {**slurm, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
        begun = time.time()
        running = subprocess.Popen(command, env=environment)
        try:
            recovery = kill_and_requeue(sweep, environment, running)
            code = running.wait()
        finally:
            running.kill()
    if code:
        sys.exit(f"the sweep ended with exit code {code}")
    write_csv(out / "recovery.csv", [recovered(sweep, recovery)] if recovery else [])
    shutil.copy(sweep / "sweep.csv", out / "sweep.csv")
    write_mlflow_table(work / "mlflow.db", out / "runs.csv")
    page = work / "compare.html"  # beside the runs, so that its links do not tell where on this machine they are
    subprocess.run([*BITPLAN, "compare", str(sweep), "--out", str(page)], check=True)
    shutil.copy(page, out / "compare.html")
    print(f"{time.time() - begun:.0f} s; wrote {out}: sweep.csv, runs.csv, recovery.csv, compare.html")


def kill_and_requeue(
    sweep: Path, environment: Mapping[str, str], running: subprocess.Popen[bytes]
) -> dict[str, Any] | None:
    """Kills the first job caught measuring, has Slurm queue it again; returns what was there, None if all were done."""
    folder: Path | None = None

    def caught() -> bool:
        nonlocal folder
        for path in sweep.glob("*/trials.jsonl"):
            at_work = json.loads(path.with_name("run.json").read_text())["status"] == "running"
            if at_work and len(TrialLog(path).trials) >= KILLED_AFTER:
                folder = path.parent
        return folder is not None or running.poll() is not None

    while not caught():
        time.sleep(0.02)
    if folder is None:
        return None
    start = json.loads((folder / "job.json").read_text())["starts"][-1]
    os.kill(start["process"], signal.SIGKILL)
    killed = {"folder": folder, "time": time.time()}
    killed["trials"] = [trial.digest for trial in TrialLog(folder / "trials.jsonl").trials]

    def state() -> str:
        show = ["squeue", "--noheader", "--states=all", f"--jobs={start['slurm']}", "--format=%T"]
        return subprocess.run(show, env=environment, capture_output=True, text=True, check=True).stdout.strip()

    wait_for(lambda: state() == "FAILED", "the end of the killed job")
    subprocess.run(["scontrol", "requeue", start["slurm"]], env=environment, check=True)
    return killed


def recovered(sweep: Path, killed: Mapping[str, Any]) -> dict[str, Any]:
    """What the killed job's log says of its coming back."""
    folder = killed["folder"]
    events = [event for event in EventLog(folder / "log.jsonl").read() if event["time"] >= killed["time"]]
    resumed = next(event for event in events if event["event"] == "resumed")
    new = [event for event in events if event["event"] == "trial" and not event["known"]]
    last = [trial.digest for trial in TrialLog(folder / "trials.jsonl").trials]
    started = json.loads((folder / "job.json").read_text())["starts"][-1]["time"]
    return {
        "job": folder.relative_to(sweep).as_posix(),
        "trials_before": len(killed["trials"]),
        "trials_lost": len(killed["trials"]) - sum(a == b for a, b in zip(killed["trials"], last, strict=False)),
        "trials_measured_twice": len({event["digest"] for event in new} & set(killed["trials"])),
        "seconds_until_started_again": round(started - killed["time"], 2),
        "seconds_until_resumed": round(resumed["time"] - killed["time"], 2),
        "seconds_until_new_trial": round(new[0]["time"] - killed["time"], 2) if new else None,
    }


def write_mlflow_table(database: Path, path: Path) -> None:
    """Writes MLflow's table of searches: what it says in its own pages."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{database.resolve()}")
    table = mlflow.search_runs(search_all_experiments=True, filter_string="tags.role = 'search'")
    kept = [name for name in table if not name.startswith(("tags.mlflow.", "tags.bitplan.run_dir", "artifact_uri"))]
    order = [name for name in ("tags.task", "tags.hardware", "tags.strategy", "tags.seed") if name in kept]
    table[kept].sort_values(order).dropna(axis="columns", how="all").to_csv(path, index=False)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else ["job"])
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
