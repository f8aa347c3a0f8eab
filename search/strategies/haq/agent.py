"""HAQ's agent: stable-baselines3's DDPG with the noise, the replay and the two learning rates that HAQ has."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import gymnasium
import numpy as np
from scipy.special import ndtr, ndtri
from stable_baselines3 import DDPG
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.utils import update_learning_rate
from torch.optim import Optimizer

ACTOR_RATE, CRITIC_RATE = 1e-4, 1e-3
HIDDEN = (300, 300)
BATCH = 64
TAU = 0.01
DISCOUNT = 1.0
REPLAY_EPISODES = 128
SIGMA = 0.5 * 2  # HAQ's 0.5 is of actions in [0, 1]; ours are in [-1, 1]
DECAY = 0.99  # of sigma, from episode to episode
MOVING = 0.5  # weight of a batch's mean reward in the moving average


class EpisodeReplay(ReplayBuffer):  # type: ignore[misc]
    """A replay in which all steps of an episode earn what its last step did, less a moving average of rewards.

    The average moves with every batch that is drawn, by half of the way to the mean of its rewards, and is then
    subtracted from them. A batch draws no transition twice while there are enough.

    Attributes:
        baseline: The moving average; None before the first batch.
    """

    def __init__(self, *arguments: Any, rng: np.random.Generator, **options: Any) -> None:
        """Creates the replay; `rng` draws the batches, the rest is stable-baselines3's."""
        super().__init__(*arguments, **options)
        self.baseline: float | None = None
        self._rng = rng
        self._steps = 0  # of the episode that has not ended

    def add(
        self,
        obs: np.ndarray,
        next_obs: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        done: np.ndarray,
        infos: list[dict[str, Any]],
    ) -> None:
        """Adds a transition; the last one of an episode gives its reward to the others."""
        super().add(obs, next_obs, action, reward, done, infos)
        self._steps += 1
        if np.all(done):
            self.rewards[(self.pos - 1 - np.arange(self._steps)) % self.buffer_size] = reward
            self._steps = 0

    def sample(self, batch_size: int, env: Any = None) -> ReplayBufferSamples:
        """Draws a batch, its rewards less the moving average."""
        stored = self.size()
        batch = self._get_samples(self._rng.choice(stored, batch_size, replace=stored < batch_size), env)
        mean = float(batch.rewards.mean())
        self.baseline = mean if self.baseline is None else self.baseline + MOVING * (mean - self.baseline)
        return batch._replace(rewards=batch.rewards - self.baseline)


class HaqAgent(DDPG):  # type: ignore[misc]
    """DDPG as HAQ trains it: after every episode, once per step of it.

    The warm-up's actions are uniform. After it, they are drawn from a normal distribution about the actor's action, cut
    off where actions end, whose deviation shrinks from episode to episode.
    """

    def __init__(self, env: gymnasium.Env[np.ndarray, np.ndarray], steps: int, warm_up: int, seed: int) -> None:
        """Creates the agent; its weights are drawn from torch's global generator.

        Args:
            env: What it acts in.
            steps: Steps of an episode.
            warm_up: Episodes before it learns.
            seed: Of its actions and batches.
        """
        acting, drawing = map(np.random.default_rng, np.random.SeedSequence(seed).spawn(2))
        self._acting = acting
        self._warm_up = warm_up
        super().__init__(
            "MlpPolicy",
            env,
            buffer_size=REPLAY_EPISODES * steps,
            learning_starts=warm_up * steps,
            batch_size=BATCH,
            tau=TAU,
            gamma=DISCOUNT,
            train_freq=(1, "episode"),
            gradient_steps=-1,  # as many as the episode had steps
            replay_buffer_class=EpisodeReplay,
            replay_buffer_kwargs={"rng": drawing},
            policy_kwargs={"net_arch": list(HIDDEN)},
            device="cpu",
        )

    @property
    def sigma(self) -> float:
        """Deviation of the noise in the episode that runs, before it is cut off."""
        return float(SIGMA * DECAY ** max(self._episode_num - self._warm_up, 0))

    def demonstrate(self, env: gymnasium.Env[np.ndarray, np.ndarray], actions: Iterable[float]) -> None:
        """Goes through an episode with given actions and remembers it."""
        state, _ = env.reset()
        for action in actions:
            taken = np.array([action], dtype=np.float32)
            following, reward, done, _, info = env.step(taken)
            self.replay_buffer.add(state, following, taken, np.array([reward]), np.array([done]), [info])
            state = following

    def learn_on(self) -> None:
        """Acts and learns until the environment raises that nothing is left to spend."""
        self.learn(sys.maxsize, log_interval=None)

    def _sample_action(
        self, learning_starts: int, action_noise: Any = None, n_envs: int = 1
    ) -> tuple[np.ndarray, np.ndarray]:
        """The next action, as it is taken and as it is remembered."""
        if self.num_timesteps < learning_starts:
            action = self._acting.uniform(-1, 1, (n_envs, 1))
        else:
            action = truncated_normal(self.predict(self._last_obs)[0], self.sigma, self._acting)
        return action.astype(np.float32), action.astype(np.float32)

    def _update_learning_rate(self, optimizers: list[Optimizer]) -> None:
        """Gives actor and critic a rate of their own, where stable-baselines3 has one for both."""
        for optimizer, rate in zip(optimizers, (ACTOR_RATE, CRITIC_RATE), strict=True):
            update_learning_rate(optimizer, rate)


def truncated_normal(mean: np.ndarray, sigma: float, rng: np.random.Generator) -> np.ndarray:
    """Draws from normal distributions that are cut off outside of [-1, 1], by inverting their distribution function."""
    low, high = ndtr((-1 - mean) / sigma), ndtr((1 - mean) / sigma)
    drawn = mean + sigma * ndtri(rng.uniform(low, high))
    return np.asarray(np.clip(drawn, -1, 1))  # the last digits
