"""Measuring policies after fine-tuning, as HAQ does before it rewards an episode."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import nn

from hwmodels import Precision
from search.policy import Policy
from search.quality.evaluate import Evaluator
from search.quality.store import PROBE, answers_digest
from search.quantize.simulate import QuantizedModel
from search.recover import Gain, Step
from search.recover.finetune import finetune


class TunedEvaluator(Evaluator):
    """Measures every policy on a copy of the network that was fine-tuned under it.

    All policies start from the same network and see the same batches in the same order, so that on a CPU a policy gets
    the same weights every time, to the last bit: they are not kept, but made again for the policy that wins (`settle`).

    Attributes:
        steps: Batches to fine-tune on.
    """

    def __init__(self, evaluator: Evaluator, steps: int, repairs: Any = None) -> None:
        """Creates the evaluator.

        Where there is a store, the scores are kept in it apart from those of the network as it was; a probe is
        fine-tuned to tell whether anyone else's fine-tuning gives the same weights.

        Args:
            evaluator: Measures the network before fine-tuning.
            steps: Batches to fine-tune on, at least 1.
            repairs: What was done to the network before that, as plain values; for the store.
        """
        super().__init__(evaluator.task, evaluator.simulated, evaluator.directory, evaluator.racing, evaluator._floats)
        self._reference, self._counts = evaluator._reference, evaluator._counts
        self._untuned = evaluator
        self.steps = steps
        if evaluator.store:
            answers = answers_digest(self.task, self.network(Policy.uniform(self.simulated.network, PROBE)))
            done = {"before": repairs, "finetune": {"steps": steps, "answers": answers}}
            self.store = evaluator.store.repaired(done, "tuned")

    def network(self, policy: Mapping[str, Precision]) -> nn.Module:
        """The network, fine-tuned under a policy and quantized by it."""
        return self._tuned(policy).apply(policy)

    def settle(self, policy: Mapping[str, Precision], drop: float) -> tuple[Evaluator, Gain]:
        """Fine-tunes for good: returns an evaluator of the very network that was measured, and what that gained.

        Args:
            policy: The policy that won.
            drop: Its drop as measured on the selection split, fine-tuned.
        """
        started = time.perf_counter()
        before = self._untuned.measure(policy, "selection").drop
        evaluator = self._untuned.of(self._tuned(policy))
        step = Step("finetune", {"steps": self.steps})
        return evaluator, Gain(str(step), before, drop, True, round(time.perf_counter() - started, 3))

    def _tuned(self, policy: Mapping[str, Precision]) -> QuantizedModel:
        return finetune(self.simulated, policy, self.task, self._floats, steps=self.steps)
