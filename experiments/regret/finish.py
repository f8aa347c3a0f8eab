"""Puts the runs of measure.py together: regret_NETWORK_REPAIR.csv, its figures, and the tables of the README.

python experiments/regret/finish.py --repair batch_norm
python experiments/regret/finish.py --repair batch_norm --kept    # from the table that is there, without runs
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pandas as pd
from contenders import available
from figure import draw_all
from goals import BITS, FRONT, GOALS
from measure import entries, folder_of
from study import Study, seconds_path
from summary import fill, sections
from trajectories import Run, follow
from units import NETWORKS

from search.files import write_text

HERE = Path(__file__).parent
ROUNDED = {"seconds": 1, "regret": 4, "hypervolume": 5}


def merged(study: Study, seeds: int, goals: list[str]) -> pd.DataFrame:
    """One row per contender, goal, seed and number of evaluations; runs for the front are held against budgets, too."""
    folder = folder_of(study.bench.name, study.repair)
    every = entries(list(available()), goals, seeds)
    done = [entry for entry in every if entry.is_done(folder)]
    print(f"{len(done)} of {len(every)} runs are there")
    parts = []
    for entry in done:
        run = Run.load(entry.path(folder))
        others = BITS if len(entry.contender.goals) == 1 and entry.goal == FRONT else ()
        for goal in (entry.goal, *others):
            about = {"strategy": entry.name, "goal": goal.name, "seed": entry.seed}
            parts.append(follow(run, goal, study.policies).assign(**about))
    columns = ["strategy", "goal", "seed", "evaluations", "seconds", "regret", "hypervolume"]
    return pd.concat(parts, ignore_index=True)[columns].round(ROUNDED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--repair", default="none", help="the table's")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--goals", nargs="+", metavar="GOAL", default=list(GOALS), help=", ".join(GOALS))
    parser.add_argument("--kept", action="store_true", help="draw and print from the table that is there")
    options = parser.parse_args()
    path = HERE / f"regret_{options.network}_{options.repair}.csv"
    if not options.kept:
        table = merged(Study.load(options.network, options.repair), options.seeds, options.goals)
        write_text(path, table.to_csv(index=False, lineterminator="\n"))
    table = pd.read_csv(path)
    draw_all(table, path)
    evaluation_s = json.loads(seconds_path(options.network, options.repair).read_text())["evaluation_s"]
    readme = (HERE / "README.md").read_text()
    for name, section in sections(table, evaluation_s).items():
        text = section(table)
        print(f"\n{name}\n\n{text}")
        readme = fill(readme, name, text)
    write_text(HERE / "README.md", readme)


if __name__ == "__main__":
    main()
