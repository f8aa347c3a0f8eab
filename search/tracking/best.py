"""Asking MLflow for the best plan: one search of the models that plans on fronts are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from search.budget import RATIOS, ROUNDING, Budget
from search.errors import ConfigError, DataError, closest
from search.plan import Plan
from search.portrait import read_plan
from search.rundir import RunDirectory
from search.tracking.mirror import MODEL_TYPE
from search.tracking.store import Store, connected, sqlite_file, without_password
from search.units import COST_NAMES

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel

PAGE = 100
"""Plans that one search returns: enough to show the best few once, however many searches found them."""

SHORT = 8
"""Letters of a fingerprint that are shown."""

RANKS = ("selection_drop", "drop", "certain_drop", *COST_NAMES, *RATIOS)
"""What plans may be ranked by, the least first."""


@dataclass(frozen=True)
class Question:
    """What plan is asked for.

    Attributes:
        task: Name of the task.
        hardware: Name of the device.
        budget: The limits it must keep; ratios are against the float model.
        rank: What the best has the least of; None is the drop of quality on the selection split, or the cost where the
            budget limits the drop. Were it the drop on the report split, that would no longer tell of data on which
            nothing was chosen.
        winners_only: Whether to ask only for plans that searches chose and wrote as files.
        model: How the network's fingerprint begins, where several go by the task's name.
        data: How the data's fingerprint begins, likewise.
    """

    task: str
    hardware: str
    budget: Budget
    rank: str | None = None
    winners_only: bool = False
    model: str = ""
    data: str = ""

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank not in RANKS:
            raise ConfigError(
                f"--metric {self.rank} is unknown{closest(self.rank, RANKS)}; allowed: {', '.join(RANKS)}"
            )
        asked = {"task": self.task, "hardware": self.hardware, "model": self.model, "data": self.data}
        for name, value in asked.items():
            if "'" in value:
                raise ConfigError(f"--{name} {value} has a quotation mark, which MLflow cannot search for")

    @property
    def limits(self) -> dict[str, float]:
        """The limits, by the metric they are on."""
        given = self.budget.given()
        return {"certain_drop" if name == "quality_drop" else name: limit for name, limit in given.items()}

    @property
    def order(self) -> list[str]:
        """What plans are ranked by: ties in the first are broken by the second."""
        costs = [name for name in self.budget.given() if name != "quality_drop"] or ["weight_bytes"]
        drop = "selection_drop"
        usual = [drop, costs[0]] if self.budget.quality_drop is None else [costs[0], drop]
        return list(dict.fromkeys([self.rank, *usual] if self.rank else usual))


@dataclass(frozen=True)
class Found:
    """A plan on the front of a search, as MLflow knows it.

    Attributes:
        name: The model's name.
        model_id: The model's id.
        run_id: MLflow's id of the child run that shows it, which has `policy.json`.
        artifacts: Where the model's files lie.
        tags: Among them `task`, `hardware`, `strategy`, `seed`, `role`, `digest`, `verdict` and `workload`; `model`
            and `data` are fingerprints.
        values: Quality on the report split and costs in SI units.
    """

    name: str
    model_id: str
    run_id: str
    artifacts: str
    tags: Mapping[str, str]
    values: Mapping[str, float]

    @property
    def subject(self) -> tuple[str, str, str]:
        """What its quality is of: metric, fingerprint of the network, and that of the data."""
        return self.tags.get("metric", "quality"), self.tags.get("model", "unknown"), self.tags.get("data", "unknown")

    @property
    def run_dir(self) -> Path:
        """The directory of its search, where that is on this machine."""
        return Path(self.tags["bitplan.run_dir"])

    @property
    def is_winner(self) -> bool:
        """Whether its search chose it, so that it is a file."""
        return self.tags["role"] == "winner"

    @property
    def plan_file(self) -> Path | None:
        """Its file in the run directory; None where it has none, or the directory is not here."""
        plan = read_plan(RunDirectory(self.run_dir)) if self.is_winner else None
        return self.run_dir / "plan.json" if plan and plan["digest"] == self.tags["digest"] else None

    @property
    def substitutes(self) -> str:
        """Where the policy of a plan without a file is found, and what else there is to be had as a file."""
        run = RunDirectory(self.run_dir)
        beside = f" and {run.file('front.csv')}" * run.file("front.csv").is_file()
        said = [
            f"its policy is in policy.json of MLflow's run {self.run_id}{beside}",
            "for a plan that is a file, add --winners",
        ]
        if run.file("sensitivity.npz").is_file():
            size = f"budget.weight_bytes={self.values['weight_bytes']:.17g}"
            said.append(f"another plan of that size, solved anew: bitplan resolve {self.run_dir} {size} --measure 1")
        return "; ".join(said)


def find_best(question: Question, uri: str, run_root: Path) -> list[Found]:
    """Finds the plans that keep a budget, best first and each policy once, with one search of the store.

    Args:
        question: What is asked for.
        uri: MLflow's tracking URI.
        run_root: The folder of `mlflow.db`, for messages.

    Raises:
        ConfigError: If the store has no plan for the task or the device, none within the budget, or none that knows
            what is to be ranked by; or if those it has are of several networks, data sets or metrics.
        TrackingError: If the store cannot be reached.
    """
    database = sqlite_file(uri)
    if database and not database.exists():
        raise ConfigError(
            f"there is no MLflow database {database}; name the run root with --root, or a store with --uri"
        )
    with connected(uri, run_root) as store:
        homes = [str(home.experiment_id) for home in store.client.search_experiments(max_results=1000)]
        conditions = [f"metrics.{name} <= {limit * (1 + ROUNDING):.17g}" for name, limit in question.limits.items()]
        if question.winners_only:
            conditions.append("tags.role = 'winner'")
        models = _search(store, homes, question, conditions, question.order)
        if not models:
            raise ConfigError(_nothing(store, homes, question, without_password(uri)))
        if question.rank and question.rank not in models[0].values:  # those that have it come first
            raise ConfigError(_unranked(question.rank, models))
    if len({model.subject for model in models}) > 1:
        raise ConfigError(_several(question, models))
    once = {(model.tags["digest"], model.tags.get("workload")): model for model in reversed(models)}
    return [model for model in models if once[model.tags["digest"], model.tags.get("workload")] is model]


def fetch_plan(found: Found, uri: str, out: Path) -> Plan:
    """Writes a plan and its tensors from the run directory, or from MLflow where that is not on this machine.

    Raises:
        ConfigError: If the plan has no file of its own.
        TrackingError: If MLflow does not hand it out.
    """
    if not found.is_winner:
        raise ConfigError(
            f"trial {found.tags['trial']} is on the front of its search, but only winners are files; "
            f"{found.substitutes}"
        )
    if found.plan_file:
        plan = Plan.load(found.plan_file)
    else:
        with connected(uri, out.parent), TemporaryDirectory() as folder:
            from mlflow.artifacts import download_artifacts

            here = download_artifacts(artifact_uri=found.artifacts, dst_path=folder, tracking_uri=uri)
            plan = Plan.load(Path(here) / "plan.json")
    if plan.digest != found.tags["digest"]:
        raise DataError(
            f"MLflow's files of {found.name} hold plan {plan.digest}, not {found.tags['digest']}: sync again"
        )
    plan.save(out)
    return plan


def _search(
    store: Store, homes: list[str], question: Question, conditions: Iterable[str], order: Iterable[str]
) -> list[Found]:
    subject = [
        f"model_type = '{MODEL_TYPE}'",
        f"tags.task = '{question.task}'",
        f"tags.hardware = '{question.hardware}'",
        *(f"tags.{name} LIKE '{given}%'" for name in ("model", "data") if (given := getattr(question, name))),
    ]
    ranks = [{"field_name": f"metrics.{name}", "ascending": True} for name in order]
    found = store.client.search_logged_models(homes, " AND ".join([*subject, *conditions]), None, PAGE, ranks)
    return [_found(model) for model in found]


def _found(model: LoggedModel) -> Found:
    values = {metric.key: metric.value for metric in model.metrics or []}
    return Found(model.name, model.model_id, str(model.source_run_id), model.artifact_location, model.tags, values)


def _nothing(store: Store, homes: list[str], question: Question, where: str) -> str:
    """Says why there is no answer: the nearest names that there are, or how far the nearest plans are."""
    known = store.models(homes, f"model_type = '{MODEL_TYPE}'")
    tasks = sorted({model.tags["task"] for model in known})
    devices = sorted({model.tags["hardware"] for model in known if model.tags["task"] == question.task})
    if not known:
        return f"MLflow at {where} holds no plans; run a search with tracking, or `bitplan sync` finished ones"
    if question.task not in tasks:
        return (
            f"MLflow at {where} holds no plan for task {question.task}{closest(question.task, tasks)}; "
            f"there are plans for {', '.join(tasks)}"
        )
    if question.hardware not in devices:
        return (
            f"MLflow at {where} holds no plan for {question.task} on hardware {question.hardware}"
            f"{closest(question.hardware, devices)}; there are plans for {', '.join(devices)}"
        )
    subject = (question.task, question.hardware)
    found = [_found(model) for model in known if (model.tags["task"], model.tags["hardware"]) == subject]
    for name in ("model", "data"):
        asked, there = getattr(question, name), sorted({plan.tags.get(name, "unknown") for plan in found})
        found = [plan for plan in found if plan.tags.get(name, "").startswith(asked)]
        if not found:
            return (
                f"no plan for {question.task} on {question.hardware} has a {name} fingerprint that begins with "
                f"{asked}; there are {', '.join(each[:SHORT] for each in there)}"
            )
    kind = "plans"
    if question.winners_only:
        winners = [plan for plan in found if plan.is_winner]
        if not winners:
            return (
                f"none of the {len(found)} plans for {question.task} on {question.hardware} is a winner; "
                "leave out --winners"
            )
        found, kind = winners, "winners"
    rows = [plan.values for plan in found]
    least = {name: min((row[name] for row in rows if name in row), default=None) for name in question.limits}
    reach = ", ".join(f"{name} {'unknown' if value is None else format(value, '.6g')}" for name, value in least.items())
    return (
        f"none of the {len(found)} {kind} for {question.task} on {question.hardware} keeps the budget; "
        f"the least that any of them has: {reach}"
    )


def _several(question: Question, found: Iterable[Found]) -> str:
    """Says of what the plans are that go by one task's name, and how to choose."""
    counted = Counter(plan.subject for plan in found)
    said = "; ".join(
        f"{metric} of model {model[:SHORT]} on data {data[:SHORT]} ({count} plans)"
        for (metric, model, data), count in counted.most_common()
    )
    return (
        f"task {question.task} on {question.hardware} is the name of {len(counted)} things that cannot be compared: "
        f"{said}; choose with --model or --data, or sync again what an older version wrote"
    )


def _unranked(rank: str, found: Iterable[Found]) -> str:
    """Says that no plan knows what is to be ranked by, and what they do know."""
    known = {name for plan in found for name in plan.values}
    return (
        f"--metric {rank} is known of no plan that was found; known are {', '.join(filter(known.__contains__, RANKS))}"
    )
