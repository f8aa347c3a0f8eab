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

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hwmodels import Network
from search.claims import Claim, is_claimed
from search.errors import ConfigError, DataError
from search.files import JsonLines, read_json, replacing, write_json
from search.trials import Trial, TrialLog

if TYPE_CHECKING:
    import pandas as pd

    from search.plan import Plan
    from search.quality.evaluate import Quality

ARTIFACTS = ("mlartifacts", "mlruns")
"""Folders in which MLflow keeps files."""

EVALUATIONS, TABLES = "evaluations", "scores"
"""Folders of a run root that all runs share: what policies scored, and sensitivity tables."""

WORKERS = "workers"
"""Folder of a run where several work on one search."""

UNRELATED = ("tracking", "run_dir", "run_root", "workers", "study")
"""Settings that may change when a run is resumed: they do not touch what is searched."""

WRITE_AGAIN = "delete it and resume the run, which writes it again"
MOVE_AWAY = (
    "put it back from a copy, or move the run's directory away and search again: what was measured comes from the "
    "evaluation store"
)


class RunDirectory:
    """Reads and writes the files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._claim = Claim(self.path)

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
            FileError: If the directory cannot be written.
        """
        self._claim.take()

    def release(self) -> None:
        """Lets other processes write here."""
        self._claim.release()

    @property
    def is_claimed(self) -> bool:
        """Whether a process is at work here."""
        return is_claimed(self.path)

    def resume(self, config: Mapping[str, Any], facts: Mapping[str, Any] | None = None) -> bool:
        """Returns whether an earlier run is here to go on with.

        Args:
            config: The settings asked for now.
            facts: The run's identity now; its model and data must be those of the earlier run.

        Raises:
            ConfigError: If it ran with other settings, on another model or on other data; the message names the first
                that differs.
            DataError: If run.json is damaged.
        """
        if not self.file("run.json").is_file():
            return False
        info = self.info()
        if not {"config", "run_id", "started", "status"} <= info.keys():
            raise DataError(f"{self.file('run.json')} does not say what was run; {MOVE_AWAY}")
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
        """What run.json says.

        Raises:
            DataError: If it is damaged.
        """
        info = read_json(self.file("run.json"), MOVE_AWAY)
        if not isinstance(info, dict):
            raise DataError(f"{self.file('run.json')} is damaged: it holds a {type(info).__name__}; {MOVE_AWAY}")
        return info

    def update(self, **values: Any) -> None:
        """Changes some entries of run.json."""
        known = self.info() if self.file("run.json").is_file() else {}
        write_json(self.file("run.json"), known | values)

    def layers(self) -> list[dict[str, Any]]:
        """The network's layers."""
        return list(read_json(self.file("layers.json"), WRITE_AGAIN))

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
        return Network.from_dict(read_json(path, WRITE_AGAIN))

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
        from search.plan import Plan

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
        runs = runs_below(path)
        if not runs:
            raise DataError(f"{path} holds no run: there is no run.json in it or below it")
        found |= {run.path.resolve(): run for run in runs}
    return list(found.values())


def runs_below(folder: Path) -> list[RunDirectory]:
    """The runs in a folder or anywhere below it, in the order of their paths.

    Copies of a run's files among MLflow's artifacts are no runs, nor is what a merge has not copied in full.
    """
    files = [file.relative_to(folder) for file in sorted(folder.rglob("run.json"))]
    return [
        RunDirectory(folder / file.parent)
        for file in files
        if not any(part.startswith(".") or part in ARTIFACTS for part in file.parts)
    ]


class MeasurementLog:
    """Qualities measured on the report split, by policy digest; a resumed run measures none of them again."""

    def __init__(self, path: Path) -> None:
        self._lines = JsonLines(path)
        self._known = dict(self._lines.read_as(lambda row: (row["digest"], row)))

    def get(self, digest: str) -> Quality | None:
        """The quality of a policy, if it was measured."""
        from search.quality.evaluate import Quality

        return Quality.from_dict(self._known[digest]) if digest in self._known else None

    def add(self, digest: str, quality: Quality) -> Quality:
        """Records a quality and returns it."""
        self._known[digest] = {"digest": digest, **quality.to_dict()}
        self._lines.append(self._known[digest])
        return quality


def settings_digest(config: Mapping[str, Any]) -> str:
    """Sixteen hexadecimal digits of the settings that matter to what is searched."""
    related = {key: value for key, value in config.items() if key not in UNRELATED}
    return hashlib.sha256(json.dumps(related, sort_keys=True).encode()).hexdigest()[:16]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted keys; lists stay values."""
    rows: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            rows |= flat(value, f"{prefix}{key}.")
        else:
            rows[f"{prefix}{key}"] = value
    return rows
