"""HAQ's search: reinforcement learning as published."""

from __future__ import annotations

import numpy as np

from search.errors import ConfigError
from search.objective import Objective
from search.space import SearchSpace
from search.strategies.base import Strategy, checks_types
from search.strategies.haq.walk import Walk
from search.strategies.haq.wall import ActionWall
from search.strategies.penalty import penalised_loss
from search.strategies.randomness import own_randomness
from search.trials import Trial

REWARD = 0.1  # per percentage point
WARM_UP_SHARE = 4  # the warm-up is no more than one in so many evaluations
LOST = 10.0  # largest loss, as a share of the float network's quality, that a reward tells from larger ones


class Haq(Strategy):
    """The agent of HAQ (Wang et al., CVPR 2019, arXiv 1811.08886) on stable-baselines3's DDPG.

    An episode walks the network; at each layer the agent chooses the format of the weight, then of the input. At the
    end the action wall brings the policy within the budget (`ActionWall`), it is measured, and every step of the
    episode earns the same reward: a tenth of the change of the metric in percentage points. A policy that was measured
    before spends an evaluation again, as HAQ would measure it again. The agent settles early, on other policies with
    other seeds, after which more episodes find little: it is here to be compared with.

    Hyper-parameters, and where they are from: `rl_quantize.py` [r], `lib/rl/ddpg.py` [d] or
    `lib/env/linear_quantize_env.py` [e] of github.com/mit-han-lab/haq.

    | what | value | source |
    | --- | --- | --- |
    | episodes | 600 | r `train_episode` |
    | warm-up: episodes of uniform actions, without learning | 20 | r `warmup` |
    | actor and critic | two layers of 300, ReLU | r `hidden1`, `hidden2` |
    | learning rates of actor and critic, with Adam | 1e-4 and 1e-3 | r `lr_a`, `lr_c` |
    | batch | 64 | r `bsize` |
    | replay | 128 episodes | r `rmsize` |
    | discount | 1 | r `discount` |
    | tau, pace of the target networks | 0.01 | r `tau` |
    | sigma of the truncated normal noise, for actions in [0, 1] | 0.5 | r `init_delta` |
    | what sigma is multiplied by after every episode after the warm-up | 0.99 | r `delta_decay` |
    | updates per step of an episode | 1 | r `n_update` |
    | reward per percentage point of the metric, copied to all steps | 0.1 | e `reward`; r `train` |
    | moving average of batches' mean rewards, subtracted from them | 0.5 | d `moving_alpha` |
    | format of an action | stretches of equal length | e `_action_wall` |
    | way into the budget | backwards, input first, one bit each | e `_final_action_wall` |
    | fine-tuning before an episode's reward | `finetune_steps` | r `finetune_epoch` |

    Departures:

    * HAQ chooses bits, we an index into the formats: the same where these are consecutive numbers of bits. Decisions
      that are pinned, or were taken at an earlier layer, are no steps; HAQ acts there in vain. It pins the first and
      last layer to 8 bits, as `space=ends8` does.
    * States are as the paper describes them. HAQ's code has the flag of weight or input the other way round after an
      episode's first step, and begins an episode with an action of the one before. What is equal for all layers is 0.
    * The actor ends in a hyperbolic tangent, over [-1, 1], where HAQ's ends in a sigmoid, over [0, 1]; the noise is
      therefore twice as wide, which is the same share of the range.
    * HAQ's code keeps 128 transitions per layer: 128 episodes where a layer is one step, as for weights alone, but 64
      where it is two. Its warm-up is one episode longer than its setting says.
    * HAQ updates once as it stores each transition of an episode; here all updates follow when it is stored.
    * The reward is measured on the selection split. HAQ's is the training accuracy of the epoch it fine-tunes for, by
      SGD on labels; our fine-tuning is `search.recover.finetune`, off by default.
    * The warm-up is no more than a quarter of the evaluations (2 episodes of 10), so that few of them teach, too.
    * For other metrics than accuracies, percentage points are percent of the float network's quality. Where the budget
      limits the quality drop, the reward is -0.1 for each percent of the penalised loss: the cost as a share of the
      float network's, and ten times what the drop is over the limit. What lost ten times all there is earns no less.
    * Ours: the policies of `strategy.start_from` are the first episodes, measured and remembered before the warm-up.
    """

    name = "haq"

    @checks_types
    def __init__(
        self,
        evaluations: int = 600,
        seconds: float | None = None,
        start_from: str | None = None,
        warm_up: int = 20,
        finetune_steps: int = 0,
    ) -> None:
        """Creates the strategy.

        Args:
            evaluations: Measurements it may spend, one per episode.
            seconds: Seconds of measuring and learning it may spend; None is no limit.
            start_from: `solver`, or the path of a run directory or of a plan, to begin with.
            warm_up: Episodes of random actions before it learns, but no more than a quarter of the evaluations.
            finetune_steps: Batches on which every policy is fine-tuned before it is measured; 0 is not at all.

        Raises:
            ConfigError: If a setting is out of range.
        """
        super().__init__(evaluations, seconds, start_from)
        for key, value in {"warm_up": warm_up, "finetune_steps": finetune_steps}.items():
            if value < 0:
                raise ConfigError(f"strategy.{key}={value} must be at least 0")
        self.warm_up = warm_up
        self.finetune_steps = finetune_steps

    @property
    def proposes_one(self) -> bool:
        return True

    def search(self, space: SearchSpace, objective: Objective, rng: np.random.Generator) -> None:
        from search.strategies.haq.agent import HaqAgent
        from search.strategies.haq.env import WalkEnv

        walk = Walk.through(objective.pricing.network, space)
        if not len(walk):
            objective(space.decode([0] * len(space.decisions)))
            return
        wall = ActionWall(objective.pricing, objective.limits, walk.decisions)

        def judge(point: tuple[int, ...]) -> float:
            return reward(objective, objective(space.decode(wall.confine(point))))

        seed = int(rng.integers(2**31))
        with own_randomness(seed):
            env = WalkEnv(walk, judge)
            agent = HaqAgent(env, len(walk), min(self.warm_up, self.evaluations // WARM_UP_SHARE), seed)
            for policy in objective.starts:
                agent.demonstrate(env, walk.actions(space.encode(policy)))
            agent.learn_on()


def reward(objective: Objective, trial: Trial) -> float:
    """What an episode earns: a tenth of the change of the metric, in percentage points.

    Of a metric that is no accuracy in [0, 1], in percent of the float network's quality. Where the drop is limited, and
    for what could not be measured, a tenth of the penalised loss in percent, negated.
    """
    quality = objective.float_quality
    if objective.quality_drop is not None or not trial.is_measured:
        loss = penalised_loss(objective, trial)
    else:
        is_accuracy = objective.higher_is_better and 0 < quality <= 1
        loss = trial.drop / (1.0 if is_accuracy else abs(quality) or 1.0)
    return -REWARD * 100 * min(loss, LOST)
