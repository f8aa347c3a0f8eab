# Sweeps: each job its own directory, one MLflow store between them, and one table about what became of all.
from __future__ import annotations

import csv
import json
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import rundirs
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import OmegaConf
from rich.console import Console

from search.errors import InfeasibleError
from search.files import write_json
from search.sweep import (
    LAUNCHED,
    JobSummary,
    Sweep,
    SweepCallback,
    SweepError,
    launcher_missing,
    note_lost,
    print_sweep,
    read_job,
    summarized,
)
from search.terminal import make_console

QUICK = ("strategy=random", "strategy.evaluations=3", "quantizer.repair=none", "space.input=[uint8]")


def sweep(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "search", "-m", *QUICK, f"run_root={folder}/runs", f"run_dir={folder}/runs/sweep"]
    return subprocess.run([*command, *overrides], capture_output=True, text=True, timeout=400, cwd=folder, check=False)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "runs" / "sweep" / "sweep.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.system
@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own, on every query
def test_two_jobs_at_once_do_not_collide(tmp_path: Path) -> None:
    pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra `joblib`")
    done = sweep(tmp_path, "hydra/launcher=local", "seed=0,1")
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [json.loads((tmp_path / "runs" / "sweep" / str(job) / "run.json").read_text()) for job in (0, 1)]
    assert [run["seed"] for run in runs] == [0, 1]
    assert [run["status"] for run in runs] == ["finished", "finished"]
    assert runs[0]["run_id"] != runs[1]["run_id"]
    assert [run["sweep"] for run in runs] == ["sweep", "sweep"]
    assert "warning" not in done.stderr

    from mlflow import MlflowClient  # takes seconds

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("bitplan/digits")
    parents = client.search_runs([experiment.experiment_id], "tags.role = 'search'")
    assert {run.data.tags["bitplan.run_id"] for run in parents} == {run["run_id"] for run in runs}
    assert {run.info.status for run in parents} == {"FINISHED"}

    table = rows(tmp_path)
    assert [(row["job"], row["seed"], row["status"], row["known"]) for row in table] == [
        ("0", "0", "finished", ""),
        ("1", "1", "finished", ""),
    ]
    assert "seed=0" in done.stdout
    assert "sweep.csv" in done.stdout


@pytest.mark.system
def test_a_failed_job_leaves_the_others_be_and_a_directory_used_again_says_so(tmp_path: Path) -> None:
    first = sweep(tmp_path, "tracking=none", "budget.average_weight_bits=1,4")
    assert first.returncode == 2, first.stdout + first.stderr
    assert "job 0 failed: budget.average_weight_bits=1 cannot be met" in first.stdout
    assert "error: 1 of 2 jobs failed" in first.stderr
    assert "Traceback" not in first.stdout + first.stderr
    assert [(row["status"], row["known"]) for row in rows(tmp_path)] == [("failed", ""), ("finished", "")]

    again = sweep(tmp_path, "tracking=none", "budget.average_weight_bits=6,4")
    assert again.returncode == 2, again.stdout + again.stderr
    assert "holds a run with budget.average_weight_bits=1.0, and now budget.average_weight_bits=6.0" in again.stdout
    assert [row["status"] for row in rows(tmp_path)] == ["failed", "finished"]
    assert rows(tmp_path)[1]["known"] == "finished"
    assert "(had finished)" in again.stdout


def config(folder: Path, job: int) -> Any:
    sweep = {"dir": str(folder)}
    hydra = {"sweep": sweep, "runtime": {"output_dir": str(folder / str(job))}, "job": {"num": job}}
    return OmegaConf.create({"hydra": {**hydra, "overrides": {"task": ["strategy=tpe", f"seed={job}"]}}})


def ended(error: Exception | None = None) -> JobReturn:
    return JobReturn(status=JobStatus.FAILED if error else JobStatus.COMPLETED, _return_value=error or 0.9)


def begun(folder: Path) -> tuple[SweepCallback, Sweep]:
    callback = SweepCallback()
    callback.on_multirun_start(config(folder, 0))
    return callback, LAUNCHED[-1]


def test_a_summary_is_what_jobs_and_runs_say(tmp_path: Path) -> None:
    callback, launched = begun(tmp_path)
    for job in (0, 1, 2, 3):
        (tmp_path / str(job)).mkdir()
        callback.on_job_start(config(tmp_path, job))
    rundirs.finish(rundirs.start(tmp_path / "0"))
    callback.on_job_end(config(tmp_path, 0), ended())
    callback.on_job_end(config(tmp_path, 1), ended(InfeasibleError("it cannot\nbe met")))
    callback.on_job_end(config(tmp_path, 2), ended(ZeroDivisionError("by zero")))
    jobs = launched.jobs()
    assert [job.status for job in jobs] == ["finished", "failed", "failed", "running"]
    assert [job.reason for job in jobs] == ["", "it cannot; be met", "ZeroDivisionError: by zero", ""]
    assert (jobs[0].verdict, jobs[0].quality, jobs[0].average_weight_bits) == ("met", 0.94, 4.0)
    assert (jobs[0].task, jobs[0].strategy, jobs[0].seed) == ("digits", "solver", 0)
    assert "traceback" in read_job(tmp_path / "2")
    assert "traceback" not in read_job(tmp_path / "1")

    launched.write(jobs)
    written = json.loads((tmp_path / "sweep.json").read_text())["jobs"]
    assert written[1] == jobs[1].to_dict()
    assert written[1]["overrides"] == "strategy=tpe seed=1"


def test_a_job_started_again_by_its_cluster_has_resumed(tmp_path: Path) -> None:
    callback, launched = begun(tmp_path)
    (tmp_path / "0").mkdir()
    callback.on_job_start(config(tmp_path, 0))
    rundirs.start(tmp_path / "0")
    callback.on_job_start(config(tmp_path, 0))
    (job,) = launched.jobs()
    assert (job.starts, job.known) == (2, "resumed")


def test_records_of_an_earlier_launch_do_not_count(tmp_path: Path) -> None:
    earlier, _ = begun(tmp_path)
    for job in (0, 1):
        (tmp_path / str(job)).mkdir()
        earlier.on_job_start(config(tmp_path, job))
    callback, launched = begun(tmp_path)
    callback.on_job_start(config(tmp_path, 1))
    assert [(job.job, job.starts) for job in launched.jobs()] == [(1, 1)]


def test_a_damaged_record_is_written_anew(tmp_path: Path) -> None:
    callback, launched = begun(tmp_path)
    for job in (0, 1):
        (tmp_path / str(job)).mkdir()
        callback.on_job_start(config(tmp_path, job))
    (tmp_path / "0" / "job.json").write_text("")
    assert [job.job for job in launched.jobs()] == [1]
    callback.on_job_start(config(tmp_path, 0))
    callback.on_job_end(config(tmp_path, 0), ended())
    assert [job.job for job in launched.jobs()] == [0, 1]


def test_settings_are_shown_as_they_were_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Brackets are no markup."""
    callback, launched = begun(tmp_path / "od [/x] [bold]y")
    for job in (0, 1):
        folder = launched.directory / str(job)
        folder.mkdir(parents=True)
        callback.on_job_start(config(launched.directory, job))
        record = read_job(folder)
        write_json(folder / "job.json", record | {"overrides": ["seed=0", f"space.weight=[int{job + 2},int8]"]})
    print_sweep(launched, launched.jobs(), make_console())
    shown = capsys.readouterr().out
    assert "od [/x] [bold]y" in shown
    assert all(f"space.weight=[int{bits},int8]" in shown for bits in (2, 3))


def test_outside_a_sweep_nothing_is_written(tmp_path: Path) -> None:
    callback = SweepCallback()
    callback.on_job_start(config(tmp_path, 0))
    callback.on_job_end(config(tmp_path, 0), ended())
    assert not list(tmp_path.iterdir())


def test_what_a_lost_job_said_itself_is_kept(tmp_path: Path) -> None:
    callback, launched = begun(tmp_path)
    (tmp_path / "0").mkdir()
    callback.on_job_start(config(tmp_path, 0))
    callback.on_job_end(config(tmp_path, 0), ended(InfeasibleError("no")))
    assert note_lost(tmp_path / "0", launched, 0, ["seed=0"], "Slurm says FAILED") == "no"
    assert note_lost(tmp_path / "1", launched, 1, ["seed=1"], "Slurm says NODE_FAIL") == "Slurm says NODE_FAIL"
    assert [job.status for job in launched.jobs()] == ["failed", "lost"]
    write_json(tmp_path / "1" / "run.json", {"status": "interrupted"})  # stopped in good order, by scancel
    assert JobSummary.read(tmp_path / "1", tmp_path).status == "interrupted"


def test_the_command_fails_after_its_summary(tmp_path: Path) -> None:
    console = Console(record=True, width=120, file=StringIO())

    def launch(error: Exception | None) -> None:
        with summarized(console):
            callback, _ = begun(tmp_path)
            (tmp_path / "0").mkdir(exist_ok=True)
            callback.on_job_start(config(tmp_path, 0))
            callback.on_job_end(config(tmp_path, 0), ended(error))
            if error:
                raise error  # as Hydra's sweeper does

    with pytest.raises(SweepError, match="1 of 1 jobs failed"):
        launch(InfeasibleError("no"))
    assert "job 0 failed: no" in console.export_text()
    with pytest.raises(RuntimeError, match="nothing was launched"), summarized(console):
        raise RuntimeError("nothing was launched")


@pytest.mark.parametrize(("launcher", "extra"), [("joblib", "joblib"), ("submitit_slurm", "slurm")])
def test_a_plug_in_that_is_missing_is_named(launcher: str, extra: str) -> None:
    said = launcher_missing(f"In 'hydra/launcher/x': Could not load 'hydra/launcher/{launcher}'.")
    assert said
    assert f"bitplan[{extra}]" in said
    assert launcher_missing("Could not load 'task/dogs'") is None
