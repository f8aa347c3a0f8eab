"""A replay buffer whose rewards can be told anew, as measurements put forecasts right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.buffers import NStepReplayBuffer


class Replay(NStepReplayBuffer):  # type: ignore[misc] # the library's types are not read
    """Knows of every episode in it which policy it ended with, and at which goal.

    Returns are summed over several steps: the only reward comes at the end.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.ends: dict[int, tuple[tuple[int, ...], int]] = {}

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Adds one step; the last one's `infos` name the `point` and the `goal`."""
        self.ends.pop(self.pos, None)
        if done[0]:
            self.ends[self.pos] = infos[0]["point"], infos[0]["goal"]
        super().add(obs, next_obs, action, reward, done, infos)

    def retell(self, judged: Callable[[Sequence[tuple[tuple[int, ...], int]]], np.ndarray]) -> None:
        """Rewards all episodes anew."""
        if self.ends:
            self.rewards[list(self.ends), 0] = judged(list(self.ends.values()))
