"""The mirror of a run directory in MLflow: one run per search, a child run and a model for every plan on the front.

The run directory is the truth. What MLflow is to show is put together from it (`search.portrait`), then compared with
what the store has, and only what is missing is written: syncing twice, after a crash, or into an empty store all end in
the same runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from search.portrait import Point, Portrait, portray, read_plan
from search.rundir import RunDirectory
from search.tracking.settings import TrackingSettings
from search.tracking.store import Store, TrackingError, connected, locked, tracking_uri, without_password
from search.tracking.tables import PLAN_FILES, TABLES, files, tables

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

MODEL_TYPE = "bitplan-plan"
"""The kind of MLflow model that a plan on a front is."""

PASSING = ("error", "digest", "verdict")
"""Tags that a search may lose again: what came of an earlier attempt, before it was resumed."""


def sync(run: RunDirectory, settings: TrackingSettings, run_root: Path) -> str:
    """Makes MLflow show a run as its directory has it now, whatever MLflow knew of it before.

    Args:
        run: The run.
        settings: Where to; `enabled` is not asked.
        run_root: The folder of `mlflow.db` and `mlartifacts`, which are used unless another store is configured.

    Returns:
        The tracking URI, without any password.

    Raises:
        DataError: If there is no run in the directory, or a file of it is damaged.
        TrackingError: If the store cannot be reached or refuses.
    """
    run = RunDirectory.existing(run.path)
    trials = run.trials()
    portrait, found = portray(run, trials), tables(run, trials, read_plan(run))
    uri = tracking_uri(settings.uri, run_root)
    with connected(uri, run_root) as store:
        Mirror(store, run, settings.experiment).show(portrait, found)
    return without_password(uri)


class Mirror:
    """One search as MLflow shows it; what it shows is asked for once and remembered."""

    def __init__(
        self, store: Store, run: RunDirectory, experiment: str | None = None, alive: Callable[[], None] = lambda: None
    ) -> None:
        """Creates the mirror; nothing is written yet.

        Args:
            store: Where to.
            run: The run.
            experiment: Name of the experiment; None means `bitplan/TASK`.
            alive: Called after every piece of work, as a sign of life.
        """
        self._store = store
        self._client: MlflowClient = store.client
        self._run = run
        self._experiment = experiment
        self._alive = alive
        self._parent: _Shown | None = None
        self._sent: dict[Path, tuple[int, int]] = {}  # files to their time of change and size
        self._sent_tables: dict[str, str] = {}

    def follow(self, portrait: Portrait) -> None:
        """Shows the numbers of a search on its way."""
        with locked(self._run.file(".mlflow.lock"), self._alive):
            is_first = self._parent is None
            parent = self._begin(portrait)
            with self._store.turn():
                parent.log(portrait)
                if not parent.is_closed(portrait):  # an earlier attempt ended
                    parent.close(portrait)
            if is_first:
                self._write_files(parent)

    def show(self, portrait: Portrait, tables: Mapping[str, pd.DataFrame]) -> None:
        """Shows everything; the status comes last, so that a run cut short is seen to be incomplete."""
        with locked(self._run.file(".mlflow.lock"), self._alive):
            parent = self._begin(portrait)
            with self._store.turn():
                parent.log(portrait)
            if portrait.ended is not None:
                self._show_front(parent, portrait)
            self._write_files(parent)
            self._write_tables(parent, tables)
            with self._store.turn():
                parent.close(portrait)

    def _begin(self, portrait: Portrait) -> _Shown:
        """Finds or creates the run of the search."""
        if self._parent is None:
            with self._store.turn():
                home = self._home(self._experiment or f"bitplan/{portrait.tags['task']}", portrait.tags["task"])
                own = {"bitplan.run_id": portrait.tags["bitplan.run_id"], "role": "search"}
                found = self._runs(home, own)
                self._parent = _Shown(self._client, found[0] if found else self._create(home, portrait))
                for double in found[1:]:  # left by a server that created a run and did not live to say so
                    self._client.delete_run(double.info.run_id)
        return self._parent

    def _show_front(self, parent: _Shown, portrait: Portrait) -> None:
        """Brings the plans on the front up to date, and deletes those that are no longer on it."""
        own = {"bitplan.run_id": portrait.tags["bitplan.run_id"]}
        link = {"mlflow.parentRunId": parent.run_id}
        runs = self._runs(parent.home, own | link)
        run_of = {_plan_key(run.data.tags): run for run in runs}
        models = self._store.models([parent.home], _having(own))
        model_of = {_plan_key(model.tags): model for model in reversed(models)}
        kept = set()
        outputs_of = [parent] if portrait.status == "FINISHED" else []  # a search resumed may choose another plan
        for child in portrait.children:
            key = _plan_key(child.tags)
            with self._store.turn():
                shown = _Shown(self._client, run_of.get(key) or self._create(parent.home, child, link))
                model = model_of.get(key) or self._create_model(parent, shown, child)
                self._link(model, [shown, *(outputs_of if child.tags["role"] == "winner" else [])])
                shown.log(child, model)
                if not shown.is_closed(child):
                    self._client.log_dict(shown.run_id, dict(child.policy), "policy.json")
                    shown.close(child)
                if any(model.tags.get(name) != value for name, value in child.tags.items()):
                    self._client.set_logged_model_tags(model.model_id, dict(child.tags))
                if str(model.status) != "READY":
                    self._finish(model, child)
            kept |= {shown.run_id, model.model_id}
            self._alive()
        with self._store.turn():
            for run in runs:
                if run.info.run_id not in kept:
                    self._client.delete_run(run.info.run_id)
            for model in models:
                if model.model_id not in kept:
                    self._client.delete_logged_model(model.model_id)

    def _create_model(self, parent: _Shown, shown: _Shown, child: Portrait) -> LoggedModel:
        """Creates the model of a plan on the front."""
        name = re.sub(r"[/:.%\"']", "_", f"{parent.name} trial {child.tags['trial']}")
        return self._client.create_logged_model(
            parent.home, name, shown.run_id, dict(child.tags), dict(child.parameters), MODEL_TYPE
        )

    def _link(self, model: LoggedModel, homes: Iterable[_Shown]) -> None:
        """Makes a model an output of runs."""
        from mlflow.entities import LoggedModelOutput

        for home in homes:
            if model.model_id not in home.outputs:
                self._client.log_outputs(home.run_id, [LoggedModelOutput(model.model_id, 0)])
                home.outputs.add(model.model_id)

    def _finish(self, model: LoggedModel, child: Portrait) -> None:
        """Puts the plan into its model, where it is the one that has files, and says that the model is complete."""
        if child.tags["role"] == "winner":
            for path in filter(Path.is_file, map(self._run.file, PLAN_FILES)):
                self._client.log_model_artifact(model.model_id, str(path))
        else:
            with TemporaryDirectory() as folder:
                path = Path(folder) / "policy.json"
                path.write_text(json.dumps(dict(child.policy), indent=2), encoding="utf-8")
                self._client.log_model_artifact(model.model_id, str(path))
        self._client.finalize_logged_model(model.model_id, "READY")

    def _write_files(self, parent: _Shown) -> None:
        """Writes the files that changed since they were last written."""
        for path, folder in files(self._run):
            about = path.stat()
            state = (about.st_mtime_ns, about.st_size)
            if self._sent.get(path) != state:
                self._client.log_artifact(parent.run_id, str(path), folder)
                self._sent[path] = state
                self._alive()

    def _write_tables(self, parent: _Shown, found: Mapping[str, pd.DataFrame]) -> None:
        """Writes tables as `MlflowClient.log_table` does, which would add to those that are there already."""
        with TemporaryDirectory() as folder:
            for name, table in found.items():
                text = table.to_json(orient="split", index=False, date_format="iso")
                if self._sent_tables.get(name) != text:
                    path = Path(folder) / f"{name}.json"
                    path.write_text(text, encoding="utf-8")
                    self._client.log_artifact(parent.run_id, str(path), TABLES)
                    self._sent_tables[name] = text
        listed = json.dumps([{"path": f"{TABLES}/{name}.json", "type": "table"} for name in found])
        if found and parent.tags.get("mlflow.loggedArtifacts") != listed:
            self._client.set_tag(parent.run_id, "mlflow.loggedArtifacts", listed)

    def _home(self, name: str, task: str) -> str:
        """Returns the id of an experiment; where another machine creates it at the same time, that one's."""
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(name)
        if found is None:
            tags = {
                "mlflow.note.content": f"Searches of bit widths for the task {task}: a run per search, a child run and "
                "a model per plan on its front.",
                "mlflow.experimentKind": "custom_model_development",  # else the page asks what the experiment is about
            }
            try:
                return str(self._client.create_experiment(name, self._store.artifacts, tags))
            except MlflowException as error:
                found = self._client.get_experiment_by_name(name)
                if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                    raise
        if found.lifecycle_stage != "active":
            raise TrackingError(
                f"MLflow's experiment {name!r} is deleted; restore it, or choose another tracking.experiment"
            )
        return str(found.experiment_id)

    def _runs(self, home: str, tags: Mapping[str, str]) -> list[Run]:
        """Lists the runs with these tags, oldest first."""
        oldest = ["attributes.start_time ASC"]
        return list(self._client.search_runs([home], _having(tags), order_by=oldest, max_results=10_000))

    def _create(self, home: str, portrait: Portrait, link: Mapping[str, str] | None = None) -> Run:
        return self._client.create_run(home, portrait.started, {**portrait.tags, **(link or {})}, portrait.name)


class _Shown:
    """A run in MLflow, and what it is known to show."""

    def __init__(self, client: MlflowClient, run: Run) -> None:
        self._client = client
        self._info = run.info
        self._values = dict(run.data.metrics)
        self._parameters = set(run.data.params)
        self._points: dict[str, set[tuple[int, int]]] = {}
        self.tags = dict(run.data.tags)
        self.run_id: str = run.info.run_id
        self.home: str = run.info.experiment_id
        self.name: str = run.info.run_name
        self.outputs = {model.model_id for model in (run.outputs.model_outputs if run.outputs else [])}

    def log(self, portrait: Portrait, model: LoggedModel | None = None) -> None:
        """Writes points, values and parameters that are missing and tags that differ, and deletes those of the past.

        The client cuts the batches.

        Args:
            portrait: What to show.
            model: The model of the plan, which gets the values, too.
        """
        from mlflow.entities import Metric, Param, RunTag

        points = [point for point in portrait.series if self._lacks(point)]
        on_model = {metric.key: metric.value for metric in model.metrics or []} if model else self._values
        metrics = [Metric(point.key, point.value, point.time, point.step) for point in points]
        metrics += [
            Metric(key, value, portrait.ended or portrait.started, 0, model_id=model.model_id if model else None)
            for key, value in portrait.values.items()
            if self._values.get(key) != value or on_model.get(key) != value
        ]
        parameters = [Param(key, value) for key, value in portrait.parameters.items() if key not in self._parameters]
        tags = [RunTag(key, value) for key, value in portrait.tags.items() if self.tags.get(key) != value]
        if metrics or parameters or tags:
            self._client.log_batch(self.run_id, metrics, parameters, tags)
        for point in points:
            self._points[point.key].add((point.step, point.time))
        for key in PASSING:
            if key in self.tags and key not in portrait.tags:
                self._client.delete_tag(self.run_id, key)
                del self.tags[key]
        self._values |= portrait.values
        self._parameters |= set(portrait.parameters)
        self.tags |= portrait.tags

    def is_closed(self, portrait: Portrait) -> bool:
        """Whether it shows the status already."""
        return bool(self._info.status == portrait.status and self._info.end_time == portrait.ended)

    def close(self, portrait: Portrait) -> None:
        """Shows how the run ended, or that it is at work."""
        if portrait.ended is None:
            self._client.update_run(self.run_id, portrait.status)
        else:
            self._client.set_terminated(self.run_id, portrait.status, portrait.ended)

    def _lacks(self, point: Point) -> bool:
        """Whether a point of a series is missing; what is there of a series is asked for once."""
        if point.key not in self._points:
            there = self._client.get_metric_history(self.run_id, point.key) if point.key in self._values else ()
            self._points[point.key] = {(old.step, old.timestamp) for old in there}
        return (point.step, point.time) not in self._points[point.key]


def _plan_key(tags: Mapping[str, str]) -> tuple[str, ...]:
    """What a plan on the front is told from others by: one that was not the winner, say, had other files."""
    return tuple(tags[name] for name in ("trial", "role", "digest"))


def _having(tags: Mapping[str, Any]) -> str:
    """The condition that runs or models have these tags, as MLflow's searches read it."""
    return " AND ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
