"""What does racing save, and does it cost the winner?

    python experiments/engine/racing.py --task digits
    python experiments/engine/racing.py --task fashion_mnist

Draws random policies as a search would propose them: over all costs, and within size budgets. All are measured once,
score by score; the scores are kept in runs/racing, so that a second call only replays. Then searches that race are
replayed from those scores by the code that a search runs, one per seed, each with its policies and its samples in an
order of its own. A winner is wrong if it is worse than the best policy of its stream by more than the tolerance.

Writes racing.csv, one row per task, stream and seed; rows of other tasks and streams stay:

    saving        full evaluations stood for, divided by evaluations' worth of samples spent
    winner_loss   how much worse the winner is than the best policy of the stream
    front, front_lost   policies on the true front of weight bytes and drop; how many of them were stopped
    front_loss    how much worse, at most, the best drop within a cost has become along the true front
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from hwmodels import StorageModel, Workload
from search.pareto import front
from search.policy import Policy
from search.pricing import Pricing
from search.quality.evaluate import sample_scores
from search.quality.incumbents import Incumbents
from search.quality.racing import Racing, Track
from search.quality.subsets import shuffle_split
from search.quantize.fold import fold_batch_norm
from search.quantize.simulate import QuantizedModel
from search.space import build_space
from search.tasks.digits import Digits
from search.tasks.fashion_mnist import FashionMNIST
from search.tasks.task import Task
from search.trace import trace

HERE = Path(__file__).parent
TASKS = {"digits": Digits, "fashion_mnist": FashionMNIST}
WEIGHT, INPUT = ("int2", "int3", "int4", "int5", "int6", "int8"), ("uint4", "uint6", "uint8")
BUDGETS = {"all": None, "size_ratio=0.14": 0.14, "size_ratio=0.10": 0.10}
KEPT = Path("runs/racing")


@dataclass(frozen=True)
class Stream:
    """Random policies and all that a replay needs.

    Attributes:
        reference: Scores of the float network, shape `(samples,)`.
        scores: Scores of every policy, shape `(policies, samples)`.
        costs: Weight bytes of every policy, shape `(policies,)`.
    """

    reference: np.ndarray
    scores: np.ndarray
    costs: np.ndarray


def random_policies(pricing: Pricing, budget: float | None, count: int, rng: np.random.Generator) -> Iterator[Policy]:
    """Draws policies uniformly; those over budget are lowered one random step at a time, as strategy=random does."""
    limit = np.inf if budget is None else budget * pricing.reference("float")["weight_bytes"]
    for _ in range(count):
        point = np.array(pricing.space.encode(pricing.space.sample(rng)))
        while pricing.costs(pricing.space.decode(point.tolist()))["weight_bytes"] > limit:
            point[rng.choice(np.flatnonzero(point))] -= 1
        yield pricing.space.decode(point.tolist())


def measure(task: Task, budget: float | None, count: int) -> Stream:
    """Measures the policies of a stream in full."""
    folded = fold_batch_norm(task.model, task.example_input)
    network = trace(folded.model, task.example_input)
    pricing = Pricing(network, build_space(network, WEIGHT, INPUT), StorageModel(), Workload())
    simulated = QuantizedModel(folded.model, network, reuse_memory=True)
    simulated.calibrate(task.inputs(batch) for batch in task.batches("calibration"))
    policies = list(random_policies(pricing, budget, count, np.random.default_rng(0)))
    return Stream(
        reference=sample_scores(task, simulated.apply({}), "selection"),
        scores=np.stack([sample_scores(task, simulated.apply(policy), "selection") for policy in policies]),
        costs=np.array([pricing.costs(policy)["weight_bytes"] for policy in policies]),
    )


def known_stream(task: Task, budget: float | None, count: int) -> Stream:
    """Reads what `measure` found earlier, or calls it."""
    file = KEPT / f"{task.name}-{budget}-{count}.npz"
    if file.is_file():
        return Stream(**np.load(file))
    started = time.perf_counter()
    stream = measure(task, budget, count)
    print(f"{task.name}, budget {budget}: {count} policies in {time.perf_counter() - started:.0f} s", flush=True)
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(file, **vars(stream))
    return stream


def replay(task: Task, stream: Stream, racing: Racing) -> dict[str, float]:
    """Searches through a stream in one random order, racing, and compares with measuring all of it."""
    samples = stream.reference.shape[0]
    split = shuffle_split(
        [torch.arange(samples)],
        lambda batch: stream.reference[batch.numpy()],
        samples,
        lambda units: racing.looks(samples, units),
        racing.seed,
    )
    track = Track(task, split, racing, stream.reference)
    order = np.random.default_rng(racing.seed).permutation(len(stream.costs))
    drops = stream.reference.mean() - stream.scores.mean(1)
    incumbents = Incumbents(lambda policy: np.empty(0))
    spent, finished = 0, []
    for number in order:
        rivals = incumbents.scores(stream.costs[number])
        scores, seen = stream.scores[number], 0
        for subset in split.subsets:
            seen += len(subset.places)
            if seen < samples and track.is_lost(scores[split.order[:seen]], rivals):
                break
        else:
            finished.append(number)
            incumbents.add(Policy({str(number): None}), stream.costs[number], drops[number], scores)
        spent += seen
    points = np.stack([stream.costs, drops], 1)
    best = front(points, (False, False))
    return {
        "policies": len(order),
        "measured_in_full": len(finished),
        "evaluations_spent": spent / samples,
        "saving": len(order) * samples / spent,
        "winner_loss": drops[finished].min() - drops.min(),
        "front": int(best.sum()),
        "front_lost": int(best.sum() - best[finished].sum()),
        "front_loss": front_loss(points[best], points[finished]),
    }


def front_loss(best: np.ndarray, found: np.ndarray) -> float:
    """How much worse, at most, the best drop within a cost is where the costs of the true front are the limits."""
    return max(found[found[:, 0] <= cost, 1].min(initial=1.0) - drop for cost, drop in best)


def main() -> None:
    """Measures, replays, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="digits")
    parser.add_argument("--streams", nargs="+", choices=BUDGETS, default=list(BUDGETS))
    parser.add_argument("--policies", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--tolerance", type=float, default=0.0)
    parser.add_argument("--first", type=int, default=32)
    parser.add_argument("--growth", type=float, default=2.0)
    given = parser.parse_args()
    task, rows = TASKS[given.task](), []
    for name in given.streams:
        stream = known_stream(task, BUDGETS[name], given.policies)
        for seed in range(given.seeds):
            racing = Racing(given.tolerance, first=given.first, growth=given.growth, seed=seed)
            about = {"task": task.name, "stream": name, "seed": seed, "tolerance": given.tolerance}
            rows.append(about | replay(task, stream, racing))
    table = pd.DataFrame(rows)
    print(summary(table).to_string())
    file = HERE / "racing.csv"
    if file.is_file():
        others = pd.read_csv(file)
        table = pd.concat([others[(others["task"] != task.name) | ~others["stream"].isin(given.streams)], table])
    table.round(6).to_csv(file, index=False)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, and the worst that happened."""
    wrong = table["winner_loss"] > table["tolerance"] + 1e-12
    return (
        table.assign(wrong_winners=wrong)
        .groupby(["task", "stream"], sort=False)
        .agg(
            policies=("policies", "first"),
            in_full=("measured_in_full", "mean"),
            spent=("evaluations_spent", "mean"),
            saving=("saving", "mean"),
            least_saving=("saving", "min"),
            wrong_winners=("wrong_winners", "sum"),
            winner_loss=("winner_loss", "max"),
            front=("front", "first"),
            front_lost=("front_lost", "mean"),
            front_loss=("front_loss", "max"),
        )
        .round(4)
    )


if __name__ == "__main__":
    main()
