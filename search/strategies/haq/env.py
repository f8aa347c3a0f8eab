"""HAQ's environment: an episode walks the network once and is rewarded at its end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box

from search.strategies.haq.walk import NUMBERS, Walk


class WalkEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """Each step takes one decision; the last one ends the episode and earns what `judge` says of the point.

    An observation holds the ten numbers of `Walk.state`; after the last step it is the last state again, as in HAQ. An
    action is a number in [-1, 1] that stands for a format. `info` holds the `point` at the episode's end.
    """

    def __init__(self, walk: Walk, judge: Callable[[tuple[int, ...]], float]) -> None:
        """Creates the environment.

        Args:
            walk: The decisions, at least one.
            judge: Gives the reward of a point of the space; what it raises ends the episode.
        """
        self.observation_space = Box(0.0, 1.0, (NUMBERS,), np.float32)
        self.action_space = Box(-1.0, 1.0, (1,), np.float32)
        self._walk = walk
        self._judge = judge
        self._levels: list[int] = []

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._levels = []
        return self._walk.state(0, self._levels), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        step = len(self._levels)
        self._levels.append(self._walk.level(step, float(action[0])))
        if step + 1 < len(self._walk):
            return self._walk.state(step + 1, self._levels), 0.0, False, False, {}
        point = self._walk.point(self._levels)
        return self._walk.state(step, self._levels), self._judge(point), True, False, {"point": point}
