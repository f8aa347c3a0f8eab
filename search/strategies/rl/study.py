"""One search by an agent: it walks and learns on forecasts, and the best of what it finds is measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from stable_baselines3 import PPO
from stable_baselines3.common.off_policy_algorithm import OffPolicyAlgorithm
from stable_baselines3.common.vec_env import DummyVecEnv

from search.errors import ConfigError
from search.objective import ROUNDING, Objective
from search.strategies.forecaster import forecasters
from search.strategies.randomness import own_randomness
from search.strategies.rl.agent import Agent, course_of, describe
from search.strategies.rl.demonstrations import Episode, clone, remember, retraced, solver_episodes
from search.strategies.rl.env import PolicyEnv
from search.strategies.rl.goals import along, around
from search.strategies.rl.learner import make_model, train
from search.strategies.rl.rewards import Ledger, Point
from search.trials import Trial

if TYPE_CHECKING:
    from search.strategies.rl.strategy import Rl

OWN = 4  # every so manieth measurement is of what the agent itself proposes, where that was not measured
PARENTS = 6  # best policies measured that episodes retrace
SURVEY = 64  # random walks that tell which losses are usual, before the first reward is given
PATIENCE = 5  # rounds without anything new to measure, after which the search ends


class Study:
    """The agent, its environment, and the ledger of what it walked.

    Attributes:
        agent: The agent as far as it is trained.
    """

    def __init__(self, settings: Rl, objective: Objective, rng: np.random.Generator) -> None:
        """Prepares everything that comes before the first measurement.

        Args:
            settings: The strategy's settings.
            objective: The objective.
            rng: Where all chance comes from.

        Raises:
            ConfigError: If the agent to go on from is of another algorithm, space or limits.
        """
        self._settings, self._objective, self._rng = settings, objective, rng
        pricing = objective.pricing
        names = tuple(objective.limits)
        if objective.quality_drop is not None and objective.primary_cost not in names:
            names += (objective.primary_cost,)
        earlier = self._earlier(names)
        about = earlier.about if earlier else describe(pricing, names, objective.sensitivity)
        self._course = course_of(pricing, about)
        self._goals = (
            around(self._course, objective.limits, settings.goals)
            if objective.quality_drop is None
            else along(self._course, objective.limits, objective.primary_cost)
        )
        seeds = [int(seed) for seed in rng.integers(2**31, size=3)]
        self._sources = forecasters(objective.sensitivity, pricing, seed=seeds[0])
        self._ledger = Ledger(objective, self._course, self._goals, self._sources)
        self._env = PolicyEnv(self._course, self._goals, self._ledger.judge)
        self._survey(seeds[1])
        with own_randomness(seeds[2]):
            self.agent = earlier or self._fresh(about, seeds[2])
            if earlier:
                earlier.model.set_env(DummyVecEnv([lambda: self._env]))
                earlier.model.set_random_seed(seeds[2])
            if settings.demonstrations:
                self._demonstrate()

    def run(self, known: list[Trial]) -> None:
        """Trains and measures in turn until nothing is left to spend, or nothing new is found.

        Args:
            known: What was measured before.
        """
        objective, space = self._objective, self._course.pricing.space
        for trial in known:
            self._ledger.record(trial)
        idle = measured = 0
        while idle < PATIENCE and objective.remaining >= 1 - ROUNDING:
            self._retrace()
            self._ledger.refit()
            self._train()
            if objective.is_out_of_time and objective.spent_evaluations:
                return
            point = self._elite(is_own_turn=measured % OWN == OWN - 1)
            idle = 0 if point else idle + 1
            if point:
                self._ledger.record(objective(space.decode(point)))
                measured += 1

    def _retrace(self) -> None:
        """Goes near the best policies measured so far, as many times as a round has episodes."""
        parents = self._ledger.best(PARENTS)
        if parents:
            self._learn(retraced(self._course, self._goals, parents, self._settings.episodes, self._rng))

    def _train(self) -> None:
        """One round of episodes, with rewards as measurements have left them."""
        model, settings = self.agent.model, self._settings
        if isinstance(model, OffPolicyAlgorithm):
            model.replay_buffer.retell(self._ledger.judged)
        with own_randomness(int(self._rng.integers(2**31))):
            train(model, settings.episodes * self._course.steps, lambda: self._objective.is_out_of_time)

    def _elite(self, is_own_turn: bool) -> Point | None:
        """What to measure next: the most promising policy walked so far, or the agent's own proposal in its turn."""
        own = self.agent.walk(self._course, self._goals.limits[self._goals.wanted])
        self._ledger.judge(own, self._goals.wanted)
        is_feasible = self._objective.is_feasible(self._course.pricing.space.decode(own))
        if is_own_turn and is_feasible and not self._ledger.knows(own):
            return own
        return self._ledger.promising()

    def _survey(self, seed: int) -> None:
        """Walks at random at all goals, so that rewards know what is usual."""
        self._env.action_space.seed(seed)
        self._env.reset(seed=seed)
        for number in range(SURVEY):
            self._env.reset(options={"goal": number % len(self._goals.limits)})
            ended = False
            while not ended:
                _, _, ended, _, _ = self._env.step(self._env.action_space.sample())
        self._ledger.refit()

    def _fresh(self, about: dict[str, Any], seed: int) -> Agent:
        settings = self._settings
        model = make_model(
            settings.algorithm,
            self._env,
            self._course.steps,
            hidden=settings.hidden,
            learning_rate=settings.learning_rate,
            batch=settings.batch,
            updates=settings.updates,
            episodes=settings.episodes,
            total=settings.episodes * settings.evaluations,
            warmup=settings.warmup,
            seed=seed,
        )
        return Agent(settings.algorithm, model, about)

    def _demonstrate(self) -> None:
        """Shows the agent what the solver does."""
        shown = solver_episodes(self._objective, self._sources, self._course, self._goals)
        self._learn(shown)
        if shown and isinstance(self.agent.model, PPO):
            clone(self.agent.model, shown)

    def _learn(self, episodes: list[Episode]) -> None:
        """Enters episodes into the ledger and, where the algorithm keeps one, into the replay buffer."""
        rewards = [self._ledger.judge(episode.point, episode.goal) for episode in episodes]
        if isinstance(self.agent.model, OffPolicyAlgorithm):
            remember(self.agent.model.replay_buffer, episodes, rewards)

    def _earlier(self, names: tuple[str, ...]) -> Agent | None:
        """The agent to go on from."""
        settings = self._settings
        if settings.agent is None:
            return None
        agent = Agent.load(Path(settings.agent))
        if agent.algorithm != settings.algorithm:
            raise ConfigError(
                f"strategy.agent={settings.agent} was trained with {agent.algorithm}, not {settings.algorithm}; "
                f"set strategy.algorithm={agent.algorithm}"
            )
        reason = agent.refusal(self._objective.pricing, dict.fromkeys(names, 0.0))
        if reason:
            raise ConfigError(f"strategy.agent={settings.agent}: {reason}")
        return agent
