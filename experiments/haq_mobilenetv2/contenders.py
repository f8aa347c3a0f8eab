"""The strategies there are, by their names in the configuration, each run through the real objective."""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np
from problem import Bench

from search.config import build, compose, config_dir
from search.errors import ConfigError, closest
from search.objective import Objective, SpentError
from search.shortlist import best_trial
from search.strategies.base import Strategy
from search.trials import Trial

TOO_LARGE = {"exhaustive": "the space has 49^51 policies"}

IN_FULL = {"evolution": ("strategy.fidelities=[]",)}
"""Settings that keep strategies from measuring on parts of a split, for there is none."""


@dataclass
class MemoryLog:
    """Trials of a search that nobody resumes."""

    trials: list[Trial] = field(default_factory=list)

    def append(self, trial: Trial) -> None:
        self.trials.append(trial)


@dataclass(frozen=True)
class Run:
    """How a search ended.

    Attributes:
        best: The best trial within the budget.
        measured: Policies measured.
        proposed: Policies proposed, those over budget included.
        seconds: What it took.
    """

    best: Trial
    measured: int
    proposed: int
    seconds: float


def contenders(names: list[str] | None = None) -> tuple[list[str], dict[str, str]]:
    """Names of the strategies in the configuration that can run here, and of the others with the reason they cannot.

    Args:
        names: Those wanted; None for all.

    Raises:
        ConfigError: If the configuration has no strategy of such a name.
    """
    from omegaconf import OmegaConf

    known = sorted(path.stem for path in (config_dir() / "strategy").glob("*.yaml"))
    chosen: dict[str, str] = {}  # settings to the first name that has them
    skipped: dict[str, str] = {}
    for name in names or known:
        if name not in known:
            raise ConfigError(f"strategy {name} is unknown{closest(name, known)}; there are {', '.join(known)}")
        node = compose([f"strategy={name}"]).strategy
        missing, settings = sorted(OmegaConf.missing_keys(node)), OmegaConf.to_yaml(node, sort_keys=True)
        if name in TOO_LARGE:
            skipped[name] = TOO_LARGE[name]
        elif missing:
            skipped[name] = f"{missing[0]} is for users to set"
        elif settings in chosen:
            skipped[name] = f"the same as {chosen[settings]}"
        else:
            chosen[settings] = name
    return list(chosen.values()), skipped


def run(bench: Bench, name: str, evaluations: int, seed: int, seconds: float | None = None) -> Run:
    """Searches with one strategy.

    Args:
        bench: The problem.
        name: The strategy's name in the configuration.
        evaluations: Measurements it may spend.
        seed: Of all its randomness.
        seconds: Seconds of proposing it may spend, measuring taking none; None is no limit.
    """
    allowance = [f"strategy.evaluations={evaluations}", f"strategy.seconds={seconds or 'null'}"]
    node = compose([f"strategy={name}", *allowance, *IN_FULL.get(name, ())]).strategy
    strategy: Strategy = build(node, Strategy, "strategy")
    log = MemoryLog()
    objective = Objective(
        bench.evaluator,
        bench.pricing,
        bench.limits,
        log,  # type: ignore[arg-type]
        strategy,
        bench.formula.sensitivity,
        primary_cost="latency_s",
    )
    started = time.perf_counter()
    with suppress(SpentError):
        strategy.search(bench.space, objective, np.random.default_rng(seed))
    seconds = time.perf_counter() - started
    measured = sum(trial.state == "complete" for trial in log.trials)
    return Run(best_trial(objective, log.trials), measured, len(log.trials), seconds)
