"""Many workers on one search: the same course and the same plan, nothing lost, nothing done twice, whoever dies."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch

from search import preparation
from search.cli import main
from search.commands.worker import rebuilt
from search.config import compose, make_job
from search.errors import BitplanError, ConfigError
from search.files import write_json
from search.job import Job
from search.progress import Progress
from search.run import search
from search.trials import Trial, TrialLog
from search.workers import crew, hands, worker
from search.workers.folder import FolderBoard
from search.workers.hands import OtherAnswersError
from search.workers.opening import open_board
from search.workers.worker import Worker

SPACE = ["space.weight=[int2,int4,int8]", "space.input=[uint4,uint8]"]
SETTINGS = ["tracking=none", "task=custom", "hardware=storage", "budget.size_ratio=0.25", *SPACE]
DEADLINE_S = 120.0


def settings(task: str = "slowly.SlowTask", *more: str) -> list[str]:
    return [*SETTINGS, f"task._target_={task}", *more]


def job_of(folder: Path, *more: str, task: str = "slowly.SlowTask") -> Job:
    given = settings(task, *more, f"run_dir={folder / 'run'}", f"run_root={folder}")
    return make_job(compose(given), folder / "run")


def wait_until(holds: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := holds()):
        assert time.monotonic() < deadline, what
        time.sleep(0.01)
    return found


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Has workers be noticed in a moment; leaves torch as it was, whose settings threads of one process share."""
    monkeypatch.setattr(hands, "BEAT_S", 0.02)
    monkeypatch.setattr(worker, "BEAT_S", 0.02)
    monkeypatch.setattr(crew, "LOOK_S", 0.01)
    was_fast = torch.backends.mha.get_fastpath_enabled()
    yield
    torch.backends.mha.set_fastpath_enabled(was_fast)


class Joined:
    """A worker in a thread of this process, which joins a run when it begins."""

    def __init__(self, run_dir: Path, name: str = "other", where: Any = None, sees_run: bool = True) -> None:
        self.said: list[str] = []
        self.error: Exception | None = None
        board = where or FolderBoard(run_dir / "workers" / "board")
        seen = run_dir if sees_run else None
        self._worker = Worker(board, name, rebuilt, seen, patience_s=DEADLINE_S, say=self.said.append)
        self._thread = Thread(target=self._work, daemon=True)

    def _work(self) -> None:
        try:
            self._worker.work()
        except Exception as error:
            self.error = error

    def __enter__(self) -> Joined:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


def awaiting(job: Job, workers: int = 1) -> Job:
    """The same job, whose strategy begins when so many others are there."""
    begin, strategy = job.strategy.search, job.strategy

    def begin_together(space: Any, objective: Any, rng: np.random.Generator) -> None:
        wanted = 1 + crew.AHEAD * (workers + 1)
        wait_until(lambda: objective._evaluator.foresight >= wanted, "no worker came")
        begin(space, objective, rng)

    strategy.search = begin_together  # type: ignore[method-assign]
    return job


def tried(run_dir: Path) -> list[dict[str, Any]]:
    """The trials without what depends on the machine's speed."""
    untimed = {"seconds": 0, "proposing_seconds": 0}
    return [trial.to_dict() | untimed for trial in TrialLog(run_dir / "trials.jsonl").trials]


def finished(run_dir: Path) -> dict[str, list[str]]:
    """The keys of what everybody finished, by who did."""
    shards = sorted((run_dir / "workers").glob("*.jsonl"))
    rows = {shard.stem: map(json.loads, shard.read_text().splitlines()) for shard in shards}
    return {name: [row["key"] for row in found if row["event"] == "finished"] for name, found in rows.items()}


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def assert_same(run_dir: Path, other: Path) -> None:
    assert tried(run_dir) == tried(other)
    for name in ("plan.json", "plan.safetensors", "report.jsonl"):
        assert (run_dir / name).read_bytes() == (other / name).read_bytes(), name
    assert scores(run_dir) == scores(other)


def scores(run_dir: Path) -> dict[str, bytes]:
    """The sensitivity table, to the last bit."""
    path = run_dir / "sensitivity.npz"
    if not path.is_file():
        return {}
    with np.load(path, allow_pickle=False) as arrays:
        return {name: arrays[name].tobytes() for name in arrays}


@pytest.mark.parametrize(
    "given",
    [
        ["strategy=random", "strategy.evaluations=15"],
        ["strategy=exhaustive", "space.weight=[int4,int8]", "strategy.evaluations=20", "budget.size_ratio=0.3"],
        ["strategy=evolution", "strategy.evaluations=12"],
        ["strategy=solver", "strategy.evaluations=12", "strategy.batch=3"],
        ["strategy=tpe", "strategy.evaluations=12", "strategy.batch=4", "strategy.startup=4"],
        ["strategy=random", "strategy.evaluations=15", "racing=default", "racing.first=16"],
        ["strategy=random", "strategy.evaluations=8", "recover.before=[bias_correction]", "quantizer.repair=auto"],
    ],
    ids=lambda given: "-".join(item.partition("=")[2] for item in given[:3:2]),
)
def test_the_course_is_the_same_with_any_number_of_workers(given: list[str], tmp_path: Path) -> None:
    alone, run_dir = tmp_path / "alone", tmp_path / "many" / "run"
    few = {"strategy=solver", "strategy=tpe"} & {*given}  # at a time, of which little would be left to others
    task = "slowly.Steady" if few else "slowly.SlowTask"
    search(job_of(alone, *given, task=task))
    with Joined(run_dir, "first") as first, Joined(run_dir, "second") as second:
        search(awaiting(job_of(tmp_path / "many", *given, task=task), 2))
    assert first.error is second.error is None
    assert_same(run_dir, alone / "run")
    done = finished(run_dir)
    keys = [key for one in done.values() for key in one]
    assert len(keys) == len(set(keys)), "something was done twice"
    assert any(key.startswith("measure-") for name in ("first", "second") for key in done.get(name, ()))
    assert any(key.startswith("score-") for key in keys) == bool(scores(run_dir))
    events = [json.loads(line)["event"] for line in lines(run_dir / "log.jsonl")]
    assert events.count("worker_joined") == 2


def test_a_worker_that_has_only_the_study_sends_what_it_measured_and_scored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spread = crew.Crew._spread

    def spread_together(self: crew.Crew, *given: Any) -> None:
        wait_until(self._look, "no worker came")
        spread(self, *given)

    monkeypatch.setattr(crew.Crew, "_spread", spread_together)
    alone, run_dir, study = tmp_path / "alone", tmp_path / "many" / "run", str(tmp_path / "study.journal")
    given = ["strategy=solver", "strategy.evaluations=10", "strategy.batch=4"]
    search(job_of(alone, *given, task="slowly.Steady"))
    with Joined(run_dir, where=open_board(study), sees_run=False) as joined:
        search(awaiting(job_of(tmp_path / "many", *given, f"study={study}", task="slowly.Steady")))
    assert joined.error is None
    assert_same(run_dir, alone / "run")
    assert sum("measured policy" in line for line in joined.said) > 0
    assert sum("choices in" in line for line in joined.said) > 0
    assert not (run_dir / "workers" / "board").exists()


def test_a_task_that_cannot_be_told_from_others_is_shared_within_its_run(tmp_path: Path) -> None:
    given = ["strategy=random", "strategy.evaluations=12"]
    run_dir = tmp_path / "many" / "run"
    search(job_of(tmp_path / "alone", *given, task="slowly.Unheard"))
    with Joined(run_dir) as joined:
        search(awaiting(job_of(tmp_path / "many", *given, task="slowly.Unheard")))
    assert joined.error is None
    assert_same(run_dir, tmp_path / "alone" / "run")
    assert finished(run_dir)["other"]
    assert list((run_dir / "evaluations").glob("*/*/selection/*.npz"))
    assert not (tmp_path / "many" / "evaluations").exists()


def test_what_answers_differently_every_time_cannot_be_shared(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"answers differently every time.*leave workers=1"):
        search(job_of(tmp_path, "strategy=random", "workers=2", task="slowly.Fickle"))


def test_a_search_made_from_python_cannot_be_shared(tmp_path: Path) -> None:
    job = replace(job_of(tmp_path, "strategy=random"), workers=2, config={"model": "TinyNet"})
    with pytest.raises(ConfigError, match=r"called from Python.*workers=1.*bitplan search"):
        search(job)


def test_a_machine_that_computes_otherwise_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks at what the networks answer before it claims anything."""
    run_dir, given = tmp_path / "run", ["strategy=random", "strategy.evaluations=6"]
    genuine = preparation.open_store
    here = threading.current_thread()

    def differing(*arguments: Any) -> Any:
        store = genuine(*arguments)
        if threading.current_thread() is not here:
            about = store.about | {"answers": "others"}
            store.folder = store.folder.with_name("others")
            write_json(store.folder / "about.json", about)
        return store

    monkeypatch.setattr(preparation, "open_store", differing)
    job = job_of(tmp_path, *given)
    begin, joined = job.strategy.search, Joined(run_dir)

    def begin_later(space: Any, objective: Any, rng: np.random.Generator) -> None:
        wait_until(lambda: joined.error, "the worker was not refused")
        begin(space, objective, rng)

    job.strategy.search = begin_later  # type: ignore[method-assign]
    with joined:
        search(job)
    assert isinstance(joined.error, OtherAnswersError)
    assert "other last digits" in str(joined.error)
    assert "other" not in finished(run_dir)


def test_where_there_is_no_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["worker"]) == 2
    assert main(["worker", str(tmp_path / "none")]) == 2
    run_dir = tmp_path / "run"
    search(job_of(tmp_path, "strategy=random", "strategy.evaluations=3"))
    assert main(["worker", str(run_dir)]) == 2
    assert main(["worker", str(run_dir), "--name", "a b"]) == 2
    assert main(["worker", "--study", str(tmp_path / "none.journal"), "--patience", "0.1"]) == 2
    said = capsys.readouterr().err.splitlines()
    for line, part in zip(
        said,
        [
            "bitplan worker RUN_DIR, or",
            "is no run directory",
            "is finished",
            "letters, digits",
            "no search that is under way gave a sign",
        ],
        strict=True,
    ):
        assert line.startswith("error: ")
        assert part in line


class Trouble(Progress):
    """Makes trouble after so many trials."""

    def __init__(self, after: int, make: Callable[[], None]) -> None:
        self.notices: list[str] = []
        self._left, self._make = after, make

    def trial(self, trial: Trial, known: bool) -> None:
        self._left -= 1
        if not self._left:
            self._make()

    def notice(self, text: str) -> None:
        self.notices.append(text)


def test_a_board_that_is_lost_costs_the_workers_and_not_the_search(tmp_path: Path) -> None:
    given, run_dir = ["strategy=random", "strategy.evaluations=12"], tmp_path / "many" / "run"
    search(job_of(tmp_path / "alone", *given))
    board = run_dir / "workers" / "board"

    def lose() -> None:
        board.rename(run_dir / "lost")
        board.touch()

    trouble = Trouble(4, lose)
    with Joined(run_dir) as joined:
        search(awaiting(job_of(tmp_path / "many", *given)), trouble)
    assert isinstance(joined.error, OSError | BitplanError)
    assert_same(run_dir, tmp_path / "alone" / "run")
    assert [text for text in trouble.notices if "goes on without workers" in text]


@pytest.mark.system
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a thread's connection outlives it
def test_a_database_restarts_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from postgres import running_postgres

    monkeypatch.setattr(hands, "BEAT_S", 0.2)
    monkeypatch.setattr(crew, "LOOK_S", 0.1)
    given = ["strategy=solver", "strategy.evaluations=16", "strategy.batch=4"]
    search(job_of(tmp_path / "alone", *given))
    with running_postgres("fsync=off") as server:
        study = server.make_database()

        def restart() -> None:
            server.stop("immediate")
            server.start()

        trouble = Trouble(5, restart)
        with Joined(tmp_path, where=open_board(study), sees_run=False) as joined:
            search(awaiting(job_of(tmp_path / "many", *given, f"study='{study}'")), trouble)
    assert joined.error is None
    assert not trouble.notices
    assert_same(tmp_path / "many" / "run", tmp_path / "alone" / "run")
    assert "the search needs no more" in joined.said[-1]
    gc.collect()


# --- real processes ---


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    """Begins a search in a process of its own, in a session of its own as on another terminal; slow until `hurry`."""
    given = settings("slowly.SlowTask", "strategy=random", "strategy.evaluations=30", *more)
    return command(folder, "slowly", *given, f"run_root={folder}", f"run_dir={folder / 'run'}")


def command(folder: Path, *words: str) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent), "HURRY": str(folder / "hurry")}
    return subprocess.Popen(
        [sys.executable, "-m", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def hurry(folder: Path) -> None:
    (folder / "hurry").touch()


def outcome(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 0, output
    return output


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def ready(run_dir: Path) -> int:
    """The process of the worker that the search started, once it is ready."""
    board = FolderBoard(run_dir / "workers" / "board").workers()
    return next((facts["process"] for name, facts in board.items() if "local" in name and facts["is_ready"]), 0)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    search(job_of(folder, "strategy=random", "strategy.evaluations=30"))
    return folder / "run"


@pytest.mark.system
def test_a_worker_is_killed_and_the_plan_is_the_same(undisturbed: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    process = start(tmp_path, "workers=2")
    victim = wait_until(lambda: ready(run_dir), "no worker was ready")
    wait_until(lambda: list((run_dir / "workers" / "board" / "claimed").glob("*~local-*")), "it claimed nothing")
    os.kill(victim, signal.SIGKILL)
    hurry(tmp_path)
    outcome(process)
    assert_same(run_dir, undisturbed)
    events = [json.loads(line)["event"] for line in lines(run_dir / "log.jsonl")]
    assert events.count("worker_joined") == events.count("worker_lost") == 1
    done = [key for one in finished(run_dir).values() for key in one]
    assert len(done) == len(set(done))
    assert not list((run_dir / "workers" / "board" / "claimed").iterdir())


@pytest.mark.system
def test_the_search_is_killed_and_goes_on_with_its_workers(undisturbed: Path, tmp_path: Path) -> None:
    """The worker that it started leaves with it; the one that joined from elsewhere stays."""
    run_dir = tmp_path / "run"
    process = start(tmp_path, "workers=2")
    wait_until((run_dir / "run.json").exists, "the search did not begin")
    guest = command(tmp_path, "search", "worker", str(run_dir), "--name", "guest")
    own = wait_until(lambda: ready(run_dir), "no worker was ready")
    wait_until(lambda: finished(run_dir).get("guest"), "the guest did nothing")
    before = wait_until(lambda: lines(run_dir / "trials.jsonl")[:-1], "nothing was measured")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    done = {key for one in finished(run_dir).values() for key in one}
    again = start(tmp_path)
    hurry(tmp_path)
    outcome(again)
    assert not is_alive(own), "what the search had started stayed"
    assert "the search needs no more" in outcome(guest)
    assert_same(run_dir, undisturbed)
    assert lines(run_dir / "trials.jsonl")[: len(before)] == before, "measured again"
    after = [key for one in finished(run_dir).values() for key in one]
    assert len(after) == len(set(after)), "what was done before the kill was done again"
    assert done < set(after)
