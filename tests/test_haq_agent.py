"""HAQ's agent: its noise, its replay, its pace, its rates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from tiny import make_bench

from search.strategies.haq.agent import EpisodeReplay, HaqAgent, truncated_normal
from search.strategies.haq.env import WalkEnv
from search.strategies.haq.walk import Walk
from search.strategies.randomness import own_randomness


class Enough(Exception):
    """Raised by the judge to end learning."""


class Judge:
    """Counts episodes; ends after some."""

    def __init__(self, episodes: int, reward: float = 1.0) -> None:
        self.points: list[tuple[int, ...]] = []
        self._episodes, self._reward = episodes, reward

    def __call__(self, point: tuple[int, ...]) -> float:
        if len(self.points) == self._episodes:
            raise Enough
        self.points.append(point)
        return self._reward


@pytest.fixture(scope="module")
def walk() -> Walk:
    bench = make_bench()
    return Walk.through(bench.network, bench.space)


def make_agent(walk: Walk, judge, warm_up: int = 2, seed: int = 0) -> HaqAgent:
    with own_randomness(seed):
        return HaqAgent(WalkEnv(walk, judge), len(walk), warm_up, seed)


def learn(agent: HaqAgent) -> None:
    with pytest.raises(Enough):
        agent.learn_on()


@pytest.mark.parametrize("sigma", [2.0, 1.0, 0.3, 1e-3])
@pytest.mark.parametrize("mean", [-1.0, -0.3, 0.0, 0.9, 1.0])
def test_noise_is_a_normal_distribution_cut_off(mean: float, sigma: float) -> None:
    drawn = truncated_normal(np.full(4000, mean), sigma, np.random.default_rng(0))
    assert drawn.min() >= -1
    assert drawn.max() <= 1
    expected = stats.truncnorm((-1 - mean) / sigma, (1 - mean) / sigma, loc=mean, scale=sigma)
    assert stats.kstest(drawn, expected.cdf).pvalue > 1e-3
    assert np.sum(np.abs(drawn) == 1) <= 1, "cut off, not clipped: nothing piles up at the ends"


def test_noise_of_nothing_is_the_mean() -> None:
    means = np.array([-1.0, 0.2, 1.0])
    assert truncated_normal(means, 1e-12, np.random.default_rng(0)) == pytest.approx(means, abs=1e-9)


def test_sigma_shrinks_after_the_warm_up(walk: Walk) -> None:
    agent = make_agent(walk, Judge(0), warm_up=20)
    found = []
    for episode in (0, 20, 21, 22, 120):
        agent._episode_num = episode
        found.append(agent.sigma / 2)  # of actions in [0, 1]
    assert found == pytest.approx([0.5, 0.5, 0.5 * 0.99, 0.5 * 0.99**2, 0.5 * 0.99**100])


def test_all_steps_of_an_episode_earn_the_same(walk: Walk) -> None:
    """Of several episodes, also where the ring begins anew, and not those of the episode that runs."""
    replay = make_replay(walk, size=12)
    rewards = iter([5.0, -2.0, 7.0])
    for step in range(15):
        done = step % 5 == 4
        add(replay, step, next(rewards) if done else 0.0, done)
    for step in range(15, 17):
        add(replay, step, 0.0, False)
    steps = replay.observations[:, 0, 0].astype(int).tolist()
    assert steps == [12, 13, 14, 15, 16, 5, 6, 7, 8, 9, 10, 11]
    assert replay.rewards[:, 0].tolist() == [7, 7, 7, 0, 0, -2, -2, -2, -2, -2, 7, 7]
    assert replay.dones[:, 0].tolist() == [float(step % 5 == 4) for step in steps]


def make_replay(walk: Walk, size: int) -> EpisodeReplay:
    from gymnasium.spaces import Box

    box = Box(-1, 100, (1,), np.float32)
    return EpisodeReplay(size, box, box, device="cpu", rng=np.random.default_rng(0))


def add(replay: EpisodeReplay, step: int, reward: float, done: bool) -> None:
    state = np.array([[float(step)]])
    replay.add(state, state, state, np.array([reward]), np.array([done]), [{}])


def test_batches_lose_a_moving_average_of_their_rewards(walk: Walk) -> None:
    replay = make_replay(walk, size=100)
    for step in range(40):
        add(replay, step, float(step), True)
    expected = None
    for _ in range(5):
        batch = replay.sample(10)
        rewards = batch.observations[:, 0].numpy()  # what each step earned
        assert len(set(rewards.tolist())) == 10, "no transition twice"
        expected = rewards.mean() if expected is None else expected + 0.5 * (rewards.mean() - expected)
        assert replay.baseline == pytest.approx(expected)
        assert batch.rewards[:, 0].numpy() == pytest.approx(rewards - expected, abs=1e-4)
    assert replay.rewards[:40, 0].tolist() == list(range(40)), "what is stored stays"


def test_few_transitions_still_make_a_batch(walk: Walk) -> None:
    replay = make_replay(walk, size=100)
    add(replay, 3, 1.0, True)
    assert replay.sample(64).observations.shape == (64, 1)


def test_settings_of_the_paper(walk: Walk) -> None:
    agent = make_agent(walk, Judge(0), warm_up=20)
    assert (agent.batch_size, agent.tau, agent.gamma) == (64, 0.01, 1.0)
    assert agent.replay_buffer.buffer_size == 128 * 7
    for network in (agent.actor.mu, agent.critic.qf0):
        linear = [part for part in network if isinstance(part, torch.nn.Linear)]
        assert [part.out_features for part in linear] == [300, 300, 1]
    assert len(agent.critic.q_networks) == 1


def test_learns_once_per_step_after_the_warm_up_at_two_rates(walk: Walk) -> None:
    judge = Judge(episodes=5)
    agent = make_agent(walk, judge, warm_up=2)
    before = [parameter.clone() for parameter in agent.policy.parameters()]
    learn(agent)
    assert len(judge.points) == 5
    assert agent._n_updates == (5 - 2) * 7
    assert any(not torch.equal(a, b) for a, b in zip(before, agent.policy.parameters(), strict=True))
    rates = [agent.actor.optimizer.param_groups[0]["lr"], agent.critic.optimizer.param_groups[0]["lr"]]
    assert rates == [1e-4, 1e-3]
    warming = make_agent(walk, Judge(episodes=2), warm_up=2)
    learn(warming)
    assert warming._n_updates == 0


def test_the_warm_up_is_uniform(walk: Walk) -> None:
    agent = make_agent(walk, Judge(episodes=100), warm_up=100)
    learn(agent)
    actions = agent.replay_buffer.actions[:700].ravel()
    assert stats.kstest(actions, stats.uniform(-1, 2).cdf).pvalue > 1e-3


def test_what_is_remembered_is_what_was_done(walk: Walk) -> None:
    judge = Judge(episodes=6, reward=-3.0)
    agent = make_agent(walk, judge, warm_up=3)
    learn(agent)
    replay = agent.replay_buffer
    assert replay.rewards[: 6 * 7].ravel().tolist() == [-3.0] * 42
    for episode, point in enumerate(judge.points):
        rows = range(7 * episode, 7 * episode + 7)
        levels = [walk.level(step, float(replay.actions[row, 0, 0])) for step, row in enumerate(rows)]
        assert walk.point(levels) == point
        for step, row in enumerate(rows):
            assert np.array_equal(replay.observations[row, 0], walk.state(step, levels[:step]))
            assert np.array_equal(
                replay.next_observations[row, 0], walk.state(min(step + 1, 6), levels[: min(step + 1, 6)])
            )
            assert replay.dones[row, 0] == (step == 6)


def test_demonstrations_are_remembered_first(walk: Walk) -> None:
    judge = Judge(episodes=2)
    agent = make_agent(walk, judge, warm_up=0)
    agent.demonstrate(agent.env.envs[0].unwrapped, walk.actions((1, 2, 0, 1, 1, 0, 1)))
    learn(agent)
    assert judge.points[0] == (1, 2, 0, 1, 1, 0, 1)
    assert agent.replay_buffer.actions[:7].ravel() == pytest.approx(walk.actions((1, 2, 0, 1, 1, 0, 1)))
    assert agent.replay_buffer.rewards[:14].ravel().tolist() == [1.0] * 14


def test_global_randomness_changes_nothing(walk: Walk) -> None:
    """Measuring may draw from global generators, and a resumed run measures less."""
    found = []
    for disturbs in (False, True):

        class Disturbing(Judge):
            def __call__(self, point: tuple[int, ...]) -> float:
                if disturbs:  # noqa: B023
                    np.random.random(3)
                    torch.rand(3)
                return super().__call__(point) * sum(point)

        judge = Disturbing(episodes=6)
        learn(make_agent(walk, judge, warm_up=2))
        found.append(judge.points)
    assert found[0] == found[1]


@pytest.mark.parametrize("seed", range(3))
def test_learns_which_formats_are_worth_most(walk: Walk, seed: int) -> None:
    """Reward falls with the distance from one point of 648; after 60 episodes of learning a quarter of it is gone."""
    best = walk.point([size - 1 if weight else 0 for size, weight in zip(walk.sizes, walk.weights, strict=True)])

    class Distance(Judge):
        def __call__(self, point: tuple[int, ...]) -> float:
            super().__call__(point)
            return -float(np.abs(np.subtract(point, best)).sum())

    judge = Distance(episodes=80)
    learn(make_agent(walk, judge, warm_up=20, seed=seed))
    distances = np.abs(np.subtract(judge.points, best)).sum(1)
    assert distances[-20:].mean() < 0.75 * distances[:20].mean()
