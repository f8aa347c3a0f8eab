"""The network as an environment: one episode is one walk, from the first decision to a policy within its budget."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from search.strategies.rl.course import Course, Walk, settle
from search.strategies.rl.goals import Goals

Judge = Callable[[tuple[int, ...], int], float]
"""The reward of a policy, by its point, at a goal, by its index."""


class PolicyEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Decides about formats one after the other; the reward comes with the last.

    An observation is that of `course.Walk`, the action a number in [-1, 1]: from the fewest bits to the most. Every
    episode draws a goal, a budget, and ends with a policy that keeps it; `info` then has the `point`, the `goal` and
    its index. `reset(options={"goal": index})` asks for one.
    """

    metadata: dict[str, Any] = {"render_modes": []}  # noqa: RUF012 - as gymnasium declares it

    def __init__(self, course: Course, goals: Goals, judge: Judge) -> None:
        """Creates the environment.

        Args:
            course: The decisions of a priced space.
            goals: The budgets.
            judge: Rewards policies.
        """
        self.observation_space = spaces.Box(0.0, 1.0, (course.width,), np.float32)
        self.action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)
        self._course = course
        self._goals = goals
        self._judge = judge
        self._begin(goals.wanted)

    def _begin(self, goal: int) -> None:
        self._goal = goal
        self._walk = Walk(self._course, self._goals.limits[goal])
        self._actions: list[float] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Begins another walk."""
        super().reset(seed=seed)
        given = (options or {}).get("goal")
        self._begin(self._goals.draw(self.np_random) if given is None else int(given))
        return self._walk.observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Takes the next decision."""
        self._actions.append(float(np.clip(action[0], -1, 1)))
        self._walk.take(self._actions[-1])
        seen = self._walk.observation()
        if not self._walk.is_over:
            return seen, 0.0, False, False, {}
        limits = self._goals.limits[self._goal]
        point = settle(self._course, limits, self._actions)
        info = {"point": point, "goal": self._goal, "limits": dict(limits)}
        return seen, self._judge(point, self._goal), True, False, info
