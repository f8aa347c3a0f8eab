"""`strategy=rl`: an agent that learns on forecasts what to do within any budget, and has its best ideas measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from search.errors import ConfigError, closest
from search.objective import Objective
from search.space import SearchSpace
from search.strategies.base import Strategy, checks_types
from search.trials import Trial

if TYPE_CHECKING:
    from search.strategies.rl.agent import Agent

ALGORITHMS = ("DDPG", "TD3", "SAC", "PPO")


class Rl(Strategy):
    """HAQ's agent, improved.

    One episode walks the network and decides about one format after the other. Unlike HAQ's (Wang et al., "HAQ:
    Hardware-Aware Automated Quantization with Mixed Precision", CVPR 2019), the agent sees what is left of the budget
    and what every format costs; its actions are brought within the budget while the episode lasts, so that every
    episode ends feasible; most rewards are forecasts, put right by all measurements so far; only the most promising
    policies are measured; the solver's plans are shown to it as demonstrations; and every episode has a budget of its
    own as its goal, so that one agent serves a range of budgets.
    """

    name = "rl"

    @checks_types
    def __init__(
        self,
        evaluations: int = 100,
        seconds: float | None = None,
        start_from: str | None = None,
        algorithm: str = "DDPG",
        demonstrations: bool = True,
        agent: str | None = None,
        goals: Sequence[float] = (0.6, 1.6),
        episodes: int = 16,
        warmup: int = 32,
        updates: int = 6,
        batch: int = 64,
        hidden: Sequence[int] = (64, 64),
        learning_rate: float = 1e-3,
    ) -> None:
        """Creates the strategy.

        Args:
            evaluations: Measurements it may spend.
            seconds: Seconds of measuring and proposing it may spend; None is no limit.
            start_from: `solver`, or the path of a run directory or of a plan, to begin with.
            algorithm: `DDPG`, `TD3`, `SAC` or `PPO`, of Stable-Baselines3.
            demonstrations: Whether the solver's plans are shown to it: as episodes in the replay buffer, to PPO, which
                has none, to be imitated before it trains.
            agent: Path of a run, or of a folder with a saved agent, to go on from.
            goals: Least and largest budget that it is trained for, as shares of the room that the wanted budget leaves
                above the cheapest policy. Where the drop of quality is limited, goals are all caps on the primary cost.
            episodes: Episodes walked for every evaluation.
            warmup: Episodes of random actions to begin with; PPO has none.
            updates: Gradient steps after every episode; PPO goes through all episodes of a round ten times.
            batch: Steps in a batch.
            hidden: Units of the hidden layers.
            learning_rate: Learning rate of all networks.

        Raises:
            ConfigError: If a setting is out of range.
        """
        super().__init__(evaluations, seconds, start_from)
        if algorithm not in ALGORITHMS:
            raise ConfigError(
                f"strategy.algorithm={algorithm} is unknown{closest(algorithm, ALGORITHMS)}; "
                f"allowed: {', '.join(ALGORITHMS)}"
            )
        if len(goals) != 2 or not 0 < goals[0] <= 1 <= goals[1]:
            raise ConfigError(
                f"strategy.goals={list(goals)} must be two shares of the wanted budget, the first above 0 and at most "
                "1, the second at least 1, such as [0.6,1.6]"
            )
        least = {"episodes": episodes, "warmup": warmup, "updates": updates, "batch": batch}
        for name, number in least.items():
            if number < 1:
                raise ConfigError(f"strategy.{name}={number} must be at least 1")
        if batch < 2:
            raise ConfigError(f"strategy.batch={batch} must be at least 2")
        if not hidden or min(hidden) < 1:
            raise ConfigError(f"strategy.hidden={list(hidden)} must name at least one unit for each hidden layer")
        if not 0 < learning_rate < 1:
            raise ConfigError(f"strategy.learning_rate={learning_rate} must be above 0 and below 1")
        self.algorithm = algorithm
        self.demonstrations = demonstrations
        self.agent = agent
        self.goals = (float(goals[0]), float(goals[1]))
        self.episodes, self.warmup, self.updates, self.batch = episodes, warmup, updates, batch
        self.hidden = tuple(hidden)
        self.learning_rate = learning_rate
        self.trained: Agent | None = None

    def check_sources(self) -> None:
        super().check_sources()
        if self.agent is not None and not Path(self.agent).exists():
            raise ConfigError(
                f"strategy.agent={self.agent} does not exist; give the directory of a finished run of strategy=rl, or "
                "the folder that an agent was saved to"
            )

    @property
    def proposes_one(self) -> bool:
        return True

    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        self.trained = None
        known = objective.map(objective.starts)
        if not space.free:
            if not known:
                objective(space.decode([0] * len(space.decisions)))
            return
        from search.strategies.rl.study import Study

        study = Study(self, objective, rng)
        self.trained = study.agent
        study.run(known)

    def keep(self, folder: Path, objective: Objective, trials: Sequence[Trial]) -> None:
        """Saves the agent, if there is one, to the run directory's folder `agent`."""
        from search.strategies.rl.agent import FOLDER

        if self.trained:
            self.trained.save(folder / FOLDER)
