"""Lets strategies search on the table of all policies: how far are they from the best there is, after what effort?

    python experiments/regret/measure.py --repair batch_norm --shard 0/2    # and 1/2 in another process
    python experiments/regret/finish.py --repair batch_norm                 # table, figures, README

Every contender of contenders.py searches for every goal of goals.py under every seed once, with its own evaluations;
qualities come from the table that truth.py wrote, seconds from seconds.py. Each run is kept in runs/ as soon as it is
done, so that an interrupted study goes on, and a contender that changed is run anew by `--only NAME --again`.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from contenders import CONTENDERS, Contender, available, compete
from goals import GOALS, Goal
from study import RUNS, Study
from trajectories import Run
from units import NETWORKS

from search.errors import ConfigError, closest


@dataclass(frozen=True)
class Entry:
    """One run to be made: a contender's, for a goal, under a seed."""

    name: str
    contender: Contender
    goal: Goal
    seed: int

    @property
    def about(self) -> dict[str, object]:
        """What its file says it is."""
        settings = list(self.contender.settings)
        return {"strategy": self.name, "settings": settings, "goal": self.goal.name, "seed": self.seed}

    def path(self, folder: Path) -> Path:
        """Its file."""
        return folder / f"{self.name}; {self.goal.name}; {self.seed}.json"

    def is_done(self, folder: Path) -> bool:
        """Whether it was made, with these settings."""
        path = self.path(folder)
        return path.is_file() and Run.load(path).about == self.about


def entries(names: list[str], goals: list[str], seeds: int) -> list[Entry]:
    """All runs of the study, those of one contender and goal together."""
    return [
        Entry(name, contender, goal, seed)
        for name, contender in available().items()
        for goal in contender.goals
        for seed in range(seeds if contender.seeded else 1)
        if name in names and goal.name in goals
    ]


def folder_of(network: str, repair: str) -> Path:
    """Where the runs of a study are kept."""
    return RUNS / f"runs_{network}_{repair}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--repair", default="none", help="the table's")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--shard", default="0/1", help="this process's part of the runs, such as 0/2 and 1/2")
    parser.add_argument("--only", nargs="+", metavar="NAME", default=list(available()), help="contenders, by name")
    parser.add_argument("--goals", nargs="+", metavar="GOAL", default=list(GOALS), help=", ".join(GOALS))
    parser.add_argument("--again", action="store_true", help="make these runs anew")
    options = parser.parse_args()
    for given, known in ((options.only, available()), (options.goals, GOALS)):
        for name in set(given) - set(known):
            raise ConfigError(f"{name} is unknown{closest(name, list(known))}; allowed: {', '.join(known)}")
    shard, shards = map(int, options.shard.split("/"))
    torch.set_num_threads(1)
    study, folder = Study.load(options.network, options.repair), folder_of(options.network, options.repair)
    mine = entries(options.only, options.goals, options.seeds)[shard::shards]
    missing = [entry for entry in mine if options.again or not entry.is_done(folder)]
    print(f"{len(mine) - len(missing)} of {len(mine)} runs are there", flush=True)
    for name in set(CONTENDERS) - set(available()):
        print(f"{name}: no such strategy yet")
    for entry in sorted(missing, key=lambda entry: entry.seed):
        started = time.process_time()
        run = compete(study, entry.contender.make(), entry.goal, entry.seed)
        run.about = dict(entry.about)
        run.save(entry.path(folder))
        took = time.process_time() - started
        print(f"{entry.path(folder).stem}: {len(run.codes)} measurements, {took:.1f} s of processor", flush=True)


if __name__ == "__main__":
    main()
