"""The exact solver on HAQ's measured latency table of MobileNetV2, against brute force on a part of it.

The table is that of github.com/mit-han-lab/haq (MIT): latency of 53 layers at batch 16, index
`[layer, weight_bits - 1, input_bits - 1]`. Scores are synthetic.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import numpy as np
import pytest

from search.solve.linear import least, solve
from search.solve.problem import Problem

REFERENCE = Path(os.environ.get("BITPLAN_REFERENCE_DATA", Path(__file__).parents[2] / "shared" / "data"))
TABLE = REFERENCE / "haq_mobilenetv2_latency.npy"
pytestmark = pytest.mark.skipif(not TABLE.exists(), reason=f"BITPLAN_REFERENCE_DATA has no {TABLE.name}")

# Sandler et al., "MobileNetV2: Inverted Residuals and Linear Bottlenecks" (2018), table 2:
# expansion, output channels, blocks, stride of the first
STAGES = ((1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))


def mobilenet_v2() -> np.ndarray:
    """Number of weights and of input values of each layer at 224 x 224, width 1, shape `(53, 2)`."""
    layers = [(3 * 32 * 9, 3 * 224**2)]
    channels, side = 32, 112
    for expansion, width, blocks, first_stride in STAGES:
        for stride in (first_stride, *[1] * (blocks - 1)):
            hidden = channels * expansion
            if expansion > 1:
                layers.append((channels * hidden, channels * side**2))
            layers.append((hidden * 9, hidden * side**2))
            side //= stride
            layers.append((hidden * width, hidden * side**2))
            channels = width
    layers += [(channels * 1280, channels * side**2), (1280 * 1000, 1280)]
    return np.array(layers, dtype=float)


def problem_of(layers: np.ndarray) -> Problem:
    """Every pair of 1 to 8 weight bits and 1 to 8 input bits, with scores weights * 4^-bits + inputs * 4^-bits."""
    latency, counts = np.load(TABLE)[layers], mobilenet_v2()[layers]
    error = 4.0 ** -np.arange(1, 9)
    scores = tuple((weights * error[:, None] + inputs * error).ravel() for weights, inputs in counts)
    return Problem(scores, {"latency": tuple(table.ravel().astype(float) for table in latency)})


def test_shapes_are_mobilenets() -> None:
    counts = mobilenet_v2()
    assert counts.shape == (53, 2)
    assert counts[:, 0].sum() == 3_469_760  # 3,504,872 parameters without 34,112 of batch norms and 1,000 biases
    assert len(np.load(TABLE)) == 53


@pytest.mark.parametrize("ratio", [0.9, 0.8, 0.7, 0.6, 0.5, 0.4])
def test_latency_ratios_are_kept_and_proved(ratio: float) -> None:
    problem = problem_of(np.arange(53))
    whole = problem.cost("latency", [63] * 53)  # 8 bits throughout
    found = solve(problem, {"latency": ratio * whole})
    assert found is not None
    assert found.costs["latency"] <= ratio * whole
    assert found.optimal
    assert found.bound == found.score
    cheapest = solve(problem, {}, minimise="latency", max_score=found.score)
    assert cheapest is not None
    assert cheapest.costs["latency"] <= found.costs["latency"]
    assert cheapest.score == pytest.approx(found.score, rel=1e-12), "nothing better costs less"


@pytest.mark.parametrize("seed", range(4))
def test_parts_are_what_brute_force_finds(seed: int) -> None:
    rng = np.random.default_rng(seed)
    problem = problem_of(rng.choice(53, 3, replace=False))
    scores = np.add.outer(np.add.outer(*problem.scores[:2]), problem.scores[2])
    columns = problem.costs["latency"]
    latencies = np.add.outer(np.add.outer(*columns[:2]), columns[2])  # integers, hence exact
    assert least(problem, "latency").costs["latency"] == latencies.min()
    for ratio in (0.9, 0.6, 0.4, 0.2):
        limit = ratio * latencies[63, 63, 63]
        found = solve(problem, {"latency": limit})
        within = scores[latencies <= limit]
        if not len(within):
            assert found is None
            continue
        assert found is not None
        assert found.optimal
        assert found.score == pytest.approx(within.min(), rel=1e-12)


def test_budgets_are_monotone() -> None:
    problem = problem_of(np.arange(20))
    whole = problem.cost("latency", [63] * 20)
    found = [solve(problem, {"latency": ratio * whole}) for ratio in np.linspace(0.2, 1, 9)]
    scores = [solution.score for solution in found if solution]
    assert len(scores) == 9
    assert all(later <= earlier for earlier, later in itertools.pairwise(scores))
