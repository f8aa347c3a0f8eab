"""Puts together what several machines found: runs, what policies scored, and sensitivity tables.

A run is known by its `run_id`, wherever it lies. Of one that is in two places, the one further on stays, provided that
the other's trials are where it began; runs that went different ways from a common start are refused, as are workers'
shards and evaluations that contradict each other, runs that are damaged, and those that a search is at work on where
they are merged to. Of evaluations the file with more measured scores stays. Sources are only read. Every file is
replaced in one step, and a run appears in one step, so that a merge may be cut short and repeated, and merging twice
changes nothing. MLflow's databases are left alone: `bitplan sync` rebuilds what they show.
"""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np

from search.claims import Claim, is_claimed
from search.errors import BitplanError, ConfigError, DataError, file_errors, one_line
from search.files import JsonLines, copy_file, write_json
from search.rundir import EVALUATIONS, MOVE_AWAY, TABLES, WORKERS, RunDirectory, runs_below

LAST = ("trials.jsonl", "run.json")
"""Files that say how far a run is: they are copied when all others are there."""

OWN = (".lock", ".claim", ".mlflow.lock")
"""Files that say who works in a directory here and now."""

STATUSES = ("running", "failed", "interrupted", "finished")
"""From the least to the furthest, where the trials are the same."""


@dataclass
class Merged:
    """What a merge did, or would do.

    Attributes:
        new: Runs that were not there.
        updated: Runs that were there, less far.
        same: Runs that were there, as far or further.
        evaluations: Files of scores added or replaced by ones with more scores.
        tables: Sensitivity tables added.
        shards: Workers' shards added or lengthened in runs that were there.
        bytes: Of everything copied.
        refused: Why something was left out, naming both places.
        left: Files of sources that are never merged.
    """

    new: int = 0
    updated: int = 0
    same: int = 0
    evaluations: int = 0
    tables: int = 0
    shards: int = 0
    bytes: int = 0
    refused: list[str] = field(default_factory=list)
    left: list[Path] = field(default_factory=list)


def merge(sources: Sequence[Path], into: Path, dry_run: bool = False) -> Merged:
    """Copies what folders hold into another, which is created where it does not exist.

    Args:
        sources: Run roots, with their evaluations and tables; sweeps; run directories.
        into: The run root to merge into.
        dry_run: Whether to find out only what would be done.

    Raises:
        DataError: If a source does not exist, or holds nothing to merge.
        ConfigError: If a source and `into` lie in each other, `into` is itself a run, or another merge is at work.
        FileError: If a file cannot be read or written.
    """
    for source in sources:
        _check(source, into)
    merging = Merging(into, dry_run)
    with file_errors():
        if dry_run:
            for source in sources:
                merging.add(source)
            return merging.done
        claim = Claim(into, "merge")
        claim.take()
        try:
            for source in sources:
                merging.add(source)
        finally:
            claim.release()
    return merging.done


def _check(source: Path, into: Path) -> None:
    if not source.is_dir():
        raise DataError(f"{source} is no folder; give run roots, sweeps or run directories")
    inner, outer = source.resolve(), into.resolve()
    if inner.is_relative_to(outer) or outer.is_relative_to(inner):
        raise ConfigError(f"{source} and --into {into} lie in each other; merge into a folder beside the sources")
    if (into / "run.json").is_file():
        raise ConfigError(
            f"--into {into} is itself a run, and runs do not lie in each other; name the folder that holds it, "
            f"--into {outer.parent}, or any other that is no run"
        )
    if not (runs_below(source) or any((source / name).is_dir() for name in (EVALUATIONS, TABLES))):
        raise DataError(
            f"{source} holds nothing to merge: no run.json in it or below it, no {EVALUATIONS}/ and no {TABLES}/"
        )


@dataclass(frozen=True)
class Standing:
    """A run as it lies somewhere.

    Attributes:
        home: Its directory in the folder merged into.
        content: Where its files are: the same, or in a dry run also a source.
        status: What run.json says.
        trials: Its trials, as trials.jsonl has them.
    """

    home: Path
    content: Path
    status: str
    trials: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, home: Path, run: RunDirectory) -> Standing:
        """Reads how far a run is."""
        return cls(home, run.path, _told(run)["status"], tuple(JsonLines(run.file("trials.jsonl")).read()))

    @property
    def progress(self) -> tuple[int, int]:
        """Sorts states of one run, the furthest last."""
        return len(self.trials), STATUSES.index(self.status)

    def agrees_with(self, other: Standing) -> bool:
        """Whether the trials of one are where the other's began."""
        common = min(len(self.trials), len(other.trials))
        return self.trials[:common] == other.trials[:common]


class Merging:
    """One merge under way.

    Attributes:
        done: What was done so far.
    """

    def __init__(self, into: Path, dry_run: bool) -> None:
        self.done = Merged()
        self._into = into
        self._dry_run = dry_run
        self._contents: dict[Path, Path] = {}  # by what it would become, in a dry run
        self._runs: dict[str, Standing] = {}
        for run in runs_below(into):
            try:
                self._runs[_told(run)["run_id"]] = Standing.of(run.path, run)
            except (DataError, ValueError) as error:
                self.done.refused.append(_reason(run, error))
        self._homes = {run.path for run in runs_below(into)}

    def add(self, source: Path) -> None:
        """Merges what a folder holds."""
        self.done.left += [path for path in sorted(source.glob("mlflow.db*")) if path.suffix == ".db"]
        for run in runs_below(source):
            try:
                self._add_run(run, source)
            except (ConfigError, DataError, ValueError) as error:
                self.done.refused.append(_reason(run, error))
        for policy in _files(source / EVALUATIONS):
            self._add_evaluation(policy, self._into / EVALUATIONS / policy.relative_to(source / EVALUATIONS))
        for table in sorted((source / TABLES).glob("[!.]*/")):
            self._add_table(table, self._into / TABLES / table.name)

    def _add_run(self, run: RunDirectory, source: Path) -> None:
        info = _told(run)
        there = self._runs.get(info["run_id"])
        here = Standing.of(there.home if there else self._home(run, source, info["run_id"]), run)
        if there is None:
            self._copy_new(here, info)
            self.done.new += 1
        elif not here.agrees_with(there):
            self.done.refused.append(
                f"{there.content} and {run.path} are one run that went different ways; keep one of them: the other is "
                "no continuation of it"
            )
            return
        elif here.progress > there.progress:
            self._update(here, there, info)
            self.done.updated += 1
        else:
            missing = self._missing(here, there)
            self.done.updated += bool(missing)
            self.done.same += not missing
            for file in missing:
                self._copy(file, there.home / file.relative_to(run.path))
            self._add_shards(run, there)
            return
        content = here.content if self._dry_run else here.home
        self._runs[info["run_id"]] = Standing(here.home, content, here.status, here.trials)
        self._homes.add(here.home)

    def _home(self, run: RunDirectory, source: Path, run_id: str) -> Path:
        """Where a new run goes: to its path below the source, beside what is there already."""
        below = run.path.relative_to(source)
        home = self._into / (below if below.parts else source.resolve().name)
        second = f"{home.name}-{run_id[:8]}"
        names = chain([home.name, second], (f"{second}-{number}" for number in count(2)))
        places = (home.with_name(name) for name in names)
        return next(place for place in places if place not in self._homes and not os.path.lexists(place))

    def _copy_new(self, here: Standing, info: dict[str, Any]) -> None:
        """Copies a run beside its place and renames it, so that it is whole or not there; a rest is gone on with."""
        aside = here.home.with_name(f".{here.home.name}.{info['run_id']}.part")
        for file in _in_order(here.content):
            place = aside / file.relative_to(here.content)
            self._bring(file, place, place, info)
        if not self._dry_run:
            os.rename(aside, here.home)

    def _update(self, here: Standing, there: Standing, info: dict[str, Any]) -> None:
        """Brings a run on, what says how far it is last: if cut short, the next merge does it again.

        Raises:
            ConfigError: If a search is at work on it.
        """
        claim = Claim(there.home)
        at_work = ConfigError(
            f"another search is running in {there.home}, which is left as it is; merge {here.content} again when that "
            "has ended"
        )
        if self._dry_run:
            if is_claimed(there.home):
                raise at_work
        else:
            try:
                claim.take()
            except ConfigError as error:
                raise at_work from error
        try:
            for file in _in_order(here.content):
                below = file.relative_to(here.content)
                if below.parts[0] == WORKERS and below.suffix == ".jsonl":
                    self._add_shard(file, there.home / below, there.content / below)
                else:
                    self._bring(file, there.home / below, there.content / below, info)
        finally:
            claim.release()

    def _missing(self, here: Standing, there: Standing) -> list[Path]:
        """Files that came after the run had ended, such as a report, and are at one of two places only."""
        if here.progress < there.progress:
            return []
        files = [file for file in _in_order(here.content) if file.relative_to(here.content).parts[0] != WORKERS]
        places = [there.home / file.relative_to(here.content) for file in files]
        return [
            file
            for file, place in zip(files, places, strict=True)
            if not ((there.content / file.relative_to(here.content)).exists() or place in self._contents)
        ]

    def _add_shards(self, run: RunDirectory, there: Standing) -> None:
        """Takes over what workers of other machines did for a run that is here as far, or further."""
        for shard in sorted(run.file(WORKERS).rglob("*.jsonl")):
            below = shard.relative_to(run.path)
            self.done.shards += self._add_shard(shard, there.home / below, there.content / below)

    def _add_shard(self, source: Path, target: Path, content: Path) -> bool:
        ours, theirs = JsonLines(content).read(), JsonLines(source).read()
        common = min(len(ours), len(theirs))
        if ours[:common] != theirs[:common]:
            self.done.refused.append(f"{content} and {source} are shards of one worker that contradict each other")
            return False
        if content.exists() and len(theirs) <= len(ours):
            return False
        self._copy(source, target)
        return True

    def _bring(self, source: Path, target: Path, content: Path, info: dict[str, Any]) -> None:
        """Copies a file of a run where what is there differs; run.json learns its new run root."""
        if source.name == "run.json":
            self.done.bytes += source.stat().st_size
            if not self._dry_run:
                write_json(target, info | {"run_root": str(self._into.resolve())})
        elif not (content.is_file() and filecmp.cmp(source, content, shallow=False)):
            self._copy(source, target)

    def _add_evaluation(self, source: Path, target: Path) -> None:
        content = self._contents.get(target, target)
        if content.is_file() and filecmp.cmp(source, content, shallow=False):
            return
        if source.suffix != ".npz":  # what a folder is about, which its name is a digest of
            if content.is_file():
                self.done.refused.append(f"{content} and {source} should be the same, and are not")
            else:
                self._copy(source, target)
            return
        theirs, ours = _scores(source), _scores(content)
        if theirs is None:
            self.done.refused.append(f"{source} is damaged; delete it: what it held is measured again when needed")
        elif ours is not None and not _agree(ours, theirs):
            self.done.refused.append(f"{content} and {source} hold different scores of one policy on the same samples")
        elif ours is None or theirs[1].sum() > ours[1].sum():
            self._copy(source, target)
            self.done.evaluations += 1

    def _add_table(self, source: Path, target: Path) -> None:
        if target in self._contents or target.is_dir():
            return
        aside = target.with_name(f".{target.name}.merge.part")
        for file in _files(source):
            self._copy(file, aside / file.relative_to(source))
        if not self._dry_run:
            os.rename(aside, target)
        self._contents[target] = source
        self.done.tables += 1

    def _copy(self, source: Path, target: Path) -> None:
        self._contents[target] = source if self._dry_run else target
        self.done.bytes += source.stat().st_size if self._dry_run else copy_file(source, target)


def _files(folder: Path) -> Iterator[Path]:
    """The files of a folder, in order, without those that are being written."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".part":
            yield path


def _in_order(run: Path) -> Iterable[Path]:
    """The files of a run that are not about who works there, those that say how far it is last."""
    files = [path for path in _files(run) if path.name not in OWN]
    return [file for file in files if file.parent != run or file.name not in LAST] + [
        run / name for name in LAST if (run / name).is_file()
    ]


def _scores(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    """The measured scores of a file of the evaluation store, and where; None where it is missing or damaged."""
    from zipfile import BadZipFile
    from zlib import error as ZlibError

    with suppress(OSError, EOFError, KeyError, ValueError, BadZipFile, ZlibError):
        with path.open("rb") as file, np.load(file) as arrays:
            values = arrays["scores"].astype(np.float64)
            measured = arrays["measured"] if "measured" in arrays else np.ones(values.shape, bool)  # the float network
        scores = np.full(measured.shape, np.nan)
        scores[measured] = values
        return scores, measured
    return None


def _agree(ours: tuple[np.ndarray, np.ndarray], theirs: tuple[np.ndarray, np.ndarray]) -> bool:
    """Whether what was measured on both sides is the same, to the last bit."""
    if ours[1].shape != theirs[1].shape:
        return False
    both = ours[1] & theirs[1]
    return bool(np.array_equal(ours[0][both], theirs[0][both], equal_nan=True))


def _told(run: RunDirectory) -> dict[str, Any]:
    """What run.json says.

    Raises:
        DataError: If it is damaged, or does not say which run it is and how it is.
    """
    info = run.info()
    run_id, status = info.get("run_id"), info.get("status")
    wrong = None
    if not isinstance(run_id, str) or not run_id or Path(run_id).name != run_id:  # files are named after it
        wrong = f"its run_id is {run_id!r}, and should be a word" if "run_id" in info else "it has no run_id"
    elif status not in STATUSES:
        wrong = f"its status is {status!r}, and should be one of {', '.join(STATUSES)}"
    if wrong:
        raise DataError(f"run.json of {run.path} is damaged: {wrong}; {MOVE_AWAY}")
    return info


def _reason(run: RunDirectory, error: Exception) -> str:
    return one_line(error) if isinstance(error, BitplanError) else f"{run.path}: {one_line(error)}"
