"""The README's tables: medians and quartiles over seeds, and whether the aims are met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import pandas as pd
from goals import BITS, DROPS, FRONT, Goal

REPORTED = (20, 100, 600)
AIMS = (
    ("auto (20)", 20, "haq (600)", 600),
    ("rl (100)", 100, "haq (600)", 600),
    ("rl (100), no demonstrations", 100, "haq (600)", 600),
)
"""The first after so many evaluations is to be no worse than the second after so many."""

ALL_BUDGETS = "all budgets"


def at(table: pd.DataFrame, counts: Sequence[float], value: str = "regret") -> pd.DataFrame:
    """A column's values after numbers of evaluations, one row per run; what a run found stays when it has ended.

    Args:
        table: The study's table.
        counts: Numbers of evaluations.
        value: The column.
    """
    wide = table.pivot(index=["strategy", "goal", "seed"], columns="evaluations", values=value)
    wide = wide.reindex(columns=sorted({*wide.columns, *counts})).ffill(axis=1)
    return wide[list(counts)]


def over_budgets(values: pd.DataFrame) -> pd.DataFrame:
    """Every seed's mean over all budgets, where it ran for all of them, as rows of one more goal."""
    within = values[values.index.isin([goal.name for goal in BITS], level="goal")]
    seeds = within.groupby(["strategy", "seed"], sort=False)
    means = seeds.mean()[seeds.size() == len(BITS)]
    return means.assign(goal=ALL_BUDGETS).set_index("goal", append=True).reorder_levels(["strategy", "goal", "seed"])


def quartiles(values: Iterable[float], digits: int = 2) -> str:
    """The median, with the quartiles in brackets where they differ."""
    low, middle, high = np.quantile(np.array(list(values)), (0.25, 0.5, 0.75))
    texts = [f"{value:.{digits}f}" for value in (low, middle, high)]
    return texts[1] if len(set(texts)) == 1 else f"{texts[1]} [{texts[0]}, {texts[2]}]"


def headline(table: pd.DataFrame, evaluation_s: float) -> str:
    """Mean regret over all budgets, and what a run takes besides evaluations."""
    found = over_budgets(at(table, REPORTED))
    ends = table.groupby(["strategy", "goal", "seed"], sort=False)[["evaluations", "seconds"]].last()
    ends = ends[ends.index.isin([goal.name for goal in BITS], level="goal")]
    rows = []
    for name in _ordered(table, found):
        cells = [quartiles(column) for _, column in found.loc[name].items()]
        own = ends.loc[name]
        thought = (own["seconds"] - evaluation_s * own["evaluations"]).median()
        rows.append([name, *cells, f"{own['evaluations'].median():.0f}", f"{thought:.0f}"])
    heads = ["strategy", *(f"after {count}" for count in REPORTED), "evaluations used", "seconds besides them"]
    return markdown(heads, rows)


def by_goal(table: pd.DataFrame, goals: Sequence[Goal], value: str = "regret", digits: int = 2) -> str:
    """Quartiles for every strategy and goal after the reported numbers of evaluations, one table each."""
    found = at(table, REPORTED, value)
    names = [goal.name for goal in goals]
    parts = []
    for count in REPORTED:
        rows = []
        for name in _ordered(table, found):
            own = found.loc[name, count]
            known = own.index.unique("goal")
            if set(names) & set(known):
                rows.append([name, *(quartiles(own[goal], digits) if goal in known else "" for goal in names)])
        parts.append(f"After {count} evaluations:\n\n{markdown(['strategy', *names], rows)}")
    return "\n\n".join(parts)


def aims(table: pd.DataFrame) -> str:
    """Whether the aims are met, budget by budget: medians, seed pairs in which no worse, and the rank-sum test."""
    counts = sorted({count for _, one, _, other in AIMS for count in (one, other)})
    single = at(table, counts)
    found = pd.concat([single, over_budgets(single)]).sort_index()
    known = found.index.unique("strategy")
    rows = []
    for name, count, rival, rival_count in AIMS:
        if name not in known or rival not in known:
            rows.append([f"{name} at {count}, {rival} at {rival_count}", "not run", "", "", "", ""])
            continue
        for goal in (ALL_BUDGETS, *(goal.name for goal in (*BITS, *DROPS))):
            if (name, goal) not in found.index.droplevel("seed") or (rival, goal) not in found.index.droplevel("seed"):
                continue
            one, other = found.loc[(name, goal), count].to_numpy(), found.loc[(rival, goal), rival_count].to_numpy()
            share = float((one[:, None] <= other[None]).mean())
            verdict = "yes" if np.median(one) <= np.median(other) else "no"
            label = f"{name} at {count}, {rival} at {rival_count}"
            probability = f"{worse_than(one, other):.2g}"
            rows.append([label, goal, quartiles(one, 3), quartiles(other, 3), f"{share:.0%}", probability, verdict])
    heads = ["comparison", "goal", "first", "second", "pairs no worse", "p of being worse", "median no worse"]
    return markdown(heads, rows)


def worse_than(one: np.ndarray, other: np.ndarray) -> float:
    """The p-value of the rank-sum test that `one` is larger, one-sided; 1 where all are the same."""
    from scipy.stats import mannwhitneyu

    if len(np.unique([*one, *other])) == 1:
        return 1.0
    return float(mannwhitneyu(one, other, alternative="greater").pvalue)


def sections(table: pd.DataFrame, evaluation_s: float) -> dict[str, Callable[[pd.DataFrame], str]]:
    """What the README's marked sections hold, by their names; none about goals that nobody was given."""

    def known(*goals: Goal) -> list[Goal]:
        return [goal for goal in goals if goal.name in set(table["goal"])]

    found: dict[str, Callable[[pd.DataFrame], str]] = {
        "headline": lambda table: headline(table, evaluation_s),
        "aims": aims,
        "budgets": lambda table: by_goal(table, known(*BITS)),
        "hypervolume": lambda table: by_goal(table, known(*BITS, FRONT), "hypervolume", 3),
    }
    return found | ({"drops": lambda table: by_goal(table, known(*DROPS))} if known(*DROPS) else {})


def fill(text: str, name: str, content: str) -> str:
    """Puts content between the marks `<!-- NAME -->` and `<!-- end of NAME -->` of a text.

    Raises:
        ValueError: If a mark is missing.
    """
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"the text has no marks {begin.strip()} and {end}")
    head, _, rest = text.partition(begin)
    return f"{head}{begin}{content}\n{end}{rest.partition(end)[2]}"


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _ordered(table: pd.DataFrame, found: pd.DataFrame) -> list[str]:
    """The strategies of some values, in the order of the table."""
    known = set(found.index.unique("strategy"))
    return [name for name in dict.fromkeys(table["strategy"]) if name in known]
