"""The run directory: one process at a time, one set of settings, files that come back."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pandas as pd
import pytest
from tiny import TinyTask, make_bench, tiny_plan

from hwmodels import Precision, StorageModel
from search.budget import Budget
from search.errors import ConfigError, DataError, InfeasibleError
from search.job import Job, SpaceSettings
from search.policy import Policy
from search.quality.evaluate import Quality
from search.run import search
from search.rundir import RunDirectory, flat
from search.strategies.baselines import RandomSearch

CONFIG = {"seed": 0, "budget": {"size_ratio": 0.14, "latency_s": None}, "space": {"weight": ["int4"], "pins": {}}}


def claim(path: Path) -> str:
    try:
        RunDirectory(path).claim()
    except ConfigError as error:
        return str(error)
    return "claimed"


def test_a_second_process_is_kept_out(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.claim()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert "another search is running in" in pool.apply(claim, (run.path,))
        assert "another search is running in" in claim(run.path)
        run.release()
        assert pool.apply(claim, (run.path,)) == "claimed"


def test_a_dead_process_holds_no_claim(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=claim, args=(tmp_path,))
    process.start()
    process.join()
    assert claim(tmp_path) == "claimed"


def test_resuming_needs_the_same_settings(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert not run.resume(CONFIG)
    run.update(config=CONFIG, status="running", run_id="a" * 32, started=1.0)
    assert run.resume(CONFIG)
    assert run.resume({**CONFIG, "tracking": {"enabled": False}, "run_dir": "elsewhere"})
    assert run.resume({**CONFIG, "space": {"weight": ("int4",), "pins": {}}}), "as JSON sees them"
    for change, message in (
        ({"seed": 1}, "holds a run with seed=0, and now seed=1"),
        (
            {"budget": {"size_ratio": 0.2, "latency_s": None}},
            r"budget\.size_ratio=0.14, and now budget\.size_ratio=0.2",
        ),
        ({"space": {"weight": ["int4", "int8"], "pins": {}}}, r"space\.weight=\['int4'\]"),
        ({"space": {"weight": ["int4"], "pins": {"first": "int8"}}}, r"space\.pins"),
        ({"new": 1}, "with new=None, and now new=1"),
    ):
        with pytest.raises(ConfigError, match=message):
            run.resume({**CONFIG, **change})


def test_flat() -> None:
    assert flat(CONFIG) == {
        "seed": 0,
        "budget.size_ratio": 0.14,
        "budget.latency_s": None,
        "space.weight": ["int4"],
        "space.pins": {},
    }


def test_files_come_back(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    with pytest.raises(DataError, match=r"is no run directory: it has no run.json"):
        RunDirectory.existing(tmp_path)
    run.update(a=1)
    run.update(b=2)
    assert RunDirectory.existing(tmp_path).info() == {"a": 1, "b": 2}
    table = pd.DataFrame({"x": [1, 2], "y": [0.5, None]})
    for name in ("front.csv", "costs.parquet"):
        assert run.table(name) is None
        run.write_table(name, table)
        pd.testing.assert_frame_equal(run.table(name), table)
    run.write_layers([{"name": "a"}])
    assert run.layers() == [{"name": "a"}]
    assert run.plan() is None
    assert run.trials() == []


def test_plan_comes_back(tmp_path: Path) -> None:
    bench = make_bench()
    plan = tiny_plan(bench, tmp_path, Policy.uniform(bench.network, Precision.parse("int8/uint8")))
    plan.save(tmp_path / "plan.json")
    assert RunDirectory(tmp_path).plan() == plan


def test_measurements_are_kept(tmp_path: Path) -> None:
    quality = Quality(0.9, 10, 0.05, 0.01, 0.09)
    log = RunDirectory(tmp_path).measurements()
    assert log.get("abc") is None
    assert log.add("abc", quality) is quality
    assert RunDirectory(tmp_path).measurements().get("abc") == quality


def job(path: Path, **options) -> Job:
    settings = {"budget": Budget(size_ratio=0.25), "seed": 0} | options
    config = {"budget": settings["budget"].given(), "seed": settings["seed"]}
    space = SpaceSettings(["int2", "int4", "int8"], ["uint8"])
    return Job(TinyTask(), StorageModel(), RandomSearch(4), run_dir=path, space=space, config=config, **settings)


def test_a_refused_resume_leaves_a_finished_run_alone(tmp_path: Path) -> None:
    result = search(job(tmp_path))
    assert result.run.info()["status"] == "finished"
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConfigError, match="holds a run with seed=0, and now seed=1"):
        search(job(tmp_path, seed=1))
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files
    again = search(job(tmp_path))
    assert again.plan == result.plan
    assert (tmp_path / "plan.json").read_bytes() == files["plan.json"]
    assert (tmp_path / "trials.jsonl").read_bytes() == files["trials.jsonl"], "nothing is measured again"


def test_a_failed_run_says_so(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError):
        search(job(tmp_path, budget=Budget(size_ratio=0.01)))
    assert RunDirectory(tmp_path).info()["status"] == "failed"
    assert claim(tmp_path) == "claimed", "the directory is free again"
