"""Runs and scores of several machines in one folder: the one further on stays, nothing is lost, nothing made up."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rundirs import MEASURED, finish, measure, start
from tiny import TinyTask

from hwmodels import StorageModel
from search.budget import Budget
from search.cli import main
from search.errors import ConfigError, DataError, FileError
from search.files import JsonLines
from search.job import Job, Result, SpaceSettings
from search.merging import Merged, merge
from search.run import search
from search.rundir import RunDirectory, find_runs
from search.strategies.baselines import RandomSearch
from search.trials import Trial

A, B = "a" * 32, "b" * 32


def contents(folder: Path) -> dict[str, bytes]:
    """Every file but those that say who works there."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def counts(done: Merged) -> tuple[int, int, int, int]:
    return done.new, done.updated, done.same, len(done.refused)


def run_at(path: Path, trials: int, run_id: str = A, status: str = "interrupted") -> RunDirectory:
    run = start(path, run_id)
    measure(run, MEASURED[:trials])
    run.update(status=status)
    return run


def keep(root: Path, policy: str, values: list[float | None], seconds: float = 1.0) -> Path:
    """Writes a file of the evaluation store; None is not measured."""
    path = root / "evaluations" / "task" / "quantizer" / "selection" / f"{policy}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    measured = np.array([value is not None for value in values])
    scores = np.array([value for value in values if value is not None])
    with path.open("wb") as file:
        np.savez_compressed(file, scores=scores, measured=measured, seconds=np.array(seconds))
    return path


@pytest.fixture
def into(tmp_path: Path) -> Path:
    return tmp_path / "all"


def test_runs_of_two_machines_come_together(tmp_path: Path, into: Path) -> None:
    finish(run_at(tmp_path / "one" / "day" / "x", 5))
    run_at(tmp_path / "two" / "day" / "y", 2, B)
    before = contents(tmp_path)
    done = merge([tmp_path / "one", tmp_path / "two"], into)
    assert counts(done) == (2, 0, 0, 0)
    assert [run.path for run in find_runs([into])] == [into / "day" / "x", into / "day" / "y"]
    for root, name in (("one", "x"), ("two", "y")):
        here, there = contents(tmp_path / root / "day" / name), contents(into / "day" / name)
        told = json.loads(there.pop("run.json"))
        assert told == json.loads(here.pop("run.json")) | {"run_root": str(into)}
        assert there == here
    assert done.bytes == sum(map(len, contents(tmp_path / "one").values())) + sum(
        map(len, contents(tmp_path / "two").values())
    )
    assert {name: before[name] for name in before} == {
        name: content for name, content in contents(tmp_path).items() if not name.startswith("all")
    }, "sources are only read"
    merged = contents(into)
    assert counts(merge([tmp_path / "one", tmp_path / "two"], into)) == (0, 0, 2, 0)
    assert contents(into) == merged, "merging twice changes nothing"


@pytest.mark.parametrize("order", [(2, 4), (4, 2)])
def test_of_one_run_in_two_places_the_one_further_on_stays(tmp_path: Path, into: Path, order: tuple[int, int]) -> None:
    for number, trials in enumerate(order):
        run_at(tmp_path / str(number) / "run", trials)
    done = merge([tmp_path / "0", tmp_path / "1"], into)
    assert counts(done) == ((1, 1, 0, 0) if order == (2, 4) else (1, 0, 1, 0))
    assert RunDirectory(into / "run").trials() == MEASURED[:4]


def test_with_the_same_trials_the_finished_run_stays(tmp_path: Path, into: Path) -> None:
    run_at(tmp_path / "cut" / "run", 5)
    finish(run_at(tmp_path / "whole" / "run", 5))
    assert counts(merge([tmp_path / "cut", tmp_path / "whole"], into)) == (1, 1, 0, 0)
    assert counts(merge([tmp_path / "cut"], into)) == (0, 0, 1, 0)
    assert RunDirectory(into / "run").info()["status"] == "finished"
    assert RunDirectory(into / "run").plan() == RunDirectory(tmp_path / "whole" / "run").plan()


def test_what_came_after_the_end_is_taken_over(tmp_path: Path, into: Path) -> None:
    run = run_at(tmp_path / "one" / "run", 5, status="finished")
    merge([tmp_path / "one"], into)
    run.file("report.html").write_text("late")
    assert counts(merge([tmp_path / "one"], into)) == (0, 1, 0, 0)
    assert (into / "run" / "report.html").read_text() == "late"
    assert counts(merge([tmp_path / "one"], into)) == (0, 0, 1, 0)


def test_a_run_that_went_different_ways_is_refused_and_both_are_named(tmp_path: Path, into: Path) -> None:
    run_at(tmp_path / "one" / "run", 3)
    other = run_at(tmp_path / "two" / "run", 2)
    measure(other, [replace(MEASURED[3], number=2)])
    run_at(tmp_path / "two" / "good", 1, B)
    done = merge([tmp_path / "one", tmp_path / "two"], into)
    assert counts(done) == (2, 0, 0, 1)
    assert str(into / "run") in done.refused[0]
    assert str(tmp_path / "two" / "run") in done.refused[0]
    assert RunDirectory(into / "run").trials() == MEASURED[:3]


def test_two_sweeps_of_one_name_lie_side_by_side(tmp_path: Path, into: Path) -> None:
    run_at(tmp_path / "one" / "sweep" / "0", 1, A)
    run_at(tmp_path / "two" / "sweep" / "0", 2, B)
    for _ in range(2):
        merge([tmp_path / "one", tmp_path / "two"], into)
    assert [len(RunDirectory(into / "sweep" / name).trials()) for name in ("0", f"0-{B[:8]}")] == [1, 2]
    assert len(find_runs([into])) == 2


def test_a_run_directory_may_be_a_source(tmp_path: Path, into: Path) -> None:
    run_at(tmp_path / "one" / "run", 1)
    assert counts(merge([tmp_path / "one" / "run"], into)) == (1, 0, 0, 0)
    assert len(RunDirectory(into / "run").trials()) == 1


def test_the_file_with_more_scores_stays(tmp_path: Path, into: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    keep(one, "less", [1.0, None, None])
    more = keep(two, "less", [1.0, 0.0, None])
    most = keep(one, "more", [1.0, 0.0, np.nan])
    keep(two, "more", [1.0, None, np.nan])
    same = keep(one, "same", [1.0], seconds=1)
    keep(two, "same", [1.0], seconds=2)
    done = merge([one, two], into)
    assert (done.evaluations, done.refused) == (4, [])
    folder = into / "evaluations" / "task" / "quantizer" / "selection"
    for name, expected in (("less", more), ("more", most), ("same", same)):
        assert (folder / f"{name}.npz").read_bytes() == expected.read_bytes()


def test_scores_that_contradict_each_other_are_refused(tmp_path: Path, into: Path) -> None:
    kept = keep(tmp_path / "one", "p", [1.0, None])
    keep(tmp_path / "two", "p", [0.0, 1.0])
    done = merge([tmp_path / "one", tmp_path / "two"], into)
    assert "different scores of one policy" in done.refused[0]
    assert next(into.rglob("p.npz")).read_bytes() == kept.read_bytes()


def test_damaged_scores_are_left_out_and_replaced(tmp_path: Path, into: Path) -> None:
    keep(tmp_path / "one", "p", [1.0]).write_bytes(b"PK torn")
    good = keep(tmp_path / "two", "p", [1.0])
    done = merge([tmp_path / "one", tmp_path / "two"], into)
    assert "is damaged" in done.refused[0]
    place = into / good.relative_to(tmp_path / "two")
    assert place.read_bytes() == good.read_bytes()
    place.write_bytes(b"PK torn")
    assert merge([tmp_path / "two"], into).evaluations == 1
    assert place.read_bytes() == good.read_bytes()


def test_tables_are_added_whole(tmp_path: Path, into: Path) -> None:
    table = tmp_path / "one" / "scores" / "digest"
    table.mkdir(parents=True)
    (table / "sensitivity.npz").write_bytes(b"table")
    (table / "made_from.json").write_text("{}")
    assert merge([tmp_path / "one"], into).tables == 1
    assert contents(into / "scores") == contents(tmp_path / "one" / "scores")
    (table / "sensitivity.npz").write_bytes(b"computed in another order")
    assert merge([tmp_path / "one"], into).tables == 0
    assert (into / "scores" / "digest" / "sensitivity.npz").read_bytes() == b"table"


def test_shards_of_workers_are_joined(tmp_path: Path, into: Path) -> None:
    for place, shards in (("one", {"w1": 2, "w2": 3}), ("two", {"w2": 1, "w3": 1, "w1": 4})):
        run = run_at(tmp_path / place / "run", 2)
        for worker, count in shards.items():
            for number in range(count):
                JsonLines(run.file(f"workers/{worker}.jsonl")).append({"worker": worker, "number": number})
    done = merge([tmp_path / "one", tmp_path / "two"], into)
    assert (done.shards, done.refused) == (2, [])
    shards = sorted((into / "run" / "workers").iterdir())
    assert {path.stem: len(JsonLines(path).read()) for path in shards} == {"w1": 4, "w2": 3, "w3": 1}
    run = RunDirectory(tmp_path / "two" / "run")
    run.file("workers/w2.jsonl").write_text('{"worker": "another"}\n')
    measure(run, MEASURED[2:3])
    done = merge([tmp_path / "two"], into)
    assert "contradict each other" in done.refused[0]
    assert len(JsonLines(into / "run" / "workers" / "w2.jsonl").read()) == 3


def test_databases_of_mlflow_are_left_out_and_named(tmp_path: Path, into: Path) -> None:
    run_at(tmp_path / "one" / "run", 1)
    (tmp_path / "one" / "mlflow.db").write_text("database")
    artifacts = tmp_path / "one" / "mlartifacts" / "1" / "of-the-run" / "artifacts"
    shutil.copytree(tmp_path / "one" / "run", artifacts)
    assert len(find_runs([tmp_path / "one"])) == 1, "a copy among MLflow's artifacts is no run"
    done = merge([tmp_path / "one"], into)
    assert counts(done) == (1, 0, 0, 0)
    assert done.left == [tmp_path / "one" / "mlflow.db"]
    assert not (into / "mlflow.db").exists()
    assert not (into / "mlartifacts").exists()


def test_a_dry_run_counts_the_same_and_writes_nothing(tmp_path: Path, into: Path) -> None:
    run_at(tmp_path / "one" / "run", 2)
    run_at(tmp_path / "two" / "run", 4)
    run_at(tmp_path / "two" / "other", 1, B)
    keep(tmp_path / "one", "p", [1.0, None])
    keep(tmp_path / "two", "p", [1.0, 1.0])
    keep(tmp_path / "two", "q", [1.0, 1.0])
    sources = [tmp_path / "one", tmp_path / "two"]
    before = contents(tmp_path)
    foreseen = merge(sources, into, dry_run=True)
    assert contents(tmp_path) == before
    assert not into.exists()
    assert foreseen == merge(sources, into)
    assert counts(foreseen) == (2, 1, 0, 0)
    assert foreseen.evaluations == 3


def test_a_merge_cut_short_anywhere_is_finished_by_the_next(
    tmp_path: Path, into: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file that is put in its place is the last one in turn."""
    finish(run_at(tmp_path / "one" / "run", 5))
    run_at(tmp_path / "old" / "run", 3)
    keep(tmp_path / "one", "p", [1.0])
    whole = tmp_path / "whole"
    merge([tmp_path / "old", tmp_path / "one"], whole)
    expected = contents(whole)
    expected["run.json"] = expected.pop("run/run.json").replace(b"/whole", b"/all")
    for steps in range(100):
        left = iter(range(steps))

        def replace_file(source: Path, target: Path, left: Iterator[int] = left, put=shutil.move) -> None:
            if next(left, None) is None:
                raise OSError(28, "No space left on device")
            put(source, target)

        merge([tmp_path / "old"], into)
        with monkeypatch.context() as patch:
            patch.setattr("search.files.os.replace", replace_file)
            try:
                merge([tmp_path / "one"], into)
            except FileError:
                is_whole = False
            else:
                is_whole = True
        merge([tmp_path / "one"], into)
        found = contents(into)
        found["run.json"] = found.pop("run/run.json")
        assert found == expected
        shutil.rmtree(into)
        if is_whole:
            break
    assert is_whole
    assert steps > 8


@pytest.mark.parametrize(
    ("source", "into", "error", "message"),
    [
        ("missing", "all", DataError, "is no folder"),
        ("empty", "all", DataError, "holds nothing to merge"),
        ("one", "one", ConfigError, "lie in each other"),
        ("one", "one/run", ConfigError, "lie in each other"),
        ("one/run", "one", ConfigError, "lie in each other"),
    ],
)
def test_folders_that_cannot_be_merged(
    tmp_path: Path, source: str, into: str, error: type[Exception], message: str
) -> None:
    run_at(tmp_path / "one" / "run", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(error, match=message):
        merge([tmp_path / source], tmp_path / into)


def test_a_run_at_work_is_not_touched(tmp_path: Path, into: Path) -> None:
    run_at(tmp_path / "old" / "run", 1)
    run_at(tmp_path / "new" / "run", 2)
    merge([tmp_path / "old"], into)
    run = RunDirectory(into / "run")
    run_at(tmp_path / "new" / "other", 1, B)
    before = contents(into / "run")
    run.claim()
    foreseen = merge([tmp_path / "new"], into, dry_run=True)
    done = merge([tmp_path / "new"], into)
    run.release()
    assert done == foreseen, "one run at work keeps nothing else from being merged"
    assert counts(done) == (1, 0, 0, 1)
    assert f"another search is running in {into / 'run'}" in done.refused[0]
    assert f"merge {tmp_path / 'new' / 'run'} again" in done.refused[0]
    assert contents(into / "run") == before
    assert counts(merge([tmp_path / "new"], into)) == (0, 1, 1, 0)


def test_a_damaged_run_is_refused_and_the_others_are_merged(tmp_path: Path, into: Path) -> None:
    run_at(tmp_path / "one" / "bad", 1).file("run.json").write_text("{")
    run_at(tmp_path / "one" / "good", 1, B)
    run_at(tmp_path / "one" / "odd", 1, "c" * 32).file("run.json").write_text('{"status": "finished"}')
    done = merge([tmp_path / "one"], into)
    assert counts(done) == (1, 0, 0, 2)
    assert "bad/run.json, line 1 is damaged" in done.refused[0]
    assert f"run.json of {tmp_path / 'one' / 'odd'} is damaged: it has no run_id" in done.refused[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"run_id": [1]}, "its run_id is [1], and should be a word; "),
        ({"run_id": "../x"}, "its run_id is '../x', and should be a word; "),
        ({"run_id": ""}, "its run_id is '', and should be a word; "),
        ({"status": "weird"}, "its status is 'weird', and should be one of running, failed, interrupted, finished; "),
        ({"status": [1]}, "its status is [1], and should be one of running, failed, interrupted, finished; "),
    ],
)
@pytest.mark.parametrize("is_known", [False, True])
def test_a_run_that_does_not_say_what_it_is_is_refused_alone(
    tmp_path: Path, into: Path, change: dict[str, object], message: str, is_known: bool
) -> None:
    if is_known:
        run_at(tmp_path / "old" / "bad", 1)
        merge([tmp_path / "old"], into)
    bad = run_at(tmp_path / "one" / "bad", 1)
    bad.update(**change)
    run_at(tmp_path / "one" / "good", 1, B)
    done = merge([tmp_path / "one"], into)
    assert counts(done) == (1, 0, 0, 1)
    assert done.refused[0].startswith(f"run.json of {bad.path} is damaged: {message}")


def test_a_damaged_run_where_it_is_merged_to_is_named_and_left(tmp_path: Path, into: Path) -> None:
    run_at(into / "run", 1).update(run_id={})
    run_at(tmp_path / "one" / "run", 1)
    done = merge([tmp_path / "one"], into)
    assert counts(done) == (1, 0, 0, 1)
    assert f"run.json of {into / 'run'} is damaged" in done.refused[0]


def test_a_new_run_goes_where_nothing_is(tmp_path: Path, into: Path) -> None:
    run_at(tmp_path / "one" / "run", 1)
    for name in ("run", f"run-{A[:8]}"):
        (into / name).mkdir(parents=True)
        (into / name / "notes.txt").write_text("mine")
    (into / f"run-{A[:8]}-2").symlink_to("nowhere")
    before = contents(into)
    foreseen = merge([tmp_path / "one"], into, dry_run=True)
    assert foreseen == merge([tmp_path / "one"], into)
    assert counts(foreseen) == (1, 0, 0, 0)
    assert [run.path for run in find_runs([into])] == [into / f"run-{A[:8]}-3"]
    assert before.items() <= contents(into).items()
    assert counts(merge([tmp_path / "one"], into)) == (0, 0, 1, 0)


def test_runs_are_not_merged_into_a_run(tmp_path: Path) -> None:
    run_at(tmp_path / "one" / "run", 1)
    run_at(tmp_path / "two" / "run", 1, B)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match=f"is itself a run.* name the folder that holds it, --into {tmp_path}/two,"):
        merge([tmp_path / "one" / "run"], tmp_path / "two" / "run")
    assert contents(tmp_path) == before


def test_the_command(tmp_path: Path, into: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_at(tmp_path / "one" / "run", 3)
    (tmp_path / "one" / "mlflow.db").write_text("database")
    assert main(["merge", str(tmp_path / "one"), "--into", str(into), "--dry-run"]) == 0
    assert "Would be merged into" in capsys.readouterr().out
    assert not into.exists()
    assert main(["merge", str(tmp_path / "one"), "--into", str(into)]) == 0
    shown = capsys.readouterr().out
    assert "runs new" in shown
    assert "`bitplan sync` rebuilds what it shows" in shown
    measure(run_at(tmp_path / "two" / "run", 2), [replace(MEASURED[3], number=2)])
    assert main(["merge", str(tmp_path / "two"), "--into", str(into)]) == 2
    assert "went different ways" in capsys.readouterr().err


def searched(root: Path, name: str, seed: int, seen: list[Trial], evaluations: int = 6) -> Result:
    """A search whose run root is `root`; `seen` takes the trials that were measured, not known."""
    from search.progress import Progress

    class Seen(Progress):
        def trial(self, trial: Trial, known: bool) -> None:
            seen.extend([] if known else [trial])

    config = {"seed": seed, "evaluations": evaluations}
    space = SpaceSettings(["int2", "int4", "int8"], ["uint4", "uint8"])
    job = Job(
        TinyTask(),
        StorageModel(),
        RandomSearch(evaluations),
        Budget(size_ratio=0.25),
        root / name,
        space=space,
        seed=seed,
        store=root,
        config=config,
    )
    return search(job, Seen())


def test_a_search_on_the_merged_root_is_served_by_both_stores(tmp_path: Path, into: Path) -> None:
    measured: dict[str, list[Trial]] = {"one": [], "two": [], "third": [], "again": []}
    plans = [
        searched(tmp_path / name, f"run-{name}", seed, measured[name]).plan for name, seed in (("one", 0), ("two", 1))
    ]
    digests = [{trial.digest for trial in measured[name] if trial.is_measured} for name in ("one", "two")]
    assert digests[0] - digests[1]
    assert digests[1] - digests[0], "each has what the other lacks"
    done = merge([tmp_path / "one", tmp_path / "two"], into)
    assert counts(done) == (2, 0, 0, 0)
    for name, seed, plan in (("one", 0, plans[0]), ("two", 1, plans[1])):
        again = searched(into, f"again-{name}", seed, measured["third"])
        assert [trial for trial in measured["third"] if trial.is_measured] == []
        assert again.plan.digest == plan.digest
        assert again.plan.quality == plan.quality
    resumed = searched(into, "run-two", 1, measured["again"])
    assert resumed.plan == plans[1], "a merged run is resumed by its own command"
    assert measured["again"] == []
