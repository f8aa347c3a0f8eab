"""What may be compared with what: runs of one task, on one device, and of one strategy in all its seeds."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from search.budget import budget_words
from search.comparison.gather import Run
from search.rundir import UNRELATED

MOST_SETTINGS = 3
"""Settings that the name of an arm tells before it only counts them."""

MOST_LETTERS = 24
"""Letters of a setting's value that the name of an arm holds before it leaves out its middle."""

VERDICTS = ("met", "undecided", "missed")
"""From the best to the worst."""


@dataclass(frozen=True)
class Entry:
    """A run and where it belongs.

    Attributes:
        run: The run.
        name: The part of its path that tells it from the others.
        group: The task; runs of one group judge the same model on the same data.
        place: The device, and its workload where runs differ in it; costs of one place compare.
        arm: The strategy, and its settings where runs of it differ; runs of one arm differ in nothing but the seed.
        budget: The budget in a few words.
        rank: 0 for the best run of its group and place by its budget, counted on from there by budget.
        is_best: Whether it is the best of its group, place and budget.
    """

    run: Run
    name: str
    group: str
    place: str
    arm: str
    budget: str
    rank: int
    is_best: bool


def sort_runs(runs: Sequence[Run]) -> list[Entry]:
    """Says of every run where it belongs; entries come by group, place, arm and seed."""
    groups = _groups(runs)
    places = _named(runs, lambda run: (groups[run.run_id], run.hardware), _of_place, lambda run: run.hardware)
    arms = _named(
        runs, lambda run: (groups[run.run_id], places[run.run_id], run.strategy), _of_arm, lambda run: run.strategy
    )
    names = _short_paths(runs)
    together: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        together[groups[run.run_id], places[run.run_id]].append(run)
    entries = []
    for (group, place), members in sorted(together.items()):
        ranked = sorted(members, key=lambda run: (_budget(run), _merit(run)))
        seen: set[str] = set()
        for rank, run in enumerate(ranked):
            budget = _budget(run)
            is_best = run.plan is not None and budget not in seen
            seen.add(budget)
            entries.append(Entry(run, names[run.run_id], group, place, arms[run.run_id], budget, rank, is_best))
    return sorted(entries, key=lambda entry: (entry.group, entry.place, entry.arm, entry.run.seed, entry.name))


def _merit(run: Run) -> tuple[float, ...]:
    """Smaller is better: the verdict, then what was searched for, by the selection split, as the search itself picks.

    Where that is equal, the primary cost decides, or the drop where that is what the budget limits.
    """
    if run.plan is None:
        return (len(VERDICTS), math.inf, math.inf)
    cost = run.plan.cost.get(run.primary_cost)
    price = cost.value if cost and cost.value is not None else math.inf
    losses = (run.plan.selection.drop, price)
    return (VERDICTS.index(run.plan.budget.verdict), *(losses if run.drop_limit is None else losses[::-1]))


def _budget(run: Run) -> str:
    """What a run's budget is called."""
    return budget_words(run.budget, run.reference)


def _groups(runs: Sequence[Run]) -> dict[str, str]:
    """The group of every run: its task, with fingerprints where runs of that name are about different things."""
    kinds: dict[str, set[tuple[str, ...]]] = defaultdict(set)
    for run in runs:
        kinds[run.task].add((run.model, run.data, run.metric))
    names = {}
    for run in runs:
        models, datas, metrics = map(set, zip(*kinds[run.task], strict=True))
        parts = [
            *([f"model {run.model[:6]}"] if len(models) > 1 else []),
            *([f"data {run.data[:6]}"] if len(datas) > 1 else []),
            *([run.metric] if len(metrics) > 1 else []),
        ]
        names[run.run_id] = f"{run.task} ({', '.join(parts)})" if parts else run.task
    return names


def _of_place(run: Run) -> dict[str, Any]:
    return {key: value for key, value in run.config.items() if key.split(".")[0] in ("hardware", "workload")}


def _of_arm(run: Run) -> dict[str, Any]:
    """The settings that make a search what it is, beside where it runs and its seeds."""
    elsewhere = (*UNRELATED, "task", "hardware", "workload")
    settings: dict[str, Any] = {}
    for key, value in run.config.items():
        parts = key.split(".")
        if parts[0] not in (*elsewhere, "budget") and parts[-1] != "seed":
            settings[key.removeprefix("strategy.")] = value
    return settings | {"budget": _budget(run)}


def _named(
    runs: Sequence[Run],
    together: Callable[[Run], Hashable],
    settings: Callable[[Run], Mapping[str, Any]],
    name: Callable[[Run], str],
) -> dict[str, str]:
    """A name for every run: a common one, with the settings in which runs that belong together differ.

    A setting that differs anywhere among runs of one name is told of all of them in which it is set, so that names mean
    the same on the whole page. Runs that have nothing to draw have no say in what is told.
    """
    bunches: dict[Hashable, list[Run]] = defaultdict(list)
    for run in runs:
        if run.plan or run.growth:
            bunches[together(run)].append(run)
    differing: dict[str, dict[str, None]] = defaultdict(dict)
    for bunch in bunches.values():
        differing[name(bunch[0])] |= dict.fromkeys(_differing(settings(run) for run in bunch))
    values_of: dict[tuple[str, str], list[Any]] = defaultdict(list)
    for run in runs:
        for key, value in settings(run).items():
            values_of[name(run), key].append(value)
    written = {of: _written(values) for of, values in values_of.items() if of[1] in differing[of[0]]}
    names: dict[str, str] = {}
    taken: dict[str, tuple[Any, ...]] = {}
    for run in runs:
        keys, mine = list(differing[name(run)]), settings(run)
        told = [key for key in keys if mine.get(key) is not None]
        words = [
            str(mine[key]) if key == "budget" else f"{key}={written[name(run), key][repr(mine[key])]}" for key in told
        ]
        if len(words) > MOST_SETTINGS:
            words[MOST_SETTINGS:] = [f"{len(words) - MOST_SETTINGS} more"]
        full, number = ", ".join([name(run), *words]), 1
        values = tuple(repr(mine.get(key)) for key in keys)
        unique = full
        while taken.setdefault(unique, values) != values:
            number += 1
            unique = f"{full} ({number})"
        names[run.run_id] = unique
    return names


def _written(values: Iterable[Any]) -> dict[str, str]:
    """How the values of a setting are written, by their `repr`; lists as the command line takes them.

    Long ones are written without their middle, unless that is where they differ.
    """
    texts = {
        repr(value): f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)
        for value in values
    }
    half = (MOST_LETTERS - 1) // 2
    short = {key: text if len(text) <= MOST_LETTERS else f"{text[:half]}…{text[-half:]}" for key, text in texts.items()}
    of_short: dict[str, set[str]] = defaultdict(set)
    for key, text in texts.items():
        of_short[short[key]].add(text)
    return {key: short[key] if len(of_short[short[key]]) == 1 else text for key, text in texts.items()}


def _differing(all_settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """The settings that are not the same in all that have them: versions of bitplan, too, differ in what they know."""
    found = list(all_settings)
    keys = dict.fromkeys(key for settings in found for key in settings)
    return [key for key in keys if len({repr(settings[key]) for settings in found if key in settings}) > 1]


def _short_paths(runs: Sequence[Run]) -> dict[str, str]:
    """As many folders of every path, from its end, as tell the runs apart."""
    parts = {run.run_id: run.path.resolve().parts for run in runs}
    length = 1
    while len({each[-length:] for each in parts.values()}) < len(parts):
        length += 1
    return {run_id: "/".join(each[-length:]) for run_id, each in parts.items()}
