"""Claims where file systems have no locks: one process at a time, and none held up by the dead."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from search.claims import CLAIM, Claim, is_claimed
from search.errors import ConfigError, FileError


@pytest.fixture
def _no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("search.claims.fcntl.flock", refuse)


def quick(folder: Path) -> Claim:
    return Claim(folder, beat_s=0.02, silence_s=0.4)


def pretend(folder: Path, **changes: object) -> None:
    """Makes the claim in a folder look as if another had made it."""
    place = folder / CLAIM
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))


@pytest.fixture
def left(tmp_path: Path, _no_locks: None) -> Iterator[Path]:
    """A folder with a claim whose maker does not beat."""
    claim = Claim(tmp_path, beat_s=3600)
    claim.take()
    content = (tmp_path / CLAIM).read_bytes()
    claim.release()
    (tmp_path / CLAIM).write_bytes(content)
    return tmp_path


def test_a_lock_keeps_others_out_and_can_be_seen(tmp_path: Path) -> None:
    assert not is_claimed(tmp_path)
    claim = Claim(tmp_path)
    claim.take()
    assert is_claimed(tmp_path)
    with pytest.raises(ConfigError, match="another merge is running"):
        Claim(tmp_path, "merge").take()
    claim.release()
    assert not is_claimed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_who_looks_for_a_moment_does_not_keep_others_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flock, looks = fcntl.flock, iter(range(2))

    def locked_twice(file: int, operation: int) -> None:
        if next(looks, None) is not None:
            raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")
        flock(file, operation)

    monkeypatch.setattr("search.claims.fcntl.flock", locked_twice)
    claim = Claim(tmp_path)
    claim.take()
    claim.release()


@pytest.mark.usefixtures("_no_locks")
def test_without_locks_one_of_many_gets_the_claim(tmp_path: Path) -> None:
    claims = [quick(tmp_path) for _ in range(8)]
    outcomes: list[Claim | None] = []
    together = threading.Barrier(len(claims))

    def take(claim: Claim) -> None:
        together.wait()
        try:
            claim.take()
            outcomes.append(claim)
        except ConfigError:
            outcomes.append(None)

    threads = [threading.Thread(target=take, args=(claim,)) for claim in claims]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (winner,) = filter(None, outcomes)
    assert len(outcomes) == 8
    assert is_claimed(tmp_path)
    with pytest.raises(ConfigError, match=rf"another search is running in .*process {os.getpid()} on "):
        quick(tmp_path).take()
    winner.release()
    assert not is_claimed(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"], "nothing is left behind"
    again = quick(tmp_path)
    again.take()
    again.release()


def test_a_process_that_died_here_holds_nobody_up(left: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    pretend(left, process=int(dead.stdout))
    claim = Claim(left, silence_s=3600)
    claim.take()
    claim.release()


def test_a_number_that_another_process_has_now_is_no_life(left: Path) -> None:
    pretend(left, started="1")
    claim = Claim(left, silence_s=3600)
    claim.take()
    claim.release()


@pytest.mark.parametrize("change", [{"host": "elsewhere"}, {"boot": "another"}, {"space": "a container"}])
def test_elsewhere_silence_is_death(left: Path, change: dict[str, str]) -> None:
    pretend(left, **change)
    future = 2 * os.stat(left / CLAIM).st_mtime_ns
    os.utime(left / CLAIM, ns=(future, future))  # a clock ahead of ours by decades says nothing
    claim = quick(left)
    claim.take()
    assert json.loads((left / CLAIM).read_text())["process"] == os.getpid()
    claim.release()


@pytest.mark.usefixtures("_no_locks")
def test_elsewhere_a_beat_is_life(tmp_path: Path) -> None:
    claim = quick(tmp_path)
    claim.take()
    pretend(tmp_path, host="elsewhere")
    with pytest.raises(ConfigError, match="on elsewhere"):
        Claim(tmp_path, beat_s=0.02, silence_s=3600).take()
    claim.release()


@pytest.mark.usefixtures("_no_locks")
def test_a_claim_taken_over_is_not_given_back_by_its_first_maker(tmp_path: Path) -> None:
    first = quick(tmp_path)
    first.take()
    pretend(tmp_path, claim="another's")
    first.release()
    assert json.loads((tmp_path / CLAIM).read_text())["claim"] == "another's"


def test_a_folder_that_cannot_be_made_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match="file/run cannot be used: a part of its path is a file"):
        Claim(tmp_path / "file" / "run").take()
    with pytest.raises(FileError, match="file cannot be used: a file is in the way"):
        Claim(tmp_path / "file").take()
