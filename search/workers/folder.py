"""A board of plain files, for workers that see the folder of the run, on NFS too.

There are no locks. A step that only one may take is a rename, which the file server does as a whole, and which fails
where the file is gone already; everything else is a file of its own, written aside and renamed.

    board.json              whether work may still come, and what the search is about
    open/NUMBER~KEY         work to be claimed, in the order of the numbers
    claimed/NUMBER~KEY~WORKER   the same file, renamed by who does it, and renamed back when that worker is dead
    done/KEY.json           what came of it; KEY.error where it could not be done
    beats/WORKER            how often a worker has beaten, and what it says of itself
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from search.errors import DataError
from search.files import JsonLines, write_json, write_text
from search.workers.board import Board, Outcome, Work, check_name
from search.workers.pace import Pace
from search.workers.watch import Clock, Watch

ATTEMPTS = 5  # to read a file that another machine replaces over NFS meanwhile


class FolderBoard(Board):
    """A board in a folder.

    Beside the folder, each worker has a shard of its own, `WORKER.jsonl`: what it claimed, and what it finished after
    how many seconds.
    """

    def __init__(self, path: str | Path, clock: Clock = time.monotonic) -> None:
        """Names the folder; nothing is read or written yet.

        Args:
            path: The folder, which `open` makes.
            clock: What tells the time, in seconds.
        """
        self.path = Path(path)
        self._clock = clock
        self._open = Listing(self.path / "open", clock)
        self._claimed = Listing(self.path / "claimed", clock)
        self._done = Listing(self.path / "done", clock)
        self._watch = Watch(clock)
        self._silent: frozenset[str] = frozenset()
        self._posted: dict[str, str] | None = None  # the file's name by key; None before it was looked up
        self._next = 0
        self._queue: deque[str] = deque()
        self._queue_cost = self._lost = 0.0
        self._mine: dict[str, tuple[Path, float]] = {}
        self._shards: dict[str, JsonLines] = {}
        self._left: dict[str, list[str]] = {}  # what workers claimed before they were killed and started anew
        self._life = uuid4().hex[:8]
        self._beats: dict[str, int] = {}

    @property
    def where(self) -> str:
        return str(self.path)

    def open(self, about: Mapping[str, Any]) -> None:
        for folder in ("open", "claimed", "done", "beats"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        for name in self._done.names():
            if name.endswith(".error"):
                (self._done.path / name).unlink(missing_ok=True)
        self._done.forget()
        self._posted = None
        write_json(self.path / "board.json", {"open": True, "about": dict(about)})

    def about(self) -> dict[str, Any] | None:
        state = self._state()
        return None if state is None else dict(state["about"])

    def close(self) -> None:
        state = self._state()
        if state is not None:
            write_json(self.path / "board.json", {**state, "open": False})

    @property
    def is_open(self) -> bool:
        state = self._state()
        return state is not None and bool(state["open"])

    def _state(self) -> dict[str, Any] | None:
        return _read_json(self.path / "board.json")

    def post(self, works: Sequence[Work]) -> None:
        posted = self._known()
        for work in works:
            if work.key not in posted:
                name = f"{self._next:08d}~{work.key}"
                text = json.dumps({"kind": work.kind, "content": dict(work.content)}, allow_nan=False)
                write_text(self._open.path / name, text)
                posted[work.key] = name
                self._next += 1

    def _known(self) -> dict[str, str]:
        """The files of all work posted before, by key."""
        if self._posted is None:
            waiting = [*self._open.names(), *self._claimed.names()]
            finished = {name.rpartition(".")[0]: "" for name in self._done.names()}
            self._posted = finished | {_parts(name)[1]: "~".join(_parts(name)[:2]) for name in waiting}
            self._next = max((int(_parts(name)[0]) + 1 for name in waiting), default=0)
        return self._posted

    def withdraw(self, keys: Iterable[str]) -> None:
        posted = self._known()
        for key in keys:
            name = posted.get(key)
            if name and _removed(self._open.path / name):
                del posted[key]

    def claim(self, worker: str) -> Work | None:
        if worker not in self._shards:
            self._shards[check_name(worker)] = JsonLines(self.path.parent / f"{worker}.jsonl")
            self._left[worker] = sorted(name for name in self._claimed.names() if _parts(name)[2] == worker)
        while self._left[worker]:
            claimed = self._claimed.path / self._left[worker].pop(0)
            if self._is_done(claimed.name):
                claimed.unlink(missing_ok=True)
            elif (work := self._taken(worker, claimed)) is not None:
                return work
        while name := self._candidate():
            before = self._clock()
            claimed = self._claimed.path / f"{name}~{worker}"
            if not _moved(self._open.path / name, claimed) and not claimed.exists():  # NFS may ask twice, once in vain
                self._lost += self._clock() - before
            elif self._is_done(name):  # by one taken for dead, who came back before the work was claimed again
                claimed.unlink(missing_ok=True)
            elif (work := self._taken(worker, claimed)) is not None:
                return work
        return None

    def _candidate(self) -> str | None:
        """The next file that is probably open.

        The folder is listed again when the last listing is used up, or when more time went on files that others had
        claimed first than a new listing takes.
        """
        if not self._queue or self._lost > self._queue_cost:
            self._queue = deque(sorted(self._open.names()))
            self._queue_cost, self._lost = self._open.cost_s, 0.0
        return self._queue.popleft() if self._queue else None

    def _is_done(self, name: str) -> bool:
        key = _parts(name)[1]
        return any((self._done.path / f"{key}.{ending}").exists() for ending in ("json", "error"))

    def _taken(self, worker: str, claimed: Path) -> Work | None:
        """What is in a claimed file; None where it was opened again, its worker thought dead, before it was read."""
        row = _read_json(claimed)
        if row is None:
            return None
        work = Work(_parts(claimed.name)[1], row["kind"], row["content"])
        self._mine[work.key] = (claimed, self._clock())
        self._shards[worker].append({"event": "claimed", "key": work.key, "kind": work.kind, "time": time.time()})
        return work

    def finish(self, work: Work, outcome: Outcome) -> None:
        claimed, since = self._mine.pop(work.key, (None, self._clock()))
        ending = "json" if outcome.error is None else "error"
        row = {"worker": outcome.worker, "content": dict(outcome.content), "error": outcome.error}
        write_text(self._done.path / f"{work.key}.{ending}", json.dumps(row, allow_nan=False))
        self._done.forget()
        if claimed is not None:
            claimed.unlink(missing_ok=True)
            (self._open.path / claimed.name.rpartition("~")[0]).unlink(missing_ok=True)  # where it was open again
            seconds = round(self._clock() - since, 6)
            what = {"event": "finished", "key": work.key, "kind": work.kind, "error": outcome.error}
            self._shards[claimed.name.rpartition("~")[2]].append({**what, "time": time.time(), "seconds": seconds})

    def outcome(self, key: str) -> Outcome | None:
        names = self._done.recent_names()
        for ending in ("json", "error"):
            if f"{key}.{ending}" in names:
                row = _read_json(self._done.path / f"{key}.{ending}")
                if row is not None:
                    return Outcome(row["worker"], row["content"], row["error"])
        return None

    def beat(self, worker: str, facts: Mapping[str, Any]) -> None:
        self._beats[worker] = self._beats.get(check_name(worker), 0) + 1
        row = {"life": self._life, "count": self._beats[worker], "facts": dict(facts)}
        write_text(self.path / "beats" / worker, json.dumps(row, allow_nan=False))

    def workers(self) -> dict[str, dict[str, Any]]:
        folder = self.path / "beats"
        rows = {name: _read_json(folder / name) for name in sorted(Listing(folder, self._clock).names())}
        return {name: row["facts"] for name, row in rows.items() if row is not None}

    def reopen(self, silence_s: float) -> list[str]:
        claimed = sorted(self._claimed.names())
        beats = Listing(self.path / "beats", self._clock).names()
        marks = {}
        for worker in {_parts(name)[2] for name in claimed} | beats:
            row = _read_json(self.path / "beats" / worker)
            marks[worker] = None if row is None else (row["life"], row["count"])
        self._silent = frozenset(self._watch.silent(marks, silence_s))
        return self._give_back([name for name in claimed if _parts(name)[2] in self._silent])

    @property
    def silent(self) -> frozenset[str]:
        return self._silent

    def _give_back(self, names: Sequence[str]) -> list[str]:
        """Opens claimed work again, and returns the keys of what nobody else opened or finished first."""
        keys = []
        for name in names:
            number, key, _ = _parts(name)
            if self._is_done(name):
                (self._claimed.path / name).unlink(missing_ok=True)
            elif _moved(self._claimed.path / name, self._open.path / f"{number}~{key}"):
                keys.append(key)
        return keys


class Listing:
    """The names of the files in a folder."""

    def __init__(self, path: Path, clock: Clock) -> None:
        self.path = path
        self.cost_s = 0.0
        self._clock = clock
        self._names: frozenset[str] = frozenset()
        self._pace = Pace(clock)

    def names(self) -> frozenset[str]:
        """The names now; none where there is no folder."""
        start = self._clock()
        with self._pace.asking():
            _touch(self.path)
            try:
                self._names = frozenset(name for name in os.listdir(self.path) if not name.startswith("."))
            except FileNotFoundError:
                self._names = frozenset()
        self.cost_s = self._clock() - start
        return self._names

    def recent_names(self) -> frozenset[str]:
        """The names as of a moment ago."""
        return self.names() if self._pace.is_due else self._names

    def forget(self) -> None:
        """Has the folder be listed anew."""
        self._pace.hurry()


def _parts(name: str) -> tuple[str, str, str]:
    """Number, key and worker in a file's name; no worker where it is open."""
    number, key, worker = f"{name}~".split("~")[:3]
    return number, key, worker


def _touch(folder: Path) -> None:
    """Has NFS ask the server what is in a folder, which it else remembers for up to a minute."""
    with suppress(OSError):  # who may only read, or comes before the folder, sees things later
        os.utime(folder)


def _moved(source: Path, target: Path) -> bool:
    """Renames a file unless it is gone."""
    try:
        os.rename(source, target)
    except FileNotFoundError:
        return False
    return True


def _removed(path: Path) -> bool:
    try:
        path.unlink()
    except FileNotFoundError:
        return False
    return True


def _read_json(path: Path) -> dict[str, Any] | None:
    """Reads a file that others replace; None where there is none.

    Raises:
        DataError: If it is damaged.
    """
    for _ in range(ATTEMPTS):
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            continue
        try:
            return dict(json.loads(text))
        except ValueError as error:
            raise DataError(f"{path} is damaged ({error}); delete it, and its work is done again") from error
    raise DataError(f"{path} is replaced all the time, and cannot be read; see whether the file server is well")
