"""The run directory: every stage of a search as a file, and the only truth about it.

run.json            identity, status and headline numbers of the run; its resolved configuration
layers.json         the network's layers; network.json is the whole network, for pricing without the model
scoring/            scores as they come; sensitivity.parquet is the finished table, sensitivity.npz all that was scored
costs.parquet       every choice of every layer, priced
trials.jsonl        every policy tried
report.jsonl        what was measured on the report split
front.csv           float, uniform baselines, the front and the winner
greedy_curve.csv    of strategy=greedy: the policies in the order in which formats were flipped
history.csv         after every measurement: what was spent, the best so far, and the hypervolume of the front so far
plan.json           the plan, with plan.safetensors
report.html         the report, with figures/*.png
log.jsonl           what happened, and when: one event a line
workers/            where several work on one search: a shard for each, and the board between them
.hydra/             the configuration as Hydra composed it
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwmodels import Network
from search.errors import ConfigError, DataError
from search.files import JsonLines, replacing, write_json
from search.plan import Plan
from search.trials import Trial, TrialLog

if TYPE_CHECKING:
    import pandas as pd

    from search.quality.evaluate import Quality

UNRELATED = ("tracking", "run_dir", "run_root", "workers", "study")
"""Settings that may change when a run is resumed: they do not touch what is searched."""


class RunDirectory:
    """Reads and writes the files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._lock: int | None = None

    @classmethod
    def existing(cls, path: str | Path) -> RunDirectory:
        """Opens the directory of an earlier run for reading.

        Raises:
            DataError: If there is no run in it.
        """
        run = cls(path)
        if not run.file("run.json").is_file():
            raise DataError(f"{path} is no run directory: it has no run.json")
        return run

    def file(self, name: str) -> Path:
        """Path of a file in the directory."""
        return self.path / name

    def claim(self) -> None:
        """Makes sure that no other process writes here, until this one ends.

        Raises:
            ConfigError: If another process is at work here.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(self.file(".lock"), os.O_CREAT | os.O_RDWR, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.release()
            raise ConfigError(
                f"another search is running in {self.path}; wait for it, or choose another run_dir"
            ) from None

    def release(self) -> None:
        """Lets other processes write here."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def resume(self, config: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> bool:
        """Returns whether an earlier run is here to go on with.

        Args:
            config: The settings asked for now.
            facts: The run's identity now; its model and data must be those of the earlier run.

        Raises:
            ConfigError: If it ran with other settings, on another model or on other data; the message names the first
                that differs.
        """
        if not self.file("run.json").is_file():
            return False
        info = self.info()
        for key, name in (("model", "another model"), ("data_fingerprint", "other data")):
            if facts is not None and key in info and info[key] != facts[key]:
                raise ConfigError(
                    f"{self.path} holds a run on {name}: what it measured does not apply here; choose another run_dir"
                )
        earlier = flat(info["config"])
        given = flat(json.loads(json.dumps(dict(config))))
        for key in [*earlier, *(key for key in given if key not in earlier)]:
            if key.split(".")[0] not in UNRELATED and earlier.get(key) != given.get(key):
                raise ConfigError(
                    f"{self.path} holds a run with {key}={earlier.get(key)}, and now {key}={given.get(key)}; "
                    "choose another run_dir, or repeat the run's own settings to resume it"
                )
        return True

    def info(self) -> dict[str, Any]:
        """What run.json says."""
        return dict(json.loads(self.file("run.json").read_text(encoding="utf-8")))

    def update(self, **values: Any) -> None:
        """Changes some entries of run.json."""
        known = self.info() if self.file("run.json").is_file() else {}
        write_json(self.file("run.json"), known | values)

    def layers(self) -> list[dict[str, Any]]:
        """The network's layers."""
        return list(json.loads(self.file("layers.json").read_text(encoding="utf-8")))

    def write_network(self, network: Network) -> None:
        """Writes network.json and layers.json."""
        write_json(self.file("network.json"), network.to_dict())
        self.write_layers(network.to_rows())

    def write_layers(self, rows: list[dict[str, Any]]) -> None:
        """Writes layers.json."""
        write_json(self.file("layers.json"), rows)

    def network(self) -> Network:
        """The network as it was traced.

        Raises:
            DataError: If the run does not say.
        """
        path = self.file("network.json")
        if not path.is_file():
            raise DataError(f"{self.path} has no network.json: it is the run of an earlier version, or did not get far")
        return Network.from_dict(json.loads(path.read_text(encoding="utf-8")))

    def write_table(self, name: str, table: pd.DataFrame) -> None:
        """Writes a table as CSV or Parquet, by the name's ending."""
        with replacing(self.file(name)) as aside:
            table.to_csv(aside, index=False) if name.endswith(".csv") else table.to_parquet(aside, index=False)

    def table(self, name: str) -> pd.DataFrame | None:
        """Reads `front.csv`, `history.csv`, `sensitivity.parquet` or `costs.parquet`; None where the run has none."""
        import pandas as pd

        if not self.file(name).is_file():
            return None
        return pd.read_csv(self.file(name)) if name.endswith(".csv") else pd.read_parquet(self.file(name))

    def trials(self) -> list[Trial]:
        """Every policy tried, in order."""
        return TrialLog(self.file("trials.jsonl")).trials

    def plan(self) -> Plan | None:
        """The winning plan; None while there is none."""
        return Plan.load(self.file("plan.json")) if self.file("plan.json").is_file() else None

    def measurements(self) -> MeasurementLog:
        """The qualities measured on the report split so far."""
        return MeasurementLog(self.file("report.jsonl"))


def find_runs(paths: Iterable[str | Path]) -> list[RunDirectory]:
    """The runs in folders, or in folders anywhere below them, each once, in the order of their paths.

    Args:
        paths: Run directories, sweeps, run roots, or any folder that holds such.

    Raises:
        DataError: If one of them does not exist, or holds no run.
    """
    found: dict[Path, RunDirectory] = {}
    for path in map(Path, paths):
        if not path.exists():
            raise DataError(f"{path} does not exist; give a run directory, or a folder that holds some")
        folders = [file.parent for file in sorted(path.rglob("run.json"))]
        if not folders:
            raise DataError(f"{path} holds no run: there is no run.json in it or below it")
        found |= {folder.resolve(): RunDirectory(folder) for folder in folders}
    return list(found.values())


class MeasurementLog:
    """Qualities measured on the report split, by policy digest; a resumed run measures none of them again."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)
        self._known = {row["digest"]: row for row in self._lines.read()}

    def get(self, digest: str) -> Quality | None:
        """The quality of a policy, if it was measured."""
        from search.quality.evaluate import Quality

        return Quality.from_dict(self._known[digest]) if digest in self._known else None

    def add(self, digest: str, quality: Quality) -> Quality:
        """Records a quality and returns it."""
        self._known[digest] = {"digest": digest, **quality.to_dict()}
        self._lines.append(self._known[digest])
        return quality


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted keys; lists stay values."""
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            rows |= flat(value, f"{prefix}{key}.")
        else:
            rows[f"{prefix}{key}"] = value
    return rows
