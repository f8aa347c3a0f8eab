"""Boards: what every one fulfils, many processes at once, kills at any moment, and a database that comes and goes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from board_worker import board_at
from conformance import ABOUT, WORKS, BoardContract, drained, eventually, found
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from postgres import PASSWORD, PostgresServer, running_postgres

from search.errors import BitplanError, ConfigError, DataError
from search.storages import is_outage, mending_lock
from search.workers.board import Board, Outcome, Work
from search.workers.folder import FolderBoard
from search.workers.opening import open_board, study_of
from search.workers.study import StudyBoard
from search.workers.watch import LOOKS, Watch

HERE = Path(__file__).parent


class TestFolderBoard(BoardContract):
    @pytest.fixture
    def make_board(self, tmp_path):
        return lambda: FolderBoard(tmp_path / "run" / "workers" / "board")


class TestJournalBoard(BoardContract):
    @pytest.fixture
    def make_board(self, tmp_path):
        return lambda: StudyBoard(str(tmp_path / "not there yet" / "journal.log"))


@pytest.fixture(scope="module")
def server() -> Iterator[PostgresServer]:
    with running_postgres("fsync=off") as running:
        yield running


@pytest.fixture
def database(server: PostgresServer) -> str:
    """The URL of a database of its own."""
    return server.make_database()


@pytest.mark.system
class TestPostgresBoard(BoardContract):
    @pytest.fixture
    def make_board(self, database):
        return lambda: StudyBoard(database)


@pytest.fixture(
    params=["folder", "journal", pytest.param("postgres", marks=pytest.mark.system)],
)
def where(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A place for a board that several processes use."""
    if request.param == "postgres":
        return str(request.getfixturevalue("database"))
    (tmp_path / "run").mkdir()
    return str(tmp_path / ("run" if request.param == "folder" else "journal.log"))


class Crowd:
    """Processes that work on a board, and what they say."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.said: dict[str, list[str]] = {}
        self._processes: dict[str, subprocess.Popen[str]] = {}

    def join(self, name: str, *how: str) -> None:
        command = [sys.executable, str(HERE / "board_worker.py"), self.where, name, *how]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        self._processes[name], self.said[name] = process, []
        threading.Thread(
            target=lambda: self.said[name].extend(map(str.strip, process.stdout or ())), daemon=True
        ).start()

    def kill(self, name: str) -> None:
        self._processes[name].kill()
        self._processes[name].wait()

    def leave(self) -> None:
        """Waits until all have left by themselves, which they do once the board is closed."""
        for name, process in self._processes.items():
            assert process.wait(60) in (0, -9), name

    def finished(self) -> Counter[str]:
        return Counter(line.split()[1] for lines in self.said.values() for line in lines if line.startswith("finished"))

    def end(self) -> None:
        for process in self._processes.values():
            process.kill()
            process.wait()
            assert process.stdout
            process.stdout.close()


@pytest.fixture
def crowd(where: str) -> Iterator[Crowd]:
    found = Crowd(where)
    yield found
    found.end()


def squares(count: int) -> list[Work]:
    return [Work(f"square-{value}", "measure", {"value": value}) for value in range(count)]


def all_finished(board: Board, works: list[Work]) -> Callable[[], bool]:
    def look() -> bool:
        time.sleep(0.01)
        return all(board.outcome(work.key) for work in works)

    return look


def test_many_processes_do_everything_once(where: str, crowd: Crowd) -> None:
    board = board_at(where)
    works = squares(500 if Path(where).is_dir() else 60 if Path(where).suffix else 200)
    board.open({"about": "squares"})
    names = [f"w{i}" for i in range(6 if Path(where).is_dir() else 3)]
    for name in names:
        crowd.join(name)
    eventually(lambda: time.sleep(0.05) or set(board.workers()) == set(names))
    for start in range(0, len(works), 100):
        board.post(works[start : start + 100])
    eventually(all_finished(board, works))
    board.close()
    crowd.leave()
    assert crowd.finished() == dict.fromkeys((work.key for work in works), 1)
    for work in works:
        outcome = board.outcome(work.key)
        assert outcome
        assert outcome.content == {"squared": work.content["value"] ** 2}
    assert sum(any(line.startswith("finished") for line in crowd.said[name]) for name in names) > 1


def test_a_killed_workers_claim_is_done_by_others(where: str, crowd: Crowd) -> None:
    board = board_at(where)
    works = squares(5)
    board.open({"about": "squares"})
    board.post(works)
    crowd.join("killed", "hold")
    eventually(lambda: time.sleep(0.01) or crowd.said["killed"])
    crowd.kill("killed")
    crowd.join("other")
    eventually(lambda: time.sleep(0.05) or "other" in board.workers())
    reopened = eventually(lambda: time.sleep(0.05) or board.reopen(2.0))
    assert [f"claimed {key}" for key in reopened] == crowd.said["killed"]
    eventually(all_finished(board, works))
    board.close()
    crowd.leave()
    assert crowd.finished() == dict.fromkeys((work.key for work in works), 1)
    assert {name for name in board.workers()} == {"killed", "other"}


def test_boards_need_no_torch() -> None:
    code = """
import pathlib, sys, tempfile
from search.workers.opening import open_board, study_of
board = open_board(pathlib.Path(tempfile.mkdtemp()))
board.open({})
assert not {"torch", "optuna", "sqlalchemy", "pandas"} & set(sys.modules), "a folder needs nothing"
board = open_board(tempfile.mkdtemp() + "/journal.log")
board.open({})
assert board.claim("ada") is None
assert not {"torch", "pandas", "mlflow", "matplotlib"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=HERE.parent)


class TestWatch:
    def test_counts_only_the_observers_seconds(self) -> None:
        clock = FakeClock()
        watch = Watch(clock)
        for _ in range(9):
            assert watch.silent({"ada": 1}, 10.0) == set()
            clock.now += 1.0
        clock.now += 0.5
        assert watch.silent({"ada": 1}, 10.0) == set()
        clock.now += 0.5
        assert watch.silent({"ada": 1}, 10.0) == {"ada"}
        assert watch.silent({"ada": 2}, 10.0) == set(), "alive again"

    def test_an_observer_that_was_away_waits_for_those_it_could_not_hear(self) -> None:
        clock = FakeClock()
        watch = Watch(clock)
        assert watch.silent({"ada": 1, "bob": 1}, 10.0) == set()
        clock.now += 3600.0
        assert watch.silent({"ada": 1, "bob": 1}, 10.0) == set()
        for look in range(LOOKS - 2):
            clock.now += 2.5
            assert watch.silent({"ada": 2 + look, "bob": 1}, 10.0) == set()
        clock.now += 2.5
        assert watch.silent({"ada": 99, "bob": 1}, 10.0) == {"bob"}

    def test_forgets_who_has_nothing_to_do(self) -> None:
        clock = FakeClock()
        watch = Watch(clock)
        for marks in ({"ada": 1}, {}, {"ada": 1}):
            assert watch.silent(marks, 2.0) == set()
            clock.now += 1.5


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TestFolder:
    """What a folder alone can be asked."""

    @pytest.fixture
    def board(self, tmp_path: Path) -> FolderBoard:
        board = FolderBoard(tmp_path / "workers" / "board")
        board.open(ABOUT)
        board.post(WORKS)
        return board

    def test_clocks_of_machines_do_not_matter(self, board: FolderBoard) -> None:
        """Files of a machine whose clock is hours ahead, or years behind, at every look."""
        clock = FakeClock()
        observer, worker = FolderBoard(board.path, clock), FolderBoard(board.path)
        assert worker.claim("skewed")
        for look, stamp in enumerate((4e9, 10.0, 2e9, 1.0, 3e9, 0.0)):
            worker.beat("skewed", {"look": look})
            for file in board.path.rglob("*"):
                os.utime(file, (stamp, stamp))
            clock.now += 2.4
            assert observer.reopen(10.0) == []
        for _ in range(4):
            os.utime(board.path / "beats" / "skewed")  # fresh by the file's time, but it does not count on
            clock.now += 2.6
            reopened = observer.reopen(10.0)
        assert reopened == ["first"]

    def test_only_one_takes_over_from_the_dead(self, board: FolderBoard) -> None:
        assert board.claim("dead")
        clock = FakeClock()
        observers = [FolderBoard(board.path, clock) for _ in range(4)]
        for _ in range(LOOKS):
            assert [observer.reopen(8.0) for observer in observers] == [[]] * 4
            clock.now += 2.0
        assert sorted(key for observer in observers for key in observer.reopen(8.0)) == ["first"]

    def test_each_worker_has_a_shard(self, board: FolderBoard) -> None:
        for name in ("ada", "bob"):
            worker = FolderBoard(board.path)
            work = worker.claim(name)
            assert work
            worker.finish(work, Outcome(name, {}, None if name == "ada" else "no memory"))
        shards = {path.stem: path.read_text().splitlines() for path in board.path.parent.glob("*.jsonl")}
        assert set(shards) == {"ada", "bob"}
        claimed, finished = map(json.loads, shards["bob"])
        assert (claimed["event"], claimed["key"], claimed["kind"]) == ("claimed", "2nd", "measure")
        assert (finished["event"], finished["key"], finished["error"]) == ("finished", "2nd", "no memory")
        assert finished["seconds"] >= 0
        assert finished["time"] >= claimed["time"]

    def test_files_half_written_by_the_killed_are_not_read(self, board: FolderBoard) -> None:
        for folder in ("open", "done", "beats", "claimed"):
            (board.path / folder / ".left.part").write_text('{"kind": "mea')
        assert board.workers() == {}
        assert board.reopen(0.0) == []
        assert drained(FolderBoard(board.path)) == [work.key for work in WORKS]

    def test_a_damaged_file_is_named(self, board: FolderBoard) -> None:
        (board.path / "done" / "first.json").write_text("{")
        with pytest.raises(DataError, match=r"done/first\.json is damaged.*delete it"):
            board.outcome("first")

    def test_a_reader_without_the_right_to_write_sees_it_all(self, board: FolderBoard, monkeypatch) -> None:
        def refused(*_: object) -> None:
            raise PermissionError("read-only")

        board.beat("ada", {"done": 3})
        monkeypatch.setattr(os, "utime", refused)
        viewer = FolderBoard(board.path)
        assert viewer.workers() == {"ada": {"done": 3}}
        assert viewer.is_open


class Machine(RuleBasedStateMachine):
    """A folder with one who searches and three who work, beside a model of what it should hold."""

    KEYS = st.sampled_from(["a", "b", "c", "d", "e"])
    NAMES = st.sampled_from(["ada", "bob", "eve"])

    @initialize()
    def start(self) -> None:
        from tempfile import TemporaryDirectory

        self.folder = TemporaryDirectory()
        self.clock = FakeClock()
        self.path = Path(self.folder.name) / "board"
        self.search = self._board()
        self.search.open({})
        self.workers = {name: self._board() for name in ("ada", "bob", "eve")}
        self.waiting: list[str] = []
        self.claimed: dict[str, str] = {}
        self.outcomes: dict[str, Outcome] = {}
        self.late: list[tuple[str, str]] = []
        self.left: dict[str, list[str]] = {}

    def _board(self) -> FolderBoard:
        return FolderBoard(self.path, self.clock)

    @rule(keys=st.lists(KEYS, max_size=3))
    def post(self, keys: list[str]) -> None:
        self.search.post([Work(key, "measure", {"key": key}) for key in keys])
        for key in keys:
            if key not in {*self.waiting, *self.claimed, *self.outcomes}:
                self.waiting.append(key)

    @rule(key=KEYS)
    def withdraw(self, key: str) -> None:
        self.search.withdraw([key])
        if key in self.waiting:
            self.waiting.remove(key)

    @rule(name=NAMES)
    def claim(self, name: str) -> None:
        work = self.workers[name].claim(name)
        if left := self.left.pop(name, []):
            *rest, key = reversed(left)
            if rest:
                self.left[name] = rest[::-1]
            assert work == Work(key, "measure", {"key": key})
        elif self.waiting:
            assert work is not None
            assert work.key in self.waiting
            self.waiting.remove(work.key)
            self.claimed[work.key] = name
        else:
            assert work is None

    @precondition(lambda self: self.claimed)
    @rule(data=st.data(), error=st.booleans())
    def finish(self, data: st.DataObject, error: bool) -> None:
        key = data.draw(st.sampled_from(sorted(self.claimed)))
        name = self.claimed[key]
        if key not in self.left.get(name, []):
            outcome = Outcome(name, {"key": key}, "no memory" if error else None)
            self.workers[name].finish(Work(key, "measure", {"key": key}), outcome)
            del self.claimed[key]
            self.outcomes[key] = outcome

    @rule(name=NAMES)
    def die_and_be_found(self, name: str) -> None:
        """Everyone else beats, and looks often enough."""
        for _ in range(LOOKS + 1):
            for other, board in self.workers.items():
                if other != name:
                    board.beat(other, {})
            self.clock.now += 5.0
            reopened = self.search.reopen(20.0)
        lost = [key for key, owner in self.claimed.items() if owner == name]
        assert sorted(reopened) == sorted(lost)
        for key in lost:
            del self.claimed[key]
            self.waiting.append(key)
        self.left.pop(name, None)
        self.workers[name] = self._board()

    @rule(name=NAMES)
    def start_anew(self, name: str) -> None:
        """Killed, and back under the old name before anyone noticed."""
        self.workers[name] = self._board()
        order = {key: number for number, key in enumerate(self._numbers())}
        mine = sorted((key for key, owner in self.claimed.items() if owner == name), key=order.__getitem__)
        self.left[name] = mine

    def _numbers(self) -> list[str]:
        return [name.split("~")[1] for name in sorted(os.listdir(self.path / "claimed"))]

    @rule()
    def search_is_killed_and_resumed(self) -> None:
        self.search = self._board()
        self.search.open({})
        self.outcomes = {key: outcome for key, outcome in self.outcomes.items() if outcome.error is None}

    @rule(key=KEYS)
    def look(self, key: str) -> None:
        for board in (self.search, self.workers["ada"]):
            assert board.outcome(key) == self.outcomes.get(key)

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.folder.cleanup()


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=30, stateful_step_count=30)


class TestStudies:
    """What studies alone can be asked: several searches in one place, and messages."""

    @pytest.fixture
    def journal(self, tmp_path: Path) -> str:
        return str(tmp_path / "journal.log")

    def test_a_worker_finds_the_one_search_that_is_open(self, journal: str) -> None:
        worker = open_board(journal)
        assert worker.about() is None
        first, second = open_board(journal), open_board(journal)
        first.open({"task": "one"})
        first.close()
        second.open({"task": "two"})
        second.post(WORKS[:1])
        assert eventually(worker.about) == {"task": "two"}
        assert worker.claim("ada") == WORKS[0]

    def test_several_open_searches_must_be_told_apart(self, journal: str) -> None:
        for name in ("resnet", "mobilenet"):
            open_board(f"{journal}#{name}").open({"task": name})
        assert open_board(journal).about() is None, "which of them live is not known at first sight"
        chosen = open_board(f"{journal}#resnet")
        assert chosen.about() == {"task": "resnet"}
        chosen.close()
        assert not chosen.is_open
        assert open_board(journal).about() == {"task": "mobilenet"}

    def test_another_search_under_the_same_name_is_refused(self, journal: str) -> None:
        open_board(f"{journal}#mine").open({"task": "digits", "seed": 1})
        with pytest.raises(
            ConfigError, match=r"mine in .* holds another search, with seed=1 rather than 2; name another"
        ):
            open_board(f"{journal}#mine").open({"task": "digits", "seed": 2})

    def test_without_names_searches_do_not_meet(self, journal: str) -> None:
        one, two = open_board(journal), open_board(journal)
        one.open({"seed": 1})
        two.open({"seed": 2})
        one.post(WORKS)
        assert two.claim("ada") is None
        again = open_board(journal)
        again.open({"seed": 1})
        assert drained(again) == [work.key for work in WORKS]

    @pytest.mark.parametrize(
        ("where", "match"),
        [
            ("sqlite:///studies.db", "two workers may claim the same work"),
            ("nothing://user:secret@host/name", "cannot be used"),
            ("postgresql://user:secret@127.0.0.1:1/name", "cannot be used.*refused"),
        ],
    )
    def test_what_cannot_be_a_board_is_refused(self, where: str, match: str) -> None:
        with pytest.raises(BitplanError, match=match) as caught:
            open_board(where).about()
        assert "secret" not in str(caught.value)

    def test_a_damaged_journal_is_named(self, journal: str) -> None:
        Path(journal).write_bytes(b"\x00\x01\n\n")
        with pytest.raises(DataError, match=r"journal\.log is no journal file, or has a damaged line .*move it away"):
            open_board(journal).about()

    def test_it_can_be_looked_at_with_optunas_own_means(self, journal: str) -> None:
        import optuna

        board = open_board(f"{journal}#mine")
        board.open(ABOUT)
        board.post(WORKS)
        for outcome in (found(0.25), Outcome("ada", {}, "no memory")):
            work = board.claim("ada")
            assert work
            board.finish(work, outcome)
        storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(journal))
        study = optuna.load_study(study_name="mine", storage=storage)
        assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "WAITING", "WAITING"]
        assert len(study.trials_dataframe()) == 4


@pytest.mark.parametrize("name", ["run", "not.there", "there", "new.log"])
def test_the_place_says_which_board(name: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "there").write_text("")
    before = sorted(tmp_path.rglob("*"))
    assert isinstance(open_board(tmp_path / name), FolderBoard)
    if name in ("there", "new.log"):
        assert isinstance(open_board(f"{tmp_path / name}"), StudyBoard)
    else:
        with pytest.raises(ConfigError, match="is no URL and no journal file"):
            open_board(f"{tmp_path / name}")
    assert sorted(tmp_path.rglob("*")) == before


@contextmanager
def restarting(server: PostgresServer, mode: str, away_s: float) -> Iterator[None]:
    """Stops the server, and starts it again after a while, as the block runs."""

    def restart() -> None:
        server.stop(mode)
        time.sleep(away_s)
        server.start()

    thread = threading.Thread(target=restart)
    thread.start()
    try:
        yield
    finally:
        thread.join()


@pytest.mark.system
class TestServer:
    @pytest.fixture
    def where(self, database: str) -> str:
        return database

    @pytest.mark.parametrize("mode", ["fast", "immediate"])
    def test_it_may_be_restarted_in_the_middle(
        self, mode: str, server: PostgresServer, where: str, crowd: Crowd
    ) -> None:
        board = board_at(where)
        works = squares(150)
        names = {"w0", "w1", "w2"}
        board.open({"about": "squares"})
        for name in names:
            crowd.join(name)
        eventually(lambda: time.sleep(0.01) or names == set(board.workers()))
        board.post(works)
        eventually(lambda: time.sleep(0.01) or sum(crowd.finished().values()) > 10)
        with restarting(server, mode, 1.0):
            before = sum(board.outcome(work.key) is not None for work in works)
        assert 0 < before < len(works)

        def look() -> bool:
            said = {line for lines in list(crowd.said.values()) for line in list(lines)}
            for key in board.reopen(8.0):  # at most one whose claim the server took, but could not confirm
                assert f"claimed {key}" not in said, "nobody is taken for dead for the server's silence"
            return all_finished(board, works)()

        eventually(look)
        board.close()
        crowd.leave()
        assert crowd.finished() == dict.fromkeys((work.key for work in works), 1)

    def test_one_that_stays_away_is_named_without_its_password(self, database: str, server: PostgresServer) -> None:
        board = StudyBoard(database, patience_s=0.5)
        board.open(ABOUT)
        server.stop()
        try:
            with pytest.raises(DataError, match=r"study=postgresql://bitplan:\*\*\*@127.0.0.1.* cannot be used"):
                board.post(WORKS)
        finally:
            server.start()
        board.post(WORKS)
        assert drained(board) == [work.key for work in WORKS]

    def test_a_wrong_password_is_told_at_once_and_not_shown(self, database: str) -> None:
        board = StudyBoard(database.replace("bitplan:", "bitplan:Wr0ng"))
        start = time.monotonic()
        with pytest.raises(DataError, match="password authentication failed") as caught:
            board.about()
        assert time.monotonic() - start < 30, "there is nothing to wait for"
        for secret in ("Wr0ng", PASSWORD):
            assert secret not in str(caught.value)

    def test_many_open_an_empty_database_at_once(self, where: str, crowd: Crowd) -> None:
        for number in range(5):
            crowd.join(f"w{number}")
        board = board_at(where)
        board.open({"about": "squares"})
        board.post(squares(10))
        eventually(all_finished(board, squares(10)))
        eventually(lambda: time.sleep(0.05) or len(board.workers()) == 5)
        board.close()
        crowd.leave()
        assert sum(crowd.finished().values()) == 10


def test_a_session_whose_connection_broke_before_is_an_outage() -> None:
    """Optuna goes on with such a session where reading all trials at once failed, and SQLAlchemy then refuses it."""
    from sqlalchemy import create_engine, text
    from sqlalchemy.exc import OperationalError, PendingRollbackError
    from sqlalchemy.orm import Session

    with Session(create_engine("sqlite://")) as session:
        session.execute(text("SELECT 1"))
        session.connection().invalidate(OperationalError("SELECT 1", {}, Exception("the server is gone")))
        with pytest.raises(PendingRollbackError, match="reconnect") as caught:
            session.execute(text("SELECT 1"))
    assert is_outage(caught.value)
    assert not is_outage(ValueError("something else"))


def test_a_journal_survives_a_line_that_somebody_died_in(tmp_path: Path) -> None:
    journal = tmp_path / "journal.log"
    board = StudyBoard(str(journal))
    board.open(ABOUT)
    board.post(WORKS[:2])
    whole = journal.read_bytes()
    with journal.open("ab") as file:
        file.write(b'{"op_code": 8, "worker_id": "x", "trial_id": 3, "user_at')
    board.post(WORKS[2:])
    assert journal.read_bytes().startswith(whole)
    assert b"user_at{" not in journal.read_bytes()
    assert drained(StudyBoard(str(journal))) == [work.key for work in WORKS]


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 9000])
def test_only_a_torn_line_is_cut(length: int, tmp_path: Path) -> None:
    journal = tmp_path / "journal.log"
    for before in (b"", b"one\n", b"one\n" + b"2" * 5000 + b"\n"):
        journal.write_bytes(before + b"x" * length)
        lock = mending_lock(journal)
        lock.acquire()
        lock.release()
        assert journal.read_bytes() == before


def beaten(where: str, name: str, run_id: str) -> StudyBoard:
    board = StudyBoard(study_of(where, run_id))
    board.open({"seed": name})
    board.beat(name, {"role": "search"})
    return board


def test_a_search_is_found_among_those_that_died(tmp_path: Path) -> None:
    """Whoever is told of the run finds its study at once; who is not waits until the others are known to be dead."""
    where = str(tmp_path / "journal.log")
    beaten(where, "dead", "a" * 32)
    alive = beaten(where, "alive", "b" * 32)
    assert StudyBoard(study_of(where, "b" * 32)).about() == {"seed": "alive"}
    seconds = [0.0]
    guest = StudyBoard(where, clock=lambda: seconds[0])

    def about() -> object:
        alive.beat("alive", {"role": "search"})
        seconds[0] += 1.0
        return guest.about()

    assert [about() for _ in range(3)] == [None] * 3
    assert eventually(about) == {"seed": "alive"}


def test_of_two_searches_that_live_one_must_be_named(tmp_path: Path) -> None:
    where = str(tmp_path / "journal.log")
    searches = {name: beaten(where, name, name * 32) for name in "ab"}
    guest = StudyBoard(where)

    def about() -> object:
        for name, board in searches.items():
            board.beat(name, {"role": "search"})
        time.sleep(0.05)
        return guest.about()

    with pytest.raises(ConfigError, match="2 searches that are under way: search aaaaaaaa, search bbbbbbbb; say which"):
        eventually(about)
    assert StudyBoard(f"{where}#search aaaaaaaa").about() == {"seed": "a"}
