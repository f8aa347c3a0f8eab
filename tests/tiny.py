"""A network of four layers on random images: everything a search needs, in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hwmodels import CostModel, Network, StorageModel, Workload
from hwmodels.cost import COSTS
from search.budget import Budget
from search.job import Job, SpaceSettings
from search.objective import Objective
from search.plan import Plan
from search.planning import make_plan
from search.policy import Policy
from search.pricing import Pricing
from search.quality.evaluate import Evaluator
from search.quantize.fold import fold_batch_norm
from search.quantize.settings import QuantizerSettings
from search.quantize.simulate import QuantizedModel
from search.recover import Gain
from search.sensitivity.scoring import score_space
from search.sensitivity.settings import SensitivitySettings
from search.sensitivity.table import SensitivityTable
from search.space import SearchSpace, build_space
from search.strategies.base import Strategy
from search.strategies.baselines import RandomSearch
from search.tasks.task import Split, Task
from search.trace import trace
from search.trials import TrialLog

SAMPLES = {"calibration": 48, "selection": 120, "report": 120}
WEIGHTS = ("int2", "int4", "int8")


class TinyNet(nn.Module):
    """Four layers, two of which read the same tensor, and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.left, self.right = nn.Conv2d(4, 6, 3), nn.Conv2d(4, 6, 3)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.left(x) + self.right(x))
        return self.head(x.mean((2, 3)))


class TinyTask(Task):
    """Top-1 accuracy against what the float network says, one label in ten replaced."""

    name = "tiny"

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.model = TinyNet().eval()
        with torch.no_grad():
            for parameter in self.model.parameters():
                scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.3
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            self.model.norm.weight.fill_(1.5)
            self.model.norm.running_var.uniform_(0.5, 2.0, generator=generator)
            images = torch.randn(200, 1, 6, 6, generator=generator)
            self.model.head.bias.sub_(self.model(images).mean(0))  # so that every class is predicted
            self._data = {}
            for split, count in SAMPLES.items():
                images = torch.randn(count, 1, 6, 6, generator=generator)
                labels = self.model(images).argmax(-1)
                noise = torch.rand(count, generator=generator) < 0.1
                labels = torch.where(noise, torch.randint(5, (count,), generator=generator), labels)
                self._data[split] = (images, labels)
        self.example_input = self._data["calibration"][0][:2]

    def batches(self, split: Split) -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = self._data[split]
        return zip(images.split(40), labels.split(40), strict=True)

    def score(self, outputs: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (outputs.argmax(-1) == batch[1]).double()


class SlowToUnpack(StorageModel):
    """A device on which fewer weight bits take longer."""

    def cost_table(self, network, choices, workload):
        table = super().cost_table(network, choices, workload)
        for row in table.layers.values():
            row.numbers[:, COSTS.index("latency_s")] = [1e-3 / precision.weight.bits for precision in row]
        return table


@dataclass
class Bench:
    """The parts of a search around one task, ready to be put together."""

    task: Task
    network: Network
    space: SearchSpace
    pricing: Pricing
    simulated: QuantizedModel
    evaluator: Evaluator
    folds: tuple[tuple[str, str], ...] = ()

    def scores(self, directory: Path | None = None, settings: SensitivitySettings | None = None) -> SensitivityTable:
        return score_space(self.task, self.simulated, self.space, settings, directory)

    def objective(self, log: Path, limits: dict[str, float], strategy: Strategy, **options) -> Objective:
        table: list[SensitivityTable] = []  # scored once for all objectives of one bench would hide a lost log

        def score() -> SensitivityTable:
            table.append(self.scores(log.parent))
            return table[-1]

        return Objective(self.evaluator, self.pricing, limits, TrialLog(log), strategy, score, **options)

    def costs(self, name: str) -> list[float]:
        """One cost of every policy of the space."""
        return [self.pricing.costs(policy)[name] for policy in self.space]


def make_bench(
    task: Task | None = None,
    weight: Sequence[str] = WEIGHTS,
    input: Sequence[str] = ("uint4", "uint8"),
    pins: dict[str, str] | None = None,
    ties: Sequence[Sequence[str]] = (),
    cost_model: CostModel | None = None,
    directory: Path | None = None,
    quantizer: QuantizerSettings | None = None,
) -> Bench:
    """Folds, traces and calibrates a task's network, and prices it."""
    task = task or TinyTask()
    folded = fold_batch_norm(task.model, task.example_input)
    network = trace(folded.model, task.example_input)
    space = build_space(network, weight, input, pins, ties)
    pricing = Pricing(network, space, cost_model or StorageModel(), Workload())
    simulated = QuantizedModel(folded.model, network, quantizer)
    simulated.calibrate(task.inputs(batch) for batch in task.batches("calibration"))
    return Bench(task, network, space, pricing, simulated, Evaluator(task, simulated, directory), folded.folds)


def tiny_plan(bench: Bench, directory: Path, policy: Policy, gains: Sequence[Gain] = ()) -> Plan:
    """Writes down a policy as a plan."""
    job = Job(
        task=bench.task,
        cost_model=bench.pricing.cost_model,
        strategy=RandomSearch(evaluations=5),
        budget=Budget(size_ratio=0.5),
        run_dir=directory,
        space=SpaceSettings(list(WEIGHTS), ["uint4", "uint8"]),
        quantizer=bench.simulated.settings,
    )
    limits = job.budget.limits(bench.pricing.reference("float"))
    objective = bench.objective(directory / "trials.jsonl", limits, job.strategy)
    qualities = {split: bench.evaluator.measure(policy, split) for split in ("selection", "report")}
    return make_plan(job, objective, bench.evaluator, policy, qualities, bench.folds, gains)
