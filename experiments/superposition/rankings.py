"""Which reading of summed-up output changes ranks policies as their measured accuracy does?

    python experiments/superposition/rankings.py

Sweeps the single choices {int2, int4, int8} of ResNet-20 on 500 Fashion-MNIST training images, inputs at uint8. At 3,
3.5 and 4 average bits it takes the plan that every reading's search proposes, and random policies near the plan of
least additive KL, and measures them on 1000 selection images.

Writes policies.csv (what was measured; what it holds already is not measured again) and rankings.csv: per reading
Spearman's correlation of its predictions with the measured error, over all policies, over the better half, and within
each budget, and the accuracy of its own plans.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from hwmodels import Format, Precision
from search.quality.evaluate import batch_scores
from search.quantize.fold import fold_batch_norm
from search.quantize.prefix import PrefixRunner
from search.quantize.simulate import QuantizedModel
from search.solve.descent import Descent, Ground
from search.solve.linear import solve
from search.solve.predictor import Predictor
from search.solve.problem import Choices, Problem
from search.solve.readings import Reading, reading
from search.solve.superposition import Evolution
from search.tasks.fashion_mnist import FashionMNIST
from search.trace import trace

HERE = Path(__file__).parent
FORMATS = [Format.parse(name) for name in ("int2", "int4", "int8")]
INPUT = Format.parse("uint8")
BUDGETS = (3.0, 3.5, 4.0)
SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.3, 0.4, 0.4)  # of the layers that are drawn anew
IMAGES = 1000
SCALES = {"mean margin": (0.1, 0.3, 1.0), "spread of its row": (0.2, 1.0), "spread of the base": (0.2, 1.0)}


class Network:
    """ResNet-20 and what single choices do to its outputs, inputs at uint8."""

    def __init__(self) -> None:
        self.task = FashionMNIST()
        batches = list(self.task.batches("calibration"))
        example = self.task.inputs(batches[0])[:2]
        folded = fold_batch_norm(self.task.model, example)
        self.simulated = QuantizedModel(folded.model, trace(folded.model, example), reuse_memory=True)
        self.simulated.calibrate(self.task.inputs(batch) for batch in batches)
        self.names = self.simulated.network.names
        self.targets = torch.cat([batch[1] for batch in batches]).numpy()
        inputs = {name: Precision(input=INPUT) for name in self.names}
        policies = [inputs, *({**inputs, name: Precision(f, INPUT)} for name in self.names for f in FORMATS)]
        outputs: list[Any] = [None] * len(policies)
        for index, found in PrefixRunner(self.simulated, self.task, batches).sweep(
            policies, lambda o, _: o.float().clone()
        ):
            outputs[index] = torch.cat(list(found)).numpy()
        self.base = outputs[0]
        self.changes = np.stack(outputs[1:]) - self.base
        weights = np.array([self.simulated.weight(name).numel() for name in self.names])
        bits = tuple(weights[layer] / weights.sum() * np.array([2.0, 4.0, 8.0]) for layer in range(len(weights)))
        kl = reading("divergence_to", self.base)(self.base + self.changes)
        self.problem = Problem(tuple(kl.reshape(-1, len(FORMATS))), {"bits": bits})

    def outputs(self, choices: Choices) -> np.ndarray:
        """Predicted outputs of a policy."""
        summed: np.ndarray = self.base + self.changes[self.problem.positions(choices)].sum(0)
        return summed

    def accuracy(self, choices: Choices) -> float:
        """Measured accuracy of a policy on the first selection images."""
        pairs = zip(self.names, choices, strict=True)
        model = self.simulated.apply({name: Precision(FORMATS[choice], INPUT) for name, choice in pairs})
        batches = list(self.task.batches("selection"))
        count = -(-IMAGES // len(batches[0][1]))
        return float(batch_scores(self.task, model, batches[:count]).mean())


def scaled_margin(targets: np.ndarray, base: np.ndarray, scale: str, temperature: float) -> Reading:
    """`margin_error` with its margins divided by something else than the spread of all predicted outputs."""
    leads = reading("error", targets).coordinates

    def loss(found: np.ndarray) -> np.ndarray:
        with_target = np.concatenate([found, np.zeros_like(found[..., :1, :])], axis=-2)
        spread = {
            "mean margin": lambda: np.abs(found.max(-2)).mean(-1, keepdims=True),
            "spread of its row": lambda: with_target.std(-2),
            "spread of the base": lambda: np.sqrt(base.var(-1).mean()),
        }[scale]()
        smooth: np.ndarray = 0.5 + 0.5 * np.tanh(found.max(-2) / (2 * temperature * spread)).mean(-1)
        return smooth

    return Reading("margin_error", leads, loss)


def readings(network: Network) -> dict[str, Reading]:
    targets, base = network.targets, network.base
    margins = {
        f"margin_error, temperature {t}": reading("margin_error", targets, t) for t in (0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
    }
    others = {
        f"margin over {scale}, temperature {t}": scaled_margin(targets, base, scale, t)
        for scale, temperatures in SCALES.items()
        for t in temperatures
    }
    plain = {"error": targets, "cross_entropy": targets, "divergence_to": base, "squared": base}
    return margins | others | {name: reading(name, against) for name, against in plain.items()}


def propose(network: Network, all_readings: dict[str, Reading]) -> dict[tuple[str, float], Choices]:
    """The plans of every reading, of additive KL, and random policies, by source and budget."""
    rng = np.random.default_rng(0)
    proposed = {}
    for bits in BUDGETS:
        limits = {"bits": bits}
        additive = solve(network.problem, limits)
        assert additive is not None
        proposed["additive KL", bits] = additive.choices
        for name, each in all_readings.items():
            ground = Ground(network.problem, limits, Predictor(each, network.base, network.changes))
            evolution = Evolution(ground, keep=1)
            evolution.search([additive.choices], 3, 3, np.random.default_rng(0))
            proposed[name, bits] = evolution.best()[0].choices
        for number, share in enumerate(SHARES):
            ground = Ground(network.problem, limits, Predictor(all_readings["squared"], network.base, network.changes))
            descent = Descent(ground, ground.moves.shuffled(additive.choices, share, rng))
            if descent.repair():
                proposed[f"random {number}", bits] = descent.at
    return proposed


def main() -> None:
    """Proposes, measures, correlates, and writes both tables."""
    torch.set_num_threads(1)
    network = Network()
    all_readings = readings(network)
    proposed = propose(network, all_readings)
    distinct = sorted(set(proposed.values()))
    print(f"{len(distinct)} policies", flush=True)
    known = measured()
    accuracy = {c: known[named(c)] if named(c) in known else network.accuracy(c) for c in distinct}
    write(
        "policies.csv",
        [
            {"source": source, "budget": bits, "accuracy": accuracy[c], "bits": named(c)}
            for (source, bits), c in proposed.items()
        ],
    )
    error = np.array([1 - accuracy[choices] for choices in distinct])
    better = error <= np.median(error)
    of_budget = {bits: {c for (_, b), c in proposed.items() if b == bits} for bits in BUDGETS}
    rows = []
    for name, each in all_readings.items():
        loss = each(np.stack([network.outputs(choices) for choices in distinct]))
        row = {"reading": name, "all": spearman(loss, error), "better_half": spearman(loss[better], error[better])}
        for bits in BUDGETS:
            at = np.array([choices in of_budget[bits] for choices in distinct])
            row[f"at_{bits}"] = spearman(loss[at], error[at])
        rows.append(row | {f"plan_{bits}": round(accuracy[proposed[name, bits]], 4) for bits in BUDGETS})
    write("rankings.csv", rows)
    for row in rows:
        print(row)


def named(choices: Choices) -> str:
    """Bits layer by layer, one digit each."""
    return "".join("248"[choice] for choice in choices)


def measured() -> dict[str, float]:
    path = HERE / "policies.csv"
    rows = csv.DictReader(path.read_text().splitlines()) if path.exists() else ()
    return {row["bits"]: float(row["accuracy"]) for row in rows}


def spearman(first: np.ndarray, second: np.ndarray) -> float:
    return round(float(spearmanr(first, second)[0]), 3)


def write(name: str, rows: list[dict[str, Any]]) -> None:
    with (HERE / name).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
