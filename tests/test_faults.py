"""Faults of disks, permissions, clocks and servers: each a clear message, and what was measured is not lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from rundirs import MEASURED, finish, measure, start
from tiny import TinyTask

from hwmodels import StorageModel
from search.budget import Budget
from search.cli import main
from search.config import named_strategy
from search.errors import BitplanError, ConfigError, DataError, FileError
from search.events import LogWarning, read_events
from search.job import Job, Result, SpaceSettings
from search.progress import Progress
from search.quantize.settings import QuantizerSettings
from search.run import search
from search.rundir import RunDirectory
from search.strategies.base import Strategy
from search.strategies.baselines import RandomSearch
from search.trials import Trial

FULL = OSError(28, "No space left on device")


class Measured(Progress):
    """Counts the trials that were measured, not known."""

    def __init__(self) -> None:
        self.count = 0

    def trial(self, trial: Trial, known: bool) -> None:
        self.count += trial.is_measured and not known


def searched(root: Path, progress: Progress | None = None, strategy: Strategy | None = None) -> Result:
    """A search with an evaluation store and a front, in a quarter of a second."""
    job = Job(
        TinyTask(),
        StorageModel(),
        strategy or RandomSearch(5),
        Budget(size_ratio=0.25),
        root / "run",
        space=SpaceSettings(["int2", "int4", "int8"], ["uint8"]),
        quantizer=QuantizerSettings(),
        store=root,
        config={"seed": 0},
    )
    return search(job, progress)


def trials(root: Path) -> list[str]:
    path = root / "run" / "trials.jsonl"
    return path.read_text().splitlines() if path.is_file() else []


def digests(root: Path) -> list[str]:
    return [json.loads(line)["digest"] for line in trials(root)]


@dataclass(frozen=True)
class Undisturbed:
    """What a search that nothing disturbs leaves behind."""

    plan: bytes
    digests: list[str]
    files: list[str]


@contextmanager
def refusing(refuses: Callable[[str], bool], error: OSError = FULL) -> Iterator[list[str]]:
    """Has the system refuse to complete the files for which `refuses` says so; yields the names of all.

    Where a line is appended, half of it is on the disk already.
    """
    names: list[str] = []
    replace, fsync = os.replace, os.fsync

    def check(name: str) -> bool:
        names.append(name)
        return refuses(name)

    def replace_or_not(source: Path, target: Path) -> None:
        if check(Path(target).name):
            raise OSError(error.errno, error.strerror)
        replace(source, target)

    def sync_or_not(file: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{file}"))
        if check(path.name):
            whole = path.read_bytes()
            os.truncate(path, len(whole) - len(whole.splitlines()[-1]) // 2)
            raise OSError(error.errno, error.strerror)
        fsync(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("search.files.os.replace", replace_or_not)
        patch.setattr("search.files.os.fsync", sync_or_not)
        yield names


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = tmp_path_factory.mktemp("undisturbed")
    with refusing(lambda name: False) as names:
        searched(root)
    return Undisturbed((root / "run" / "plan.json").read_bytes(), digests(root), names)


def test_each_file_in_turn_finds_the_disk_full(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Whichever file does not fit: it is named, nothing measured before is lost, and the search goes on to its plan."""
    kinds = {re.sub(r"^[0-9a-f]{12}\.npz$", "POLICY.npz", name): name for name in undisturbed.files}
    assert {"run.json", "trials.jsonl", "report.jsonl", "POLICY.npz", "about.json", "plan.json"} <= kinds.keys()
    for kind, name in kinds.items():
        root = tmp_path / kind
        before_it = [name] * (undisturbed.files.count(name) // 2)  # in the middle, where there are several

        def comes_to_it(written: str, name: str = name, left: list[str] = before_it) -> bool:
            return written == name and not (left and left.pop())

        with refusing(comes_to_it), pytest.raises(FileError) as raised:
            searched(root)
        assert "no space is left on its file system; free some space there" in str(raised.value), kind
        assert name in str(raised.value)
        before = trials(root)
        whole = before[:-1] if kind == "trials.jsonl" else before
        assert digests_of(whole) == undisturbed.digests[: len(whole)]
        searched(root)
        assert trials(root)[: len(whole)] == whole, f"{kind}: what was measured was measured again"
        assert digests(root) == undisturbed.digests, kind
        assert (root / "run" / "plan.json").read_bytes() == undisturbed.plan, kind


def test_a_table_of_scores_finds_the_disk_full(tmp_path: Path) -> None:
    strategy = named_strategy("auto", {"evaluations": 1})
    with (
        refusing(lambda name: name == "sensitivity.npz"),
        pytest.raises(FileError, match=r"sensitivity\.npz cannot"),
    ):
        searched(tmp_path, strategy=strategy)
    assert len(list((tmp_path / "run" / "scoring").glob("*.npz"))) > 4, "choices that were scored are kept"
    searched(tmp_path, strategy=strategy)
    assert len(list(tmp_path.rglob("sensitivity.npz"))) == 2


def digests_of(lines: list[str]) -> list[str]:
    return [json.loads(line)["digest"] for line in lines]


def test_the_status_of_a_search_that_found_the_disk_full(tmp_path: Path) -> None:
    with refusing(lambda name: name == "trials.jsonl"), pytest.raises(FileError) as raised:
        searched(tmp_path)
    assert re.search(
        rf"trials\.jsonl cannot be used: .*repeat the search with run_dir={tmp_path}/run", str(raised.value)
    )
    assert RunDirectory(tmp_path / "run").info()["status"] == "failed"
    last = read_events(tmp_path / "run" / "log.jsonl")[-1]
    assert (last["event"], last["kind"]) == ("failed", "FileError")
    assert "traceback" not in last


def test_when_nothing_can_be_written_any_more_the_first_file_is_named(tmp_path: Path) -> None:
    """run.json cannot say that the run failed, either; it is not what the message is about."""
    is_full: list[str] = []

    def fills_up(name: str) -> bool:
        is_full.extend([name] if name == "trials.jsonl" else [])
        return bool(is_full)

    with refusing(fills_up), pytest.raises(FileError, match=r"trials.jsonl cannot be used: no space"):
        searched(tmp_path)
    assert RunDirectory(tmp_path / "run").info()["status"] == "running"
    assert "run.json" in read_events(tmp_path / "run" / "log.jsonl")[-1]["not_in_run_json"]


@pytest.mark.parametrize(
    ("number", "words"), [(122, "quota"), (30, "read-only"), (13, "permission"), (5, "device failed")]
)
def test_other_refusals_have_words_of_their_own(tmp_path: Path, number: int, words: str) -> None:
    with (
        refusing(lambda name: name == "costs.parquet", OSError(number, os.strerror(number))),
        pytest.raises(FileError, match=rf"costs.parquet cannot be used: .*{words}"),
    ):
        searched(tmp_path)


def mount(folder: Path, *options: str) -> None:
    """Mounts something for real, where this may be done."""
    if os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounting needs root")
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"mounting is not allowed here: {done.stderr.strip()}")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def refusal(act: Callable[[], object]) -> str | None:
    """What a refused file is told with; None where all went well."""
    try:
        act()
    except FileError as error:
        return str(error)
    return None


@pytest.mark.filterwarnings("ignore::search.events.LogWarning")
def test_a_disk_that_is_full_for_real(undisturbed: Undisturbed, disk: Path) -> None:
    """Room is given page by page; every search fails where there is none left, the last one ends undisturbed."""
    free = os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize
    filler = disk / "filler"
    filler.write_bytes(bytes(free - 12_288))
    failures, kept = 0, trials(disk)
    while True:
        why = refusal(lambda: searched(disk))
        assert trials(disk)[: len(kept)] == kept
        if why is None:
            break
        assert "no space is left" in why
        failures += 1
        kept = [line for line in trials(disk) if line.endswith("}")]
        os.truncate(filler, max(filler.stat().st_size - 16_384, 0))
    assert failures >= 3
    assert digests(disk) == undisturbed.digests
    assert (disk / "run" / "plan.json").read_bytes() == undisturbed.plan


def test_a_file_system_that_becomes_read_only(undisturbed: Undisturbed, disk: Path) -> None:
    with refusing(lambda name: name == "report.jsonl"), pytest.raises(FileError):
        searched(disk)
    kept = trials(disk)
    mount(disk, "-o", "remount,ro")
    with pytest.raises(FileError, match=r"run/\.lock cannot be used: its file system is read-only; mount it writable"):
        searched(disk)
    mount(disk, "-o", "remount,rw")
    searched(disk)
    assert trials(disk) == kept
    assert (disk / "run" / "plan.json").read_bytes() == undisturbed.plan


@contextmanager
def ordinary_user() -> Iterator[None]:
    """Permissions hold for root only while it is somebody else."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_a_missing_permission_is_named(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for folder in (run, *tmp_path.parents[:3], tmp_path):
        folder.chmod(0o555 if folder == run else 0o755)
    with (
        ordinary_user(),
        pytest.raises(FileError, match=r"run/\.lock cannot be used: permission is missing; have it gra"),
    ):
        searched(tmp_path)
    run.chmod(0o755)
    assert list(run.iterdir()) == []


def test_a_log_that_cannot_be_written_does_not_end_the_search(undisturbed: Undisturbed, tmp_path: Path) -> None:
    (tmp_path / "run" / "log.jsonl").mkdir(parents=True)
    with pytest.warns(LogWarning, match="the search goes on"):
        searched(tmp_path)
    assert (tmp_path / "run" / "plan.json").read_bytes() == undisturbed.plan


@pytest.mark.parametrize("jumps", [(-7200.0,), (86_400.0,), (-7200.0, 86_400.0)])
def test_a_clock_that_jumps_changes_nothing_but_times(
    undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jumps: tuple[float, ...]
) -> None:
    """The clock is set while choices are scored; MLflow's times follow from these: run.json and the trials' seconds."""
    import time

    now, offset = time.time, [0.0]
    left = list(jumps)

    class Setting(Measured):
        def trial(self, trial: Trial, known: bool) -> None:
            super().trial(trial, known)
            offset[0] += left.pop() if left else 0.0

    monkeypatch.setattr(time, "time", lambda: now() + offset[0])
    searched(tmp_path, Setting())
    info = RunDirectory(tmp_path / "run").info()
    assert 0 < info["seconds"] < 300
    assert info["finished"] - info["started"] == pytest.approx(info["seconds"])
    events = read_events(tmp_path / "run" / "log.jsonl")
    assert sum(event["event"] == "clock_set" for event in events) == len(jumps)
    assert all(event.get("seconds", 0) >= 0 for event in events)
    assert [event["clock_s"] for event in events] == sorted(event["clock_s"] for event in events)
    assert all(trial.seconds >= 0 for trial in RunDirectory(tmp_path / "run").trials())
    offset[0] = -1e6
    again = Measured()
    searched(tmp_path, again)
    assert again.count == 0
    info = RunDirectory(tmp_path / "run").info()
    assert info["finished"] >= info["started"]
    assert (tmp_path / "run" / "plan.json").read_bytes() == undisturbed.plan


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("run.json", lambda text: text[:-9], r"run\.json, line \d+ is damaged .*put it back from a copy, or move"),
        ("run.json", lambda text: "[]", r"run\.json is damaged: it holds a list"),
        ("run.json", lambda text: "{}", r"run\.json does not say what was run"),
        ("trials.jsonl", lambda text: text.replace("}", "", 1), r"trials\.jsonl, line 1 is damaged .*delete that line"),
        ("trials.jsonl", lambda text: text.replace("number", "no", 1), r"trials\.jsonl, line 1 is damaged"),
        ("trials.jsonl", lambda text: "7\n" + text, r"trials\.jsonl, line 1 is damaged \(it holds a int\)"),
        ("report.jsonl", lambda text: text + "{}\n", r"report\.jsonl, line \d+ is damaged \(it has no 'digest'\)"),
    ],
)
def test_damaged_files_are_named_with_the_line_and_left_alone(
    tmp_path: Path, name: str, damage: Callable[[str], str], message: str
) -> None:
    searched(tmp_path)
    path = tmp_path / "run" / name
    path.write_text(damage(path.read_text()))
    files = {file: file.read_bytes() for file in (tmp_path / "run").iterdir() if file.name in ("run.json", name)}
    with pytest.raises(DataError, match=message):
        searched(tmp_path)
    assert path.read_bytes() == files[path]
    if name == "run.json":
        assert {file: file.read_bytes() for file in files} == files


def test_a_deleted_line_is_measured_again_and_trials_are_counted_anew(undisturbed: Undisturbed, tmp_path: Path) -> None:
    searched(tmp_path)
    path = tmp_path / "run" / "trials.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:1], *lines[2:]]))
    again = searched(tmp_path)
    found = RunDirectory(tmp_path / "run").trials()
    assert [trial.number for trial in found] == list(range(len(lines)))
    assert {trial.digest for trial in found} == set(undisturbed.digests)
    assert again.plan.digest == json.loads(undisturbed.plan)["digest"]


def test_a_damaged_plan_is_named_by_who_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = start(tmp_path)
    measure(run, MEASURED)
    finish(run)
    run.file("plan.json").write_text(run.file("plan.json").read_text()[:-9])
    before = run.file("plan.json").read_bytes()
    with pytest.raises(DataError, match=r"plan\.json is damaged"):
        run.plan()
    assert main(["export", str(tmp_path), "--to", "onnxruntime", "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "plan.json is damaged" in error
    assert "Traceback" not in error
    assert run.file("plan.json").read_bytes() == before


SETTINGS = [
    "task=digits",
    "strategy.evaluations=2",
    "strategy=random",
    "space.weight=[int2,int8]",
    "space.input=[uint8]",
]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `bitplan search` here: its exit code, and what it printed as result and as error."""
    monkeypatch.setattr("sys.argv", sys.argv)
    monkeypatch.setattr("sys.path", list(sys.path))

    def run(*settings: str) -> tuple[int, str, str]:
        code = main(["search", *SETTINGS, "tracking=none", *settings])
        return code, *capsys.readouterr()

    return run


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (["run_root=FILE"], "FILE/.* cannot be used: a part of its path is a file"),
        (["run_dir=FILE", "run_root=DIR"], "FILE cannot be used: a file is in the way"),
        (["run_dir=DIR/run", "run_root=DIR"], "DIR/run/.* cannot be used: .*read-only"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong_with_a_folder(
    tmp_path: Path,
    where: list[str],
    message: str,
    request: pytest.FixtureRequest,
    command: Callable[..., tuple[int, str, str]],
) -> None:
    (tmp_path / "file").write_text("not a folder")
    if "read-only" in message:
        folder = request.getfixturevalue("disk")
        (folder / "run").mkdir()
        mount(folder, "-o", "remount,ro")
    else:
        folder = tmp_path / "folder"
    places = {"FILE": str(tmp_path / "file"), "DIR": str(folder)}

    def placed(text: str) -> str:
        return re.sub("FILE|DIR", lambda name: places[name[0]], text)

    code, _, error = command(*map(placed, where))
    assert code == 2
    (line,) = error.strip().splitlines()
    assert re.search(placed(message), line)
    assert (tmp_path / "file").read_text() == "not a folder"


@pytest.mark.system
def test_a_sweep_in_a_full_folder_goes_on_or_is_refused(
    tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    sweep = (f"run_root={tmp_path}", f"run_dir={tmp_path}/sweep", "-m")
    assert command("seed=0", *sweep)[0] == 0
    kept = {path: path.read_bytes() for name in ("plan.json", "trials.jsonl") for path in tmp_path.rglob(name)}
    assert len(kept) == 2
    code, shown, _ = command("seed=0", *sweep)
    assert code == 0
    assert "this run finished before: its 2 trials are known" in shown
    code, shown, error = command("seed=1", *sweep)
    assert code != 0
    assert "holds a run with seed=0, and now seed=1" in shown + error
    assert {path: path.read_bytes() for path in kept} == kept


@pytest.mark.system
def test_a_tracking_server_that_hangs_holds_nothing_up(tmp_path: Path) -> None:
    """It accepts connections and never answers. The deadline is generous: minutes of retries would be over it."""
    accepted: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    accepted.append(server.accept()[0])
                except OSError:  # closed: the test is over
                    return

        threading.Thread(target=accept, daemon=True).start()
        uri = f"http://127.0.0.1:{server.getsockname()[1]}"
        settings = [*SETTINGS, f"run_root={tmp_path}", f"run_dir={tmp_path}/run", f"tracking.uri={uri}"]
        full = [sys.executable, "-m", "search", "search", *settings]
        done = subprocess.run(full, capture_output=True, text=True, timeout=400, check=False)
        server.shutdown(socket.SHUT_RDWR)
    for connection in accepted:
        connection.close()
    assert accepted, "the search talked to it"
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: " in done.stderr
    assert "bitplan sync" in done.stderr
    run = RunDirectory(tmp_path / "run")
    assert run.info()["status"] == "finished"
    assert len(run.trials()) == 2
    assert run.plan() is not None


def test_refusals_are_errors_of_bitplan() -> None:
    assert issubclass(FileError, BitplanError)
    assert not issubclass(FileError, ConfigError)
