"""Episodes that the agent did not have to find: the solver's plans, and variants of what ended well before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from stable_baselines3 import PPO

from search.assignment import variable_limits
from search.objective import Objective
from search.strategies.forecaster import Forecaster
from search.strategies.neighbourhood import CHANGES
from search.strategies.rl.course import Course, Walk, action_for, settle
from search.strategies.rl.goals import Goals
from search.strategies.rl.replay import Replay

AT_WANTED = 4  # best plans of every predictor at the wanted budget
CLONING = 300  # gradient steps towards the demonstrations, for algorithms that keep no replay buffer


@dataclass(frozen=True)
class Episode:
    """A whole walk.

    Attributes:
        goal: Index of its goal.
        point: Where it ends.
        observations: What is seen before every step and at the end, shape `(steps + 1, width)`.
        actions: What is done, shape `(steps, 1)`.
    """

    goal: int
    point: tuple[int, ...]
    observations: np.ndarray
    actions: np.ndarray


def solver_episodes(objective: Objective, sources: Sequence[Forecaster], course: Course, goals: Goals) -> list[Episode]:
    """What the solver does at every goal: at the wanted one the best of all predictors, elsewhere the preferred one's.

    Where the drop of quality is limited, every goal is the cap on a cost, and the preferred predictor's optimum is
    shown at each.
    """
    found: list[Episode] = []
    for goal, limits in enumerate(goals.limits):
        is_wanted = goal == goals.wanted and objective.quality_drop is None
        for source in sources if is_wanted else sources[:1]:
            points = source.best(variable_limits(course.pricing, limits), AT_WANTED if is_wanted else 1)
            found += [episode for point in points if (episode := shown(course, limits, goal, point.tolist()))]
    return found


def shown(course: Course, limits: Mapping[str, float], goal: int, point: Sequence[int]) -> Episode | None:
    """Walks to a point; None where the limits do not let it, as rounding may have it."""
    walk = Walk(course, limits)
    observations, actions = [walk.observation()], []
    for decision in course.ceiling.order:
        action = action_for(point[decision], len(course.pricing.space.decisions[decision].formats))
        if walk.take(action) != point[decision]:
            return None
        actions.append([action])
        observations.append(walk.observation())
    return Episode(goal, tuple(walk.point), np.array(observations), np.array(actions, dtype=np.float32))


def retraced(
    course: Course, goals: Goals, parents: Sequence[Sequence[int]], count: int, rng: np.random.Generator
) -> list[Episode]:
    """Episodes that do again what ended well, but for a few decisions, at the wanted goal or the next tighter one.

    Args:
        course: The walk.
        goals: The budgets.
        parents: Points that ended well, at least one.
        count: How many are drawn; those that end alike are returned once.
        rng: Where chance comes from.
    """
    found: dict[tuple[tuple[int, ...], int], Episode] = {}
    order = course.ceiling.order
    sizes = {decision: len(course.pricing.space.decisions[decision].formats) for decision in order}
    for _ in range(count):
        goal = max(goals.wanted - int(rng.integers(2)), 0)
        levels = list(parents[int(rng.integers(len(parents)))])
        for at in rng.choice(len(order), min(int(rng.choice(CHANGES)), len(order)), replace=False):
            decision = order[int(at)]
            levels[decision] = (levels[decision] + 1 + int(rng.integers(sizes[decision] - 1))) % sizes[decision]
        limits = goals.limits[goal]
        point = settle(course, limits, [action_for(levels[decision], sizes[decision]) for decision in order])
        episode = shown(course, limits, goal, point)
        if episode:
            found.setdefault((episode.point, goal), episode)
    return list(found.values())


def remember(buffer: Replay, episodes: Sequence[Episode], rewards: Sequence[float]) -> None:
    """Writes episodes into a replay buffer as if they had been walked."""
    for episode, reward in zip(episodes, rewards, strict=True):
        last = len(episode.actions) - 1
        for step, action in enumerate(episode.actions):
            info = {"point": episode.point, "goal": episode.goal} if step == last else {}
            buffer.add(
                episode.observations[[step]],
                episode.observations[[step + 1]],
                action[None],
                np.array([reward if step == last else 0.0]),
                np.array([step == last]),
                [info],
            )


def clone(model: PPO, episodes: Sequence[Episode], steps: int = CLONING, batch: int = 64) -> None:
    """Teaches a policy by imitation: raises the likelihood of what was shown."""
    observations = torch.as_tensor(np.concatenate([episode.observations[:-1] for episode in episodes]))
    actions = torch.as_tensor(np.concatenate([episode.actions for episode in episodes]))
    model.policy.set_training_mode(True)
    for _ in range(steps):
        at = torch.randint(len(actions), (batch,))
        _, likelihood, _ = model.policy.evaluate_actions(observations[at], actions[at])
        model.policy.optimizer.zero_grad()
        (-likelihood.mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.policy.parameters(), model.max_grad_norm)
        model.policy.optimizer.step()
