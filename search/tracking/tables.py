"""What lies beside a run's numbers in MLflow: its files, and tables that the artifact pane draws."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from search.rundir import RunDirectory
from search.trials import Trial

if TYPE_CHECKING:
    import pandas as pd

FILES = (
    *("layers.json", "log.jsonl", "trials.jsonl", "front.csv", "history.csv"),
    *("plan.json", "report.html"),
)
"""Without run.json, as what holds that is taken for a run directory."""

FOLDERS = ("figures", ".hydra")
PLAN_FILES = ("plan.json", "plan.safetensors")
"""What the model of the winning plan holds."""

TABLES = "tables"
"""The folder of tables, `tables/NAME.json`, in the artifacts of a search."""


def files(run: RunDirectory) -> Iterator[tuple[Path, str | None]]:
    """Yields the files of a run that are there, and the folders of the artifacts that they belong in."""
    yield from ((path, None) for path in map(run.file, FILES) if path.is_file())
    for folder in filter(Path.is_dir, map(run.file, FOLDERS)):
        yield from ((path, folder.name) for path in sorted(folder.iterdir()) if path.is_file())


def tables(run: RunDirectory, trials: Iterable[Trial], plan: Mapping[str, Any] | None) -> dict[str, pd.DataFrame]:
    """The tables of a search: its trials, its front and the layers of the chosen plan, as far as they are there."""
    found = {"trials": trial_table(trials)}
    front = run.table("front.csv")
    if front is not None:
        found["front"] = front.drop(columns="policy")
    if plan is not None:
        found["layers"] = layer_table(plan)
    return {name: table for name, table in found.items() if len(table)}


def trial_table(trials: Iterable[Trial]) -> pd.DataFrame:
    """Every trial, without its policy: one row each, costs in SI units."""
    import pandas as pd

    return pd.DataFrame(
        {
            **{"trial": trial.number, "state": trial.state},
            **trial.metrics,
            **trial.cost,
            **{"fidelity": trial.fidelity, "seconds": trial.seconds},
        }
        for trial in trials
    )


def layer_table(plan: Mapping[str, Any]) -> pd.DataFrame:
    """What every layer of a plan gets and costs."""
    import pandas as pd

    columns = ("name", "kind", "weight", "input", "weight_bytes", "bit_ops", "latency_s", "energy_j", "compute", "tier")
    return pd.DataFrame([{name: layer[name] for name in columns} for layer in plan["layers"]])
