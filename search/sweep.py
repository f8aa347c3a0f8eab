"""A sweep: many searches from one command, what became of each, and one table about all of them.

Every job keeps `job.json` in its own directory, so that any launcher, on any number of machines, may run it. When the
command that launched them ends, it gathers these, with what the runs say, in the sweep's directory:

sweep.json          the sweep, and all that is known of each job
sweep.csv           one line per job
"""

from __future__ import annotations

import csv
import json
import os
import socket
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback

from search.errors import BitplanError, one_line
from search.files import replacing, write_json
from search.rundir import RunDirectory
from search.terminal import VERDICT_STYLE, plain_table, print_table
from search.units import quantity

if TYPE_CHECKING:
    from rich.console import Console

    from search.plan import Plan

JOB = "job.json"
STYLE = {"finished": "green", "failed": "red", "lost": "red", "interrupted": "yellow", "running": "cyan"}


class SweepError(BitplanError):
    """A sweep of which jobs failed."""


@dataclass(frozen=True)
class JobSummary:
    """What became of one job of a sweep.

    Attributes:
        job: Its number.
        overrides: The settings that make it, as Hydra takes them.
        status: `finished`, `failed`, `interrupted`, `running`, or `lost` where its process ended without a word.
        known: What of the run was there when the job began: empty, `finished` (then nothing is measured again), or
            `resumed`.
        starts: How often it was started; more than once where a cluster put it back into its queue.
        reason: Why it failed, on one line; empty where it did not.
        task: The run's task, empty where the job did not get as far; likewise `hardware`, `strategy` and `seed`.
        hardware: The cost model's name.
        strategy: The strategy's name.
        seed: The seed.
        verdict: Whether the budget was met, missed, or neither for sure.
        metric: What the quality is.
        quality: The winner's quality on the report split.
        drop: The float network's quality less the winner's.
        cost_name: The cost that the budget is about first.
        cost: What the winner costs, in the unit that `cost_name` ends in.
        average_weight_bits: The winner's bits per weight.
        evaluations: How many evaluations were spent.
        seconds: How long the job took since it was started last.
        directory: The run directory, relative to the sweep's.
    """

    job: int
    overrides: tuple[str, ...]
    status: str
    known: str
    starts: int
    reason: str
    task: str
    hardware: str
    strategy: str
    seed: int | None
    verdict: str
    metric: str
    quality: float | None
    drop: float | None
    cost_name: str
    cost: float | None
    average_weight_bits: float | None
    evaluations: float | None
    seconds: float | None
    directory: str

    @classmethod
    def read(cls, directory: Path, sweep: Path) -> JobSummary:
        """Reads what a job's directory says of it.

        Args:
            directory: The directory, which holds `job.json`.
            sweep: The sweep's directory.
        """
        record, run = read_job(directory), RunDirectory(directory)
        info = run.info() if run.file("run.json").is_file() else {}
        status = record["status"]
        if status in ("running", "lost") and info.get("status") == "interrupted":
            status = "interrupted"  # the search was stopped, and its process ended before Hydra could say so here
        found = [start["found"] for start in record["starts"]]
        plan = run.plan() if status == "finished" else None
        cost_name = info.get("primary_cost", "") if plan else ""
        return cls(
            job=record["job"],
            overrides=tuple(record["overrides"]),
            status=status,
            known="finished" if found[:1] == ["finished"] else ("resumed" if any(found) else ""),
            starts=len(found),
            reason=record.get("reason", ""),
            task=info.get("task", ""),
            hardware=info.get("hardware", ""),
            strategy=info.get("strategy", ""),
            seed=info.get("seed"),
            verdict=plan.budget.verdict if plan else "",
            metric=info.get("metric", ""),
            quality=plan.quality.value if plan else None,
            drop=plan.quality.drop if plan else None,
            cost_name=cost_name,
            cost=cost_of(plan, cost_name) if plan else None,
            average_weight_bits=plan.average_weight_bits if plan else None,
            evaluations=info.get("evaluations") if plan else None,
            seconds=record.get("seconds"),
            directory=os.path.relpath(directory, sweep),
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON and CSV hold it."""
        return {**vars(self), "overrides": " ".join(self.overrides)}


@dataclass(frozen=True)
class Sweep:
    """A sweep that was launched.

    Attributes:
        directory: Its directory.
        launch: Name of this launch; a directory used again keeps the records of earlier ones apart by it.
        started: When, in seconds since 1970.
    """

    directory: Path
    launch: str
    started: float

    def jobs(self) -> list[JobSummary]:
        """What became of every job that has begun, by number."""
        found = [file.parent for file in self.directory.rglob(JOB)]
        folders = [folder for folder in found if read_job(folder).get("launch") == self.launch]
        return sorted((JobSummary.read(folder, self.directory) for folder in folders), key=lambda job: job.job)

    def write(self, jobs: Sequence[JobSummary]) -> None:
        """Writes sweep.json and sweep.csv."""
        rows = [job.to_dict() for job in jobs]
        now = time.time()
        times = {"started": self.started, "finished": now, "seconds": now - self.started}
        write_json(self.directory / "sweep.json", {"launch": self.launch, **times, "jobs": rows})
        with replacing(self.directory / "sweep.csv") as aside, aside.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(JobSummary.__dataclass_fields__))
            writer.writeheader()
            writer.writerows(rows)


LAUNCHED: list[Sweep] = []
"""The sweeps that this process has launched: Hydra makes its callbacks itself, and this is where ours leaves word."""


class SweepCallback(Callback):  # type: ignore[misc]
    """Keeps the record of every job, in whichever process it runs; outside a sweep it does nothing."""

    def __init__(self) -> None:
        self._launch: str | None = None

    def on_multirun_start(self, config: Any, **kwargs: Any) -> None:
        """Notes that a sweep begins; runs where it is launched, and travels to the jobs from there."""
        self._launch = uuid4().hex
        LAUNCHED.append(Sweep(Path(str(config.hydra.sweep.dir)).absolute(), self._launch, time.time()))

    def on_job_start(self, config: Any, **kwargs: Any) -> None:
        """Notes where a job runs, and what of its run is there already."""
        if self._launch is None:
            return
        directory = Path(config.hydra.runtime.output_dir)
        earlier = read_job(directory)
        run = RunDirectory(directory)
        start = {
            "time": time.time(),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "slurm": os.environ.get("SLURM_JOB_ID"),
            "found": run.info()["status"] if run.file("run.json").is_file() else None,
        }
        record = {
            "launch": self._launch,
            "job": config.hydra.job.num,
            "overrides": list(config.hydra.overrides.task),
            "status": "running",
            "starts": [*(earlier["starts"] if earlier.get("launch") == self._launch else []), start],
        }
        write_json(directory / JOB, record)

    def on_job_end(self, config: Any, job_return: JobReturn, **kwargs: Any) -> None:
        """Notes how a job ended."""
        if self._launch is None:
            return
        directory = Path(config.hydra.runtime.output_dir)
        record = read_job(directory)
        record["seconds"] = time.time() - record["starts"][-1]["time"]
        record["status"] = "finished" if job_return.status == JobStatus.COMPLETED else "failed"
        if record["status"] == "failed":
            error = job_return._return_value  # `return_value` would raise it
            record["reason"] = reason(error)
            if not isinstance(error, BitplanError):
                record["traceback"] = traceback.format_exception(error)
        write_json(directory / JOB, record)


def cost_of(plan: Plan, name: str) -> float | None:
    """What a plan costs, in the unit that the cost's name ends in; None where that is not known."""
    return plan.cost[name].value if name in plan.cost else getattr(plan, name, None)


def read_job(directory: Path) -> dict[str, Any]:
    """What `job.json` of a job's directory says; nothing where there is none, or what there is was cut short."""
    try:
        return dict(json.loads((directory / JOB).read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return {}


def reason(error: BaseException) -> str:
    """What a user is told of an error, on one line."""
    return one_line(error) if isinstance(error, BitplanError) else f"{type(error).__name__}: {one_line(error)}"


def note_lost(directory: Path, sweep: Sweep, job: int, overrides: Sequence[str], why: str) -> str:
    """Notes that a job ended without a word, unless it left one after all; returns the reason that its record gives."""
    record = read_job(directory)
    if record.get("launch") != sweep.launch:
        record = {"launch": sweep.launch, "job": job, "overrides": list(overrides), "starts": []}
    if record.get("status", "running") == "running":
        record |= {"status": "lost", "reason": why}
        write_json(directory / JOB, record)
    return str(record.get("reason", why))


@contextmanager
def summarized(console: Console) -> Iterator[None]:
    """Ends a sweep that the block launches with its summary, however it ends; other commands are let be.

    Raises:
        SweepError: If a job failed.
    """
    LAUNCHED.clear()
    failure: BaseException | None = None
    try:
        yield
    except BaseException as error:
        failure = error
    jobs = LAUNCHED[0].jobs() if LAUNCHED else []
    if jobs:
        LAUNCHED[0].write(jobs)
        print_sweep(LAUNCHED[0], jobs, console)
    failed = [job for job in jobs if job.status != "finished"]
    if failed and not isinstance(failure, (KeyboardInterrupt, SystemExit)):  # which say themselves that they stopped
        where = LAUNCHED[0].directory
        raise SweepError(
            f"{len(failed)} of {len(jobs)} jobs failed; repeat the command with run_dir={where} to go on: "
            "what has been measured is not measured again"
        ) from failure
    if failure:
        raise failure


def print_sweep(sweep: Sweep, jobs: Sequence[JobSummary], console: Console) -> None:
    """Prints a line per job, with the settings in which they differ, and why jobs failed."""
    from rich.text import Text

    common = set.intersection(*(set(job.overrides) for job in jobs)) if len(jobs) > 1 else set()
    table = plain_table(
        f"sweep {sweep.directory}",
        ["job", "overrides", "status", "verdict", "quality", "cost", "bits", "seconds", "directory"],
        left=4,
    )
    for job in jobs:
        known = {"finished": " (had finished)", "resumed": " (resumed)"}.get(job.known, "")
        known = known if job.status == "finished" else ""  # a job that is refused has not touched what it found
        table.add_row(
            str(job.job),
            " ".join(override for override in job.overrides if override not in common),
            Text.assemble((job.status, STYLE.get(job.status, "")), known),
            Text(job.verdict, style=VERDICT_STYLE[job.verdict]) if job.verdict else "",
            "" if job.quality is None else f"{job.quality:.4f}",
            quantity(job.cost_name, job.cost) if job.cost_name else "",
            "" if job.average_weight_bits is None else f"{job.average_weight_bits:.2f}",
            "" if job.seconds is None else f"{job.seconds:.1f}",
            job.directory,
        )
    print_table(table, console)
    for job in jobs:
        if job.status != "finished":
            why = job.reason or "its process ended without a word"
            console.print(
                f"job {job.job} {job.status}: {why}", style="red", highlight=False, markup=False, soft_wrap=True
            )
    console.print(f"Wrote {sweep.directory}: sweep.csv, sweep.json", highlight=False, markup=False, soft_wrap=True)


def launcher_missing(message: str) -> str | None:
    """Says how to install the plug-in that a launcher needs, where Hydra says that it is not there."""
    for launcher, extra in (("joblib", "joblib"), ("submitit_slurm", "slurm")):
        if f"hydra/launcher/{launcher}'" in message:
            name = "local" if extra == "joblib" else extra
            return f'hydra/launcher={name} needs a plug-in that is not installed: pip install "bitplan[{extra}]"'
    return None
