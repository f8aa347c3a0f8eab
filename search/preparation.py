"""What a search stands on: the network, the space, what is simulated and measured, and where scores are kept.

Whoever works for a search makes the same from the same job in a process of its own, by the same steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from hwmodels import Network, Precision
from search.backends.deployment import Deployment
from search.job import Job
from search.legal import Dropped, runnable
from search.plan import fingerprint
from search.policy import Policy
from search.pricing import placed
from search.quality.evaluate import Evaluator
from search.quality.store import open_store
from search.quantize.fold import Fold, fold_batch_norm
from search.quantize.simulate import QuantizedModel
from search.recover import Gain, parse_steps, recover
from search.recover.tuned import TunedEvaluator
from search.rundir import EVALUATIONS
from search.space import SearchSpace, build_space
from search.ties import joined, shared_input_ties
from search.trace import shared_parameters, trace


@dataclass(frozen=True)
class Ground:
    """A task's network, and what may be decided about it.

    Attributes:
        job: What is searched; its cost model prices what its quantizer places.
        model: The model with its batch norms folded.
        folds: Layer and batch norm of every fold.
        network: Its layers.
        deployment: The backends that the plan is for.
        ties: Layers that share a precision.
        space: What may be decided.
        dropped: What the device or a backend does not run.
    """

    job: Job
    model: nn.Module
    folds: tuple[Fold, ...]
    network: Network
    deployment: Deployment
    ties: list[list[str]]
    space: SearchSpace
    dropped: tuple[Dropped, ...]

    @classmethod
    def of(cls, job: Job) -> Ground:
        """Reads the network, and finds what of the space can be run.

        Raises:
            ConfigError: If a tie, a pin or a backend does not fit, or a decision would be left without any format.
            UnsupportedError: If a backend does not take the model.
        """
        job = replace(job, cost_model=placed(job.cost_model, job.quantizer.placement))
        folded = fold_batch_norm(job.task.model, job.task.example_input)
        network = trace(folded.model, job.task.example_input)
        deployment = Deployment.of(job.export.backends, job.export.keep, job.quantizer.placement)
        deployment.check(job.task.model)
        asked = shared_input_ties(network) if job.space.ties == "auto" else job.space.ties or []
        shared = map(list, shared_parameters(folded.model, network))
        ties = joined([*asked, *shared, *deployment.ties(network)], network)
        asked_for = build_space(network, job.space.weight, job.space.input, job.space.pins, ties)
        space, dropped = runnable(asked_for, network, job.cost_model, deployment.targets)
        return cls(job, folded.model, folded.folds, network, deployment, ties, space, dropped)


class Stages:
    """The networks that one search measures: as calibrated, as repaired before the search, and as tuned.

    Attributes:
        ground: The network, and what may be decided about it.
        calibrated: Measures the network as it was calibrated, or as it is repaired within the loop.
    """

    def __init__(
        self,
        ground: Ground,
        folder: Path,
        store: Path | None,
        own: Path | None = None,
        on_unshared: Callable[[str], None] = lambda reason: None,
    ) -> None:
        """Calibrates the network, and opens the store of its evaluations.

        Args:
            ground: The network.
            folder: Where files are kept, such as how far repairs are.
            store: Folder of what is kept for all runs.
            own: Folder of a store for this search alone, where its evaluations cannot be told from those of others.
            on_unshared: Called with the reason why evaluations are not kept for other runs.

        Raises:
            DataError: If the calibration split cannot be used.
        """
        self.ground = ground
        self._folder = folder
        job, task = ground.job, ground.job.task
        simulated = QuantizedModel(ground.model, ground.network, job.quantizer, reuse_memory=True)
        simulated.calibrate(task.inputs(batch) for batch in task.batches("calibration"))
        root = store / EVALUATIONS if store else None
        kept = open_store(root, task, simulated, fingerprint(task.model), on_unshared, own) if root or own else None
        racing = None if job.strategy.costs else job.racing  # a race is about one cost
        self.calibrated = Evaluator(task, simulated, folder, racing, store=kept)
        self._repaired: tuple[Evaluator, tuple[Gain, ...]] | None = None
        self._tuned: TunedEvaluator | None = None

    def repaired(self, on_step: Callable[[str], None] = lambda name: None) -> tuple[Evaluator, tuple[Gain, ...]]:
        """What measures the network with the repairs that all policies share, and what those gained.

        Args:
            on_step: Called with every repair before it runs.
        """
        steps, evaluator = self.ground.job.recover.before, self.calibrated
        if not steps:
            return evaluator, ()
        if self._repaired is None:
            evaluator.float_scores("report")
            found = recover(parse_steps(steps), evaluator, self._middle, on_step, self._folder, "before")
            self._repaired = evaluator.of(found.simulated, self._named), found.gains
        return self._repaired

    def tuned(self) -> TunedEvaluator | None:
        """What measures every policy after fine-tuning; None where the strategy wants none."""
        steps = self.ground.job.strategy.finetune_steps
        if steps and self._tuned is None:
            self._tuned = TunedEvaluator(self.repaired()[0], steps, self._named)
        return self._tuned

    @property
    def _named(self) -> list[Any]:
        """The repairs before the search as plain values that name them in full."""
        before = self.ground.job.recover.before
        return [before, self._middle.to_dict()] if before else []

    @property
    def _middle(self) -> Policy:
        """What repairs before the search repair for: the given precision, or each choice's middle format."""
        space, precision = self.ground.space, self.ground.job.recover.at
        middle = space.decode([len(decision.formats) // 2 for decision in space.decisions])
        if precision is None:
            return middle
        return Policy({layer: space.precision_of(layer, Precision.parse(precision)) for layer in middle})
