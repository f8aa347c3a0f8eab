"""The study on HAQ's latency table: network, prices, the published plan's cost, and the optimum of the formula."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from hwmodels import Network, Precision, Workload
from hwmodels.cost import ADDITIVE_COSTS, TIERS
from hwmodels.haq_table import NOMINAL_HZ
from search.assignment import assignment_problem, variable_limits
from search.config import config_dir
from search.errors import ConfigError, DataError, UnsupportedError
from search.policy import Policy
from search.quantize.fold import fold_batch_norm
from search.tasks.networks import conv_bn
from search.trace import trace

STUDY = Path(__file__).parent.parent / "experiments" / "haq_mobilenetv2"
MODULES = ("formula", "latency", "mobilenetv2", "problem", "contenders", "figure", "measure")
REFERENCE = Path(os.environ.get("BITPLAN_REFERENCE_DATA", Path(__file__).parents[2] / "shared" / "data"))
TABLE = REFERENCE / "haq_mobilenetv2_latency.npy"
needs_table = pytest.mark.skipif(not TABLE.exists(), reason=f"BITPLAN_REFERENCE_DATA has no {TABLE.name}")

INT8 = Precision.parse("int8/uint8")


@pytest.fixture(scope="module")
def study() -> Iterator[Any]:
    """The modules of the study by name."""
    sys.path.insert(0, str(STUDY))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(STUDY))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def network(study: Any) -> Network:
    return study.mobilenetv2.mobilenetv2()


@pytest.fixture(scope="module")
def made_up() -> np.ndarray:
    """A table of the same shape that grows with the bits, every layer in another way."""
    rng = np.random.default_rng(0)
    scale, fixed = rng.integers(1_000, 50_000, 53), rng.integers(0, 100_000, 53)
    weights, inputs = np.ogrid[1:9, 1:9]
    return fixed[:, None, None] + scale[:, None, None] * np.maximum(weights * inputs, 4 * inputs)


@pytest.fixture(scope="module")
def bench(study: Any, made_up: np.ndarray) -> Any:
    return study.problem.make_bench(made_up)


@pytest.fixture(scope="module")
def cycles(study: Any) -> np.ndarray:
    return study.latency.load_cycles(TABLE)


class InvertedResidual(nn.Module):
    """MobileNetV2's block as its authors have it, with the module names of HAQ's code."""

    def __init__(self, c_in: int, c_out: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = c_in * expansion
        expand = [*conv_bn(c_in, hidden, 1), nn.ReLU6()] if expansion != 1 else []
        depthwise = [*conv_bn(hidden, hidden, stride=stride, groups=hidden), nn.ReLU6()]
        self.conv = nn.Sequential(*expand, *depthwise, *conv_bn(hidden, c_out, 1))
        self.adds = stride == 1 and c_in == c_out

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.adds else self.conv(x)


class MobileNetV2(nn.Module):
    """Sandler et al., 2018, table 2."""

    def __init__(self, stages: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        features: list[nn.Module] = [nn.Sequential(*conv_bn(3, 32, stride=2), nn.ReLU6())]
        c_in = 32
        for expansion, width, blocks, stride in stages:
            for block in range(blocks):
                features.append(InvertedResidual(c_in, width, stride if block == 0 else 1, expansion))
                c_in = width
        features.append(nn.Sequential(*conv_bn(c_in, 1280, 1), nn.ReLU6()))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Linear(1280, 1000)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


def test_network_is_what_tracing_the_model_finds(study: Any, network: Network) -> None:
    model = MobileNetV2(study.mobilenetv2.STAGES).eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 3_504_872  # torchvision's mobilenet_v2
    image = torch.zeros(1, 3, 224, 224)
    assert network == trace(fold_batch_norm(model, image).model, image)


def test_parameters_are_those_published(network: Network) -> None:
    assert len(network) == 53
    biases = sum(layer.bias_count for layer in network)
    channels = biases - 1000  # each with a batch norm's shift, folded into the bias, and its scale, into the weight
    assert network.weight_count + 1000 + 2 * channels == 3_504_872
    assert network.weight_count + biases == 3_487_816
    assert sum(layer.macs for layer in network) == 300_774_272  # "300M" in the paper
    assert sum(layer.is_depthwise for layer in network) == 17
    assert [layer.stride[0] for layer in network if layer.is_depthwise].count(2) == 4


def test_latency_is_the_tables_and_the_rest_is_counted(study: Any, network: Network, made_up: np.ndarray) -> None:
    model, workload = study.latency.cost_model(made_up), Workload(batch=16)
    precisions = [Precision.parse(f"int{w}/uint{a}") for w, a in itertools.product(range(1, 9), repeat=2)]
    table = model.cost_table(network, dict.fromkeys(network.names, precisions), workload)
    for name, rows in zip(network.names, made_up, strict=True):
        found = [round(table.layers[name][precision].cost.latency_s * NOMINAL_HZ) for precision in precisions]
        assert found == rows.ravel().tolist()
        assert all(math.isnan(table.layers[name][precision].cost.energy_j) for precision in precisions)
    assert model.name
    assert "mit-han-lab/haq" in table.source
    assert set(table.tiers.values()) <= set(TIERS)
    assert table.tiers["latency_s"] == "index"
    first = table.layers["features.0.0"][precisions[-1]].cost
    assert first.bit_ops == 10_838_016 * 16 * 64
    assert first.weight_bytes == 864 + 4 * 32 + 4 * 32 + 5  # codes, scales, biases; the input's scale and zero point


def test_network_costs_what_its_layers_add_up_to(study: Any, network: Network, made_up: np.ndarray) -> None:
    model, workload = study.latency.cost_model(made_up), Workload(batch=16)
    rng = np.random.default_rng(1)
    for _ in range(3):
        bits = rng.integers(1, 9, (53, 2))
        policy = Policy(
            {name: Precision.parse(f"int{w}/uint{a}") for name, (w, a) in zip(network.names, bits, strict=True)}
        )
        report = model.network_cost(network, policy, workload)
        looked_up = made_up[np.arange(53), bits[:, 0] - 1, bits[:, 1] - 1].sum()
        assert report.total.latency_s * NOMINAL_HZ == pytest.approx(looked_up, rel=1e-12)
        for cost in ADDITIVE_COSTS:
            parts = [getattr(report.layers[name].cost, cost) for name in network.names]
            assert getattr(report.total, cost) == pytest.approx(sum(parts), rel=1e-12, nan_ok=True)
        assert str(report) == str(model.network_cost(network, policy, workload))  # NaN is not equal to itself


@pytest.mark.parametrize(
    ("precision", "batch", "message"),
    [
        ("float", 16, "features.0.0: float/float is not in the table, which has integers of 1 to 8 bits"),
        ("int16/uint8", 16, "features.0.0: int16/uint8 is not in the table"),
        ("int8/uint8", 1, "of 53 layers at batch 16, got 53 layers at batch 1"),
    ],
)
def test_what_the_table_does_not_know_is_refused(
    study: Any, network: Network, made_up: np.ndarray, precision: str, batch: int, message: str
) -> None:
    policy = Policy.uniform(network, Precision.parse(precision))
    with pytest.raises(ValueError, match=message):
        study.latency.cost_model(made_up).network_cost(network, policy, Workload(batch=batch))


def test_files_that_are_no_table_are_refused(study: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BITPLAN_REFERENCE_DATA", raising=False)
    with pytest.raises(DataError, match=r"give --table PATH, or set BITPLAN_REFERENCE_DATA"):
        study.latency.table_path(None)
    path = tmp_path / TABLE.name
    np.save(path, np.zeros((53, 8, 8)))
    assert study.latency.table_path(path) == path
    monkeypatch.setenv("BITPLAN_REFERENCE_DATA", str(tmp_path))
    assert study.latency.table_path(None) == path
    with pytest.raises(DataError, match=r"holds float64 of shape \(53, 8, 8\)"):
        study.latency.load_cycles(path)


@needs_table
def test_table_is_haqs(cycles: np.ndarray) -> None:
    uniform = [int(cycles[:, bits - 1, bits - 1].sum()) for bits in (8, 4, 2)]
    assert uniform == [39_624_933, 15_716_150, 7_063_425]
    assert (np.diff(cycles, axis=1) >= 0).all()
    assert (np.diff(cycles, axis=2) >= 0).all()


@needs_table
def test_published_plan_costs_what_haq_says(study: Any, network: Network, cycles: np.ndarray) -> None:
    published, bench = study.latency.Published.load(), study.problem.make_bench(cycles)
    assert len(published.weights) == len(published.inputs) == 53
    assert published.cycles_as_coded(cycles) == 23_433_397
    assert round(23_433_397 / 39_624_933, 4) == 0.5914
    policy = published.policy(network)
    assert policy["features.0.0"] == policy["classifier"] == INT8
    assert round(bench.latency_ratio(policy), 4) == 0.5965
    assert np.mean(published.weights) == pytest.approx(5.70, abs=5e-3)
    assert np.mean(published.inputs[1:]) == pytest.approx(6.31, abs=5e-3)
    bench.space.encode(policy)  # it lies in the space
    eased = {
        layer.name: Precision(INT8.weight, policy[layer.name].input) if layer.is_depthwise else policy[layer.name]
        for layer in network
    }
    assert round(bench.latency_ratio(Policy(eased)), 4) == 0.5978  # depthwise weights cost next to nothing


@needs_table
def test_budget_is_the_ratio_of_8_bits_exactly(study: Any, cycles: np.ndarray) -> None:
    bench = study.problem.make_bench(cycles)
    assert bench.limits == {"latency_s": pytest.approx(0.6 * 39_624_933 / NOMINAL_HZ, rel=2e-12)}
    assert bench.latency_ratio(Policy.uniform(bench.network, INT8)) == 1


def test_space_is_haqs(bench: Any) -> None:
    assert bench.space.size == 7 ** (2 * 51)
    assert {len(decision.layers) for decision in bench.space.decisions} == {1}, "no two layers read one tensor"


def test_loss_is_the_sum_it_says(bench: Any) -> None:
    formula, space = bench.formula, bench.space
    assert (formula.amplitudes**2).sum() / 4**4 == pytest.approx(0.2)
    rng = np.random.default_rng(2)
    for _ in range(5):
        policy = space.sample(rng)
        chain = []
        for unit in space.units:
            precision = policy[unit.name]
            chain.append((unit.input, formula.amplitudes[unit.input] / 2**precision.input.bits))
            chain.append((unit.weight, formula.amplitudes[unit.weight] / 2**precision.weight.bits))
        loss = sum(error**2 for _, error in chain)
        loss += sum(formula.couplings[i, j] * e * f for (i, e), (j, f) in itertools.pairwise(chain))
        assert formula.loss(policy) == pytest.approx(loss, rel=1e-12)
        measured = bench.evaluator.measure(policy, "selection")
        assert measured.value == pytest.approx(math.exp(-loss), rel=1e-12)
        assert measured.drop == 1 - measured.value


def test_form_holds_the_whole_loss(bench: Any) -> None:
    formula, space = bench.formula, bench.space
    problem = assignment_problem(bench.pricing, np.zeros(len(formula.errors)), formula.form)
    policy = space.sample(np.random.default_rng(3))
    choices = [unit.choices.index(policy[unit.name]) for unit in space.units]
    assert problem.score(choices) == pytest.approx(formula.loss(policy), rel=1e-12)
    additive = assignment_problem(bench.pricing, formula.scores)
    assert additive.score(choices) < formula.loss(policy)
    assert np.linalg.eigvalsh(formula.couplings + 2 * np.eye(len(formula.couplings))).min() > 0


def test_predictor_is_off_by_what_it_says(bench: Any, study: Any) -> None:
    told = bench.formula.sensitivity()
    assert told.predictors == ("kl",)
    error = np.log(told.columns["kl"] / bench.formula.scores)
    assert error.std() == pytest.approx(study.formula.PREDICTOR_ERROR, rel=0.1)
    assert abs(error.mean()) < 0.03
    assert (told.columns["kl"] == bench.formula.sensitivity().columns["kl"]).all()


def test_formula_knows_no_samples(bench: Any) -> None:
    policy = bench.space.sample(np.random.default_rng(0))
    with pytest.raises(UnsupportedError, match="no scores per sample"):
        bench.evaluator.scores(policy, "selection")
    with pytest.raises(UnsupportedError, match=r"give strategy.fidelities=\[\]"):
        bench.evaluator.measure(policy, "selection", 0.5)
    with pytest.raises(UnsupportedError, match="no outputs"):
        bench.evaluator.task.score(torch.zeros(1), None)


def chain_bound(bench: Any, steps: int = 60) -> float:
    """A lower bound on the loss within the limits, by other means: Lagrange's, with Viterbi along the chain."""
    problem = assignment_problem(bench.pricing, np.zeros(len(bench.formula.errors)), bench.formula.form)
    limit, latency = variable_limits(bench.pricing, bench.limits)["latency_s"], problem.costs["latency_s"]
    at = np.cumsum([0, *problem.sizes])
    parts = [slice(start, stop) for start, stop in itertools.pairwise(at)]
    own = [np.diagonal(problem.interactions[part, part]) / 2 for part in parts]
    pairs = [problem.interactions[first, second] for first, second in itertools.pairwise(parts)]
    low, high, best = 0.0, 1e3, -math.inf
    for _ in range(steps):
        price = (low + high) / 2
        value, spent = own[0] + price * latency[0], latency[0]
        for pair, score, cost in zip(pairs, own[1:], latency[1:], strict=True):
            total = value[:, None] + pair
            chosen = total.argmin(0)
            value, spent = total.min(0) + score + price * cost, spent[chosen] + cost
        best = max(best, float(value.min()) - price * limit)
        low, high = (low, price) if spent[value.argmin()] <= limit else (price, high)
    return best


@needs_table
def test_references_are_optima(study: Any, cycles: np.ndarray) -> None:
    bench = study.problem.make_bench(cycles)
    additive, whole = study.problem.references(bench, rounds=0)
    losses = [bench.formula.loss(reference.policy) for reference in (additive, whole)]
    assert additive.gap == 0
    assert losses[1] < losses[0], "couplings must matter"
    bound = chain_bound(bench)  # the solver's own takes long here, and has tests of its own
    assert bound <= losses[1] < 1.001 * bound
    for reference in (additive, whole):
        assert 0.59 < bench.latency_ratio(reference.policy) <= 0.6 * (1 + 1e-12)


def test_every_strategy_runs_or_says_why_not(study: Any) -> None:
    names, skipped = study.contenders.contenders()
    assert {*names, *skipped} == {path.stem for path in (config_dir() / "strategy").glob("*.yaml")}
    assert {"auto", "random"} <= set(names)
    assert skipped["solver"] == "the same as auto"
    assert skipped["custom"] == "strategy._target_ is for users to set"
    with pytest.raises(ConfigError, match=r"strategy rndom is unknown \(did you mean 'random'"):
        study.contenders.contenders(["rndom"])


def test_search_keeps_the_budget_and_its_seed(study: Any, bench: Any) -> None:
    runs = [study.contenders.run(bench, "random", 12, seed) for seed in (0, 0, 1)]
    assert [run.measured for run in runs] == [12, 12, 12]
    assert runs[0].best.policy == runs[1].best.policy != runs[2].best.policy
    for run in runs:
        assert run.proposed >= run.measured
        assert bench.latency_ratio(run.best.policy) <= 0.6 * (1 + 1e-12)
        assert run.best.drop == pytest.approx(1 - math.exp(-bench.formula.loss(run.best.policy)), rel=1e-12)


def test_rows_of_other_strategies_are_kept(study: Any, bench: Any, tmp_path: Path) -> None:
    measured = study.measure.measured_rows(bench, "random", 4, seeds=2)
    path = tmp_path / "strategies.csv"
    assert study.measure.kept_rows(path, 4).empty
    measured.to_csv(path, index=False)
    pd.testing.assert_frame_equal(study.measure.kept_rows(path, 4), measured)
    assert study.measure.kept_rows(path, 5).empty
    assert study.measure.kept_rows(path, 4, without="random").empty
    plans = pd.DataFrame(
        [{"plan": "proved", **study.measure.described(bench, Policy.uniform(bench.network, INT8)), "gap": 0.0}]
    )
    lines = study.measure.summary(measured, plans).splitlines()
    assert len(lines) == 4
    assert "1.0000 | 8.00 | 8.00" in lines[2]
    assert f"{measured.points_lost.median():.3f}" in lines[3]


def test_figure_is_a_png(study: Any, network: Network) -> None:
    drawn = study.figure.draw(network, {"8 bits": ("8" * 53, "8" * 53), "falling": ("8765432" * 7 + "8888", "2" * 53)})
    assert drawn.startswith(b"\x89PNG")
