"""Stable-Baselines3's algorithms as this search runs them: small networks, many short rounds, on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium
import numpy as np
from stable_baselines3 import DDPG, PPO, SAC, TD3
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.vec_env import DummyVecEnv

from search.strategies.rl.replay import Replay

ACTOR = 0.2  # learning rate of actors without a distribution, as a share of their critics'; HAQ's is a tenth
MOST_STEPS = 200_000  # that a replay buffer holds; the oldest are forgotten


class Fading(ActionNoise):  # type: ignore[misc] # the library's types are not read
    """Normal noise on actions that fades from episode to episode, but for some episodes that try anything.

    It draws from NumPy's global generator, which `own_randomness` seeds.
    """

    def __init__(self, first: float, last: float, half_life: float, anything: float = 0.1) -> None:
        """Creates the noise.

        Args:
            first: Standard deviation in the first episode; actions lie in [-1, 1].
            last: What it fades to.
            half_life: Episodes after which half of the way is gone.
            anything: Share of the episodes with so much noise that the agent's own wish hardly counts.
        """
        super().__init__()
        self._first, self._last, self._half_life, self._anything = first, last, half_life, anything
        self._episodes = 0
        self._deviation = first

    def __call__(self) -> np.ndarray:
        return np.random.normal(0.0, self._deviation, 1).astype(np.float32)

    def reset(self) -> None:
        """Begins another episode."""
        self._episodes += 1
        faded = self._last + (self._first - self._last) * 0.5 ** (self._episodes / self._half_life)
        self._deviation = 2.0 if np.random.random() < self._anything else faded


class SlowTD3(TD3):  # type: ignore[misc] # the library's types are not read
    """Lets the critic learn faster than the actor, which otherwise runs off to an end of its range and stays there."""

    def _update_learning_rate(self, optimizers: Any) -> None:
        super()._update_learning_rate(optimizers)
        for group in self.actor.optimizer.param_groups:
            group["lr"] *= ACTOR


class SlowDDPG(SlowTD3, DDPG):  # type: ignore[misc] # the library's types are not read
    """The same for DDPG, which this library builds on TD3."""


CLASSES: Mapping[str, type[BaseAlgorithm]] = {"DDPG": SlowDDPG, "TD3": SlowTD3, "SAC": SAC, "PPO": PPO}


def make_model(
    algorithm: str,
    env: gymnasium.Env[np.ndarray, np.ndarray],
    steps: int,
    *,
    hidden: Sequence[int],
    learning_rate: float,
    batch: int,
    updates: int,
    episodes: int,
    total: int,
    warmup: int,
    seed: int,
) -> BaseAlgorithm:
    """Creates an agent that has learnt nothing.

    Returns are not discounted, as an episode is worth what its end is worth.

    Args:
        algorithm: A key of `CLASSES`.
        env: The environment.
        steps: Decisions in an episode.
        hidden: Units of the hidden layers of all its networks.
        learning_rate: Of all its networks.
        batch: Steps in a batch.
        updates: Gradient steps after every episode; PPO goes through each round's episodes ten times instead.
        episodes: Episodes of one round.
        total: Episodes of the whole search, which the noise on actions fades over.
        warmup: Episodes of random actions before the first gradient step; PPO has none.
        seed: Of the environment and the networks.
    """
    common: dict[str, Any] = {
        "policy": "MlpPolicy",
        "env": DummyVecEnv([lambda: env]),
        "learning_rate": learning_rate,
        "batch_size": batch,
        "gamma": 1.0,
        "policy_kwargs": {"net_arch": list(hidden)},
        "device": "cpu",
        "seed": seed,
    }
    if algorithm == "PPO":
        rollout = max(episodes * steps, 2)
        whole = (size for size in range(min(batch, rollout), 1, -1) if rollout % size == 0)
        common["batch_size"] = next(whole, rollout)  # it wants batches of one size
        return PPO(**common, n_steps=rollout, gae_lambda=1.0, ent_coef=0.01)
    replayed: dict[str, Any] = {
        "buffer_size": min((total + 1000) * steps, MOST_STEPS),
        "learning_starts": warmup * steps,
        "tau": 0.01,
        "train_freq": (1, "episode"),
        "gradient_steps": updates,
        "replay_buffer_class": Replay,
        "replay_buffer_kwargs": {"n_steps": steps, "gamma": 1.0},
    }
    if algorithm == "SAC":
        return SAC(**common, **replayed, ent_coef="auto_0.1")
    noise = Fading(0.6, 0.1, max(total / 5, 1))
    return CLASSES[algorithm](**common, **replayed, action_noise=noise)


def train(model: BaseAlgorithm, steps: int, is_over: Callable[[], bool]) -> None:
    """Walks and learns for so many steps, or until time is over, looked at after every episode."""
    model.set_logger(Logger(folder=None, output_formats=[]))
    model.learn(steps, callback=_Until(is_over), log_interval=None, reset_num_timesteps=False)


class _Until(BaseCallback):  # type: ignore[misc] # the library's types are not read
    """Ends training once time is over."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        super().__init__()
        self._is_over = is_over

    def _on_step(self) -> bool:
        return not (self.locals["dones"][0] and self._is_over())
