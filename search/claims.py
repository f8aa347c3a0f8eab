"""Claims: one process at a time works in a folder, and the claim of one that died holds nobody up.

A claim is a lock (`flock`) on the file `.lock`, which the kernel gives back when the process ends, however it ends.
Some file systems have no locks: NFS without its lock service, and some parallel and FUSE file systems. There, the claim
is a file, `.claim`, that says who made it, linked into place, which a file server does as a whole and for one process
only. Its maker beats: it changes the file's time every `BEAT_S` seconds. A claim is taken over when its maker has died
on this machine; of another machine, when it was watched for `SILENCE_S` seconds by the watcher's own clock and did not
change: the times themselves are compared with none, as clocks of machines differ.

Machines must agree on whether the file system has locks: NFS mounted with `local_lock` on one of them, or `nolock`,
keeps that machine's claims from the others.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from search.errors import ConfigError, file_errors
from search.files import write_json

LOCK, CLAIM = ".lock", ".claim"
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What `flock` says where the file system has none."""

ATTEMPTS, PAUSE_S = 4, 0.05
"""How often a lock is asked for: who only looks whether it is taken holds it for a moment."""

BEAT_S, SILENCE_S = 2.0, 30.0


class Claim:
    """The right to work in a folder alone, from `take` to `release` or the end of the process."""

    def __init__(
        self, folder: Path, work: str = "search", beat_s: float = BEAT_S, silence_s: float = SILENCE_S
    ) -> None:
        """Names the folder; nothing is claimed yet.

        Args:
            folder: The folder, which is made where it does not exist.
            work: What is to be done in it, for messages.
            beat_s: Seconds between beats, where there are no locks.
            silence_s: Seconds without a beat that are taken for death, likewise.
        """
        self._folder = folder
        self._work = work
        self._beat_s = beat_s
        self._silence_s = silence_s
        self._lock: int | None = None
        self._beating: Beating | None = None

    def take(self) -> None:
        """Claims the folder.

        Raises:
            ConfigError: If another process works there.
            FileError: If the folder cannot be written.
        """
        with file_errors():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self._folder / LOCK, os.O_CREAT | os.O_RDWR, 0o644)
            try:
                if _lock(self._lock):
                    return
            except BlockingIOError:
                self.release()
                raise self._taken() from None
            self.release()
            self._beating = self._link()

    def release(self) -> None:
        """Lets other processes work there."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        if self._beating is not None:
            self._beating.stop()
            self._beating = None

    def _link(self) -> Beating:
        """Claims the folder by a file that only one process can link into place."""
        me, place = _myself(), self._folder / CLAIM
        mine = write_json(self._folder / f"{CLAIM}.{me['claim']}", me)
        try:
            while True:
                try:
                    os.link(mine, place)
                except FileExistsError:
                    self._clear(place)
                else:
                    return Beating(place, me["claim"], self._beat_s)
        finally:
            mine.unlink()

    def _clear(self, place: Path) -> None:
        """Takes away the claim of a dead process.

        Raises:
            ConfigError: If its maker lives.
        """
        seen = _read(place)
        if seen is None:  # given back meanwhile
            return
        if not self._is_dead(place, seen):
            raise self._taken(seen)
        moved = place.with_name(f"{CLAIM}.{uuid4().hex}")
        with suppress(FileNotFoundError):  # another process cleared it, too
            os.rename(place, moved)
            if _read(moved) != seen:  # another process cleared it and made its own: that one goes back
                with suppress(FileExistsError):
                    os.link(moved, place)
            moved.unlink()

    def _taken(self, maker: dict[str, Any] | None = None) -> ConfigError:
        who = f" (process {maker['process']} on {maker['host']})" if maker else ""
        return ConfigError(
            f"another {self._work} is running in {self._folder}{who}; wait for it, or choose another folder"
        )

    def _is_dead(self, place: Path, maker: dict[str, Any]) -> bool:
        me = _myself()
        if all(maker.get(key) == me[key] for key in ("host", "boot", "space")):
            return not _is_alive(maker["process"], maker["started"])
        until, beat = time.monotonic() + self._silence_s, _beat(place)
        while time.monotonic() < until:
            time.sleep(self._beat_s / 4)
            if _beat(place) != beat:
                return False
        return True


class Beating:
    """Keeps a claim alive from a thread of its own, and takes it away at the end."""

    def __init__(self, place: Path, claim: str, beat_s: float) -> None:
        self._place = place
        self._claim = claim
        self._beat_s = beat_s
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="bitplan-claim", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        while not self._stopped.wait(self._beat_s):
            with suppress(OSError):  # a file server that is away for a while; it may be back for the next beat
                os.utime(self._place)

    def stop(self) -> None:
        """Ends the claim."""
        self._stopped.set()
        self._thread.join()
        with suppress(OSError):  # what is left there is the claim of a dead process
            found = _read(self._place)
            if found is not None and found["claim"] == self._claim:
                self._place.unlink()


def is_claimed(folder: Path) -> bool:
    """Whether a process seems to work in a folder; looks only, and does not wait for beats."""
    try:
        lock = os.open(folder / LOCK, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return (folder / CLAIM).exists()
    finally:
        os.close(lock)
    return False


def _lock(file: int) -> bool:
    """Locks an open file; False where its file system has no locks.

    Raises:
        BlockingIOError: If another process holds the lock.
    """
    for attempt in range(ATTEMPTS):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if attempt == ATTEMPTS - 1:
                raise
            time.sleep(PAUSE_S)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return False
        else:
            return True
    raise AssertionError("unreachable")


def _myself() -> dict[str, Any]:
    """Who claims: the process, told apart from any other that ever had its number, here or elsewhere."""
    return {
        "claim": uuid4().hex,
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "space": os.readlink("/proc/self/ns/pid") if os.path.exists("/proc/self/ns/pid") else "",
        "process": os.getpid(),
        "started": _started(os.getpid()),
    }


def _is_alive(process: int, started: str) -> bool:
    return _started(process) == started


def _started(process: int) -> str | None:
    """When a process of this machine started, in ticks since boot, or that it lives; None where there is none."""
    stat = _text(f"/proc/{process}/stat")
    if stat:
        return stat.rpartition(")")[2].split()[19]
    try:
        os.kill(process, 0)  # where there is no /proc; signal 0 only asks
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return "alive"


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _read(place: Path) -> dict[str, Any] | None:
    """What a claim says; None where there is none."""
    try:
        return dict(json.loads(place.read_bytes()))
    except FileNotFoundError:
        return None


def _beat(place: Path) -> int | None:
    """The time that the maker last set; the file is opened, so that NFS asks the server."""
    try:
        with place.open("rb") as file:
            return os.fstat(file.fileno()).st_mtime_ns
    except FileNotFoundError:
        return None
