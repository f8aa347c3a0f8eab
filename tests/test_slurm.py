# A real Slurm, and sweeps on it of which jobs fail, are killed, put back into the queue, and lost.
from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from slurm import Slurm, is_installed, single_node, wait_for

from search.events import EventLog
from search.trials import TrialLog

pytestmark = [
    pytest.mark.system,
    pytest.mark.skipif(not is_installed(), reason="needs Slurm and Munge: apt-get install slurm-wlm munge"),
]
pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs the extra `slurm`")

QUICK = ("strategy=random", "quantizer.repair=none", "hydra.launcher.cpus_per_task=1")
HELD = """
import time
from pathlib import Path

from search.tasks.digits import Digits


class Held(Digits):
    # Digits, of which a process judges but a few policies while the file `hold` is there.
    judged = 0

    def score(self, outputs, batch):
        self.judged += 1
        while self.judged > 9 and Path("hold").exists():
            time.sleep(0.05)
        return super().score(outputs, batch)
"""
HOLDING = (
    "task=custom",
    "task._target_=held.Held",
    "strategy.evaluations=12",
    "tracking=none",
    "run_root=runs",
    *QUICK,
)


@pytest.fixture(scope="module")
def slurm() -> Iterator[Slurm]:
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder, single_node(Path(folder), cpus=8) as running:
        yield running


class Sweep:
    """A `bitplan search -m` beside the test."""

    def __init__(self, slurm: Slurm, folder: Path, *overrides: str) -> None:
        command = [sys.executable, "-m", "search", "search", "-m", "hydra/launcher=slurm", "run_dir=sweep", *overrides]
        environment = {**slurm.environment, "OMP_NUM_THREADS": "1"}
        self.slurm, self.folder = slurm, folder / "sweep"
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def end(self) -> str:
        """Waits until it has ended; returns what it printed."""
        output, _ = self.process.communicate(timeout=170)
        return output

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Waits for something that comes about while it runs."""

        def has_come() -> object:
            assert self.process.poll() is None, self.end()
            return condition()

        wait_for(has_come, what)

    def stop(self) -> None:
        """Leaves neither the command nor a job of it behind."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()
        self.slurm.call("scancel", "--name=search")

    def rows(self) -> list[dict[str, str]]:
        """The lines of sweep.csv."""
        with (self.folder / "sweep.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    def read(self, job: int, name: str) -> dict[str, Any]:
        """A JSON file of a job."""
        return dict(json.loads((self.folder / str(job) / name).read_text()))

    def measured(self, job: int) -> list[str]:
        """The policies that a job has measured so far."""
        path = self.folder / str(job) / "trials.jsonl"
        return [trial.digest for trial in TrialLog(path).trials] if path.is_file() else []


@pytest.fixture(scope="module")
def failing(slurm: Slurm, tmp_path_factory: pytest.TempPathFactory) -> tuple[Sweep, str, list[dict[str, str]]]:
    """Six jobs, the first with a budget that no policy meets; what the command printed, and Slurm's word on each."""
    before = len(slurm.jobs())
    limits = "budget.average_weight_bits=1,3,4,5,6,8"
    at_once = "hydra.launcher.array_parallelism=2"
    sweep = Sweep(slurm, tmp_path_factory.mktemp("failing"), limits, "strategy.evaluations=3", at_once, *QUICK)
    output = sweep.end()
    wait_for(lambda: not slurm.call("squeue", "--noheader").strip(), "the end of the jobs' processes")
    return sweep, output, slurm.jobs()[before:]


Failing = tuple[Sweep, str, list[dict[str, str]]]


def test_a_failed_job_is_failed_in_slurm_and_all_others_completed(failing: Failing) -> None:
    jobs = sorted(failing[2], key=lambda job: int(job["ArrayTaskId"]))
    assert [job["JobState"] for job in jobs] == ["FAILED", *["COMPLETED"] * 5], failing[1]
    assert [job["ExitCode"] for job in jobs] == ["1:0", *["0:0"] * 5]


def test_the_command_ends_with_the_table_the_reason_and_a_code_of_its_own(failing: Failing) -> None:
    sweep, output, _ = failing
    assert sweep.process.returncode == 2
    assert "error: 1 of 6 jobs failed" in output
    assert "job 0 failed: budget.average_weight_bits=1 cannot be met" in output
    assert "Traceback" not in output
    rows = sweep.rows()
    assert [row["status"] for row in rows] == ["failed", *["finished"] * 5]
    assert rows[0]["reason"].startswith("budget.average_weight_bits=1 cannot be met")
    assert rows[0]["verdict"] == rows[0]["quality"] == ""
    assert all(row["verdict"] == "met" and 0 < float(row["quality"]) <= 1 for row in rows[1:])
    assert all(float(row["cost"]) <= limit for row, limit in zip(rows[1:], (3, 4, 5, 6, 8), strict=True))
    assert [job["status"] for job in json.loads((sweep.folder / "sweep.json").read_text())["jobs"]] == [
        row["status"] for row in rows
    ]


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own, on every query
def test_runs_and_mlflow_say_which_failed(failing: Failing) -> None:
    sweep = failing[0]
    states = [sweep.read(job, "run.json")["status"] for job in range(6)]
    assert states == ["failed", *["finished"] * 5]
    assert EventLog(sweep.folder / "0" / "log.jsonl").read()[-1]["event"] == "failed"

    from mlflow import MlflowClient  # takes seconds

    client = MlflowClient(f"sqlite:///{sweep.folder.parent}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("bitplan/digits")
    runs = client.search_runs([experiment.experiment_id], "tags.role = 'search'")
    status = {run.data.tags["bitplan.run_id"]: run.info.status for run in runs}
    assert [status[sweep.read(job, "run.json")["run_id"]] for job in range(6)] == ["FAILED", *["FINISHED"] * 5]


@pytest.fixture
def held(tmp_path: Path) -> Path:
    """A folder with a task that waits, after some policies, until the file `hold` is gone."""
    (tmp_path / "held.py").write_text(HELD)
    (tmp_path / "hold").touch()
    return tmp_path


def state(slurm: Slurm, name: str) -> str:
    return slurm.call("squeue", "--noheader", "--states=all", "--array", f"--jobs={name}", "--format=%T").strip()


def restarts(slurm: Slurm, before: int) -> list[str]:
    """How often each job was put back into the queue, in order; `before` jobs are not asked about."""
    return sorted(job["Restarts"] for job in slurm.jobs()[before:])


def check_resumed(sweep: Sweep, job: int, begun: list[str]) -> None:
    """A job went on where it was: no trial is lost, and none was measured twice."""
    row = sweep.rows()[job]
    assert (row["status"], row["known"], int(row["starts"])) == ("finished", "resumed", 2)
    events = EventLog(sweep.folder / str(job) / "log.jsonl").read()
    assert [event["event"] for event in events].count("resumed") == 1
    measured = [event["digest"] for event in events if event["event"] == "trial" and not event["known"]]
    assert len(measured) == len(set(measured))
    assert sweep.measured(job)[: len(begun)] == begun
    assert len(sweep.measured(job)) == 12


def test_a_job_that_is_stopped_goes_on_where_it_was(slurm: Slurm, held: Path) -> None:
    """The first is requeued, the second warned of its time limit, the third killed and requeued, the last cancelled."""
    before = len(slurm.jobs())
    sweep = Sweep(slurm, held, "seed=0,1,2,3", *HOLDING)
    try:
        sweep.wait_for(lambda: all(len(sweep.measured(job)) > 1 for job in range(4)), "the first measurements")
        begun = [sweep.measured(job) for job in range(4)]
        names = {int(job["ArrayTaskId"]): f"{job['ArrayJobId']}_{job['ArrayTaskId']}" for job in slurm.jobs()[before:]}
        slurm.call("scontrol", "requeue", names[0])
        slurm.call("scancel", "--signal=USR2", names[1])  # as Slurm sends it before the time limit
        os.kill(sweep.read(2, "job.json")["starts"][-1]["process"], signal.SIGKILL)
        slurm.call("scancel", names[3])
        sweep.wait_for(lambda: state(slurm, names[2]) == "FAILED", "the end of the killed job")
        slurm.call("scontrol", "requeue", names[2])
        sweep.wait_for(lambda: restarts(slurm, before) == ["0", "1", "1", "1"], "three jobs' return to the queue")
        (held / "hold").unlink()
        output = sweep.end()
    finally:
        sweep.stop()
    assert sweep.process.returncode == 2, output
    assert "error: 1 of 4 jobs failed" in output
    for job in (0, 1, 2):
        check_resumed(sweep, job, begun[job])
    assert sweep.rows()[3]["status"] in ("lost", "interrupted")
    assert "CANCELLED" in sweep.rows()[3]["reason"]


def test_a_node_that_fails_costs_no_trial(slurm: Slurm, held: Path) -> None:
    sweep = Sweep(slurm, held, "seed=0,1", *HOLDING)
    try:
        sweep.wait_for(lambda: all(len(sweep.measured(job)) > 1 for job in (0, 1)), "the first measurements")
        begun = [sweep.measured(job) for job in (0, 1)]
        processes = [sweep.read(job, "job.json")["starts"][-1]["process"] for job in (0, 1)]
        slurm.call("scontrol", "update", f"nodename={slurm.host}", "state=DOWN", "reason=test")
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        sweep.wait_for(lambda: not any(Path(f"/proc/{process}").exists() for process in processes), "both jobs' end")
        (held / "hold").unlink()
        slurm.restore()
        output = sweep.end()
    finally:
        sweep.stop()
    assert sweep.process.returncode == 0, output
    for job in (0, 1):
        check_resumed(sweep, job, begun[job])


def test_what_slurm_refuses_is_said_in_its_words(slurm: Slurm, tmp_path: Path) -> None:
    sweep = Sweep(slurm, tmp_path, "seed=0,1", "hydra.launcher.partition=nowhere")
    output = sweep.end()
    assert sweep.process.returncode == 2
    assert "error: Slurm refuses the sweep" in output
    assert "invalid partition specified: nowhere" in output
    assert "Traceback" not in output
