# Two jobs of a sweep side by side: each its own directory, one MLflow store between them.
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra_plugins.hydra_joblib_launcher", reason="needs the extra `joblib`")


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # MLflow's own, on every query
def test_two_jobs_at_once_do_not_collide(tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "search", "-m", "hydra/launcher=local", "strategy=random", "strategy.evaluations=3"),
        *("seed=0,1", "space.input=[uint8]", f"run_root={tmp_path}/runs", f"run_dir={tmp_path}/runs/sweep"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    runs = [json.loads((tmp_path / "runs" / "sweep" / str(job) / "run.json").read_text()) for job in (0, 1)]
    assert [run["seed"] for run in runs] == [0, 1]
    assert [run["status"] for run in runs] == ["finished", "finished"]
    assert runs[0]["run_id"] != runs[1]["run_id"]
    assert "warning" not in done.stderr

    from mlflow import MlflowClient  # takes seconds

    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("bitplan/digits")
    parents = client.search_runs([experiment.experiment_id], "tags.role = 'search'")
    assert {run.data.tags["bitplan.run_id"] for run in parents} == {run["run_id"] for run in runs}
    assert {run.info.status for run in parents} == {"FINISHED"}
