"""Repairs within the loop: means and deviations as in float, plans of the same bits, a choice by measuring."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from networks import Recurrent
from repairing import LAYERS, correlated, simulate, uniform
from tiny import Bench, TinyTask, make_bench, tiny_plan
from torch import Tensor, nn

from hwmodels import Format, Precision
from search.errors import ConfigError
from search.plan import Plan
from search.policy import Policy
from search.quality.loop_repair import LoopRepair, best_repair, choose_repair, probes
from search.quantize.formats import encode
from search.quantize.grouping import to_groups
from search.quantize.inputs import input_quantizer
from search.quantize.sample import LEAST_IMAGES, MOST_VALUES, InputSample
from search.quantize.settings import QuantizerSettings, Ranges
from search.quantize.simulate import QuantizedModel, exact_inference
from search.recover import REPAIRS, parse_steps
from search.recover.batch_norm import batch_norm
from search.recover.statistics import Moments
from search.recover.unfold import channel_axis
from search.recover.watch import watch

REPAIRED = {"bias": QuantizerSettings(repair="bias"), "batch_norm": QuantizerSettings(repair="batch_norm")}
GROUPED_TRANSPOSED = ("transposed 2d, two groups", "transposed 2d, cropped")  # their groups share scales: no gain


def run(simulated: QuantizedModel, policy: dict | Policy, x: Tensor) -> Tensor:
    with exact_inference():
        return simulated.apply(policy)(x).clone()


def moments(simulated: QuantizedModel, inputs: Tensor, policy: dict | Policy) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every channel of what a network of one layer returns."""
    y = run(simulated, policy, inputs).movedim(channel_axis(simulated.owner("0")), -1).flatten(0, -2)
    return y.mean(0), y.std(0)


@pytest.mark.parametrize("precision", ["int2", "int3/uint4", "uint3/uint8", "nf4/uint4", "ternary/int8-token"])
@pytest.mark.parametrize("name", [name for name in LAYERS if name != "one sample"])
def test_a_layer_keeps_the_mean_and_deviation_of_its_channels(name: str, precision: str) -> None:
    torch.manual_seed(0)
    module, shape = copy.deepcopy(LAYERS[name][0]), LAYERS[name][1]
    inputs = correlated(24, *shape[1:], axis=-1 if name == "linear" else 1)
    _, simulated = simulate(nn.Sequential(module), inputs, repair="auto")
    policy = uniform(simulated, precision)
    wanted_mean, wanted_deviation = moments(simulated, inputs, {})
    simulated.repair_with("none")
    plain_mean, plain_deviation = moments(simulated, inputs, policy)
    assert (plain_mean - wanted_mean).abs().max() > 1e-3
    assert (plain_deviation / wanted_deviation - 1).abs().max() > 1e-2
    for repair in ("bias", "batch_norm"):
        simulated.repair_with(repair)
        mean, deviation = moments(simulated, inputs, policy)
        torch.testing.assert_close(mean, wanted_mean, rtol=0, atol=1e-5)
        if repair == "bias" or name in GROUPED_TRANSPOSED:
            torch.testing.assert_close(deviation, plain_deviation, rtol=1e-4, atol=1e-6)
        else:
            torch.testing.assert_close(deviation, wanted_deviation, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["int2", "uint3-g5", "int4-full", "fp4", "nf4", "binary", "ternary", "codebook3-g9"])
def test_codes_stay(name: str) -> None:
    bench, precision = make_bench(quantizer=REPAIRED["batch_norm"]), Precision.parse(f"{name}/uint4")
    simulated, format, gained = bench.simulated, precision.weight, 0
    for layer in bench.network:
        pairs = [
            (simulated.float_weight(layer.name), simulated.weight_parameters(layer.name, format)),
            (simulated.stored_weight(layer.name, precision), simulated.stored_parameters(layer.name, precision)),
        ]
        plain, stored = (encode(to_groups(w, format, layer.channel_axis).rows, format, p) for w, p in pairs)
        assert (plain == stored).float().mean() > 0.98  # a value half way between two codes may fall either way
        gained += not torch.equal(pairs[0][0], pairs[1][0])
    assert gained == len(bench.network.layers)


@pytest.mark.parametrize("name", ["int2-tensor", "mxfp4", "nvfp4", "bf16", "float"])
def test_formats_that_cannot_take_a_gain_get_the_mean_alone(name: str) -> None:
    inputs = correlated(24, 4, 6, 6)
    _, simulated = simulate(nn.Sequential(nn.Conv2d(4, 6, 3)), inputs, repair="batch_norm")
    policy = uniform(simulated, f"{name}/uint4")
    assert torch.equal(simulated.stored_weight("0", policy["0"]), simulated.float_weight("0"))
    torch.testing.assert_close(moments(simulated, inputs, policy)[0], moments(simulated, inputs, {})[0])


def test_no_repair_is_the_engine_without_repairs() -> None:
    plain, auto = make_bench(), make_bench(quantizer=QuantizerSettings(repair="auto"))
    auto.simulated.repair_with("batch_norm")
    x, rng = plain.task.example_input, np.random.default_rng(0)
    policies = [plain.space.sample(rng) for _ in range(4)]
    repaired = [run(auto.simulated, policy, x) for policy in policies]
    auto.simulated.repair_with("none")
    for policy, other in zip(policies, repaired, strict=True):
        assert torch.equal(run(auto.simulated, policy, x), run(plain.simulated, policy, x))
        assert not torch.equal(run(auto.simulated, policy, x), other)
    assert torch.equal(run(auto.simulated, {}, x), run(plain.simulated, {}, x))


def test_a_repair_depends_on_its_own_layer_alone(bench: Bench) -> None:
    bench = make_bench(quantizer=REPAIRED["batch_norm"])
    simulated, rng = bench.simulated, np.random.default_rng(1)
    held: dict[tuple[str, Precision], tuple[Tensor, Tensor]] = {}
    for _ in range(12):
        policy = bench.space.sample(rng)
        model = simulated.apply(policy)
        for name, precision in policy.items():
            found = simulated.weight(name).clone(), model.get_submodule(name).bias.clone()
            known = held.setdefault((name, precision), found)
            assert all(torch.equal(one, other) for one, other in zip(found, known, strict=True))
    assert len(held) > 12


def test_weights_that_layers_share_have_no_gain() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6))
    model[2].weight = model[0].weight
    inputs = correlated(48, 6, axis=-1)
    _, simulated = simulate(model, inputs, repair="batch_norm")
    policy = uniform(simulated, "int2/uint8")
    simulated.apply(policy)
    assert torch.equal(simulated.weight("0"), simulated.quantized_weight("0", Format.parse("int2")))


def test_a_module_called_several_times_is_repaired_once() -> None:
    _, simulated = simulate(Recurrent(), torch.randn(32, 4), repair="batch_norm")
    policy, x = uniform(simulated, "int2/uint8"), torch.randn(8, 4)
    assert run(simulated, policy, x).isfinite().all()
    assert not torch.equal(run(simulated, policy, x), run(simulated, {}, x))


def test_dead_channels_keep_their_weights_and_biases_finite() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 1))
    with torch.no_grad():
        model[0].weight[1] = 0
    _, simulated = simulate(model, correlated(16, 2, 4, 4), repair="batch_norm")
    simulated.apply(uniform(simulated, "int2/uint4"))
    assert simulated.weight("0").isfinite().all()
    assert torch.equal(simulated.weight("0")[1], torch.zeros(2, 1, 1))
    torch.testing.assert_close(simulated.owner("0").bias[1], simulated.apply({})[0].bias[1])


def test_bfloat16_and_channels_last() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3)).bfloat16().to(memory_format=torch.channels_last)
    inputs = correlated(32, 4, 6, 6).bfloat16().to(memory_format=torch.channels_last)
    _, simulated = simulate(model, inputs, repair="auto")
    policy, wanted = uniform(simulated, "int2/uint8"), run(simulated, {}, inputs).double().std((0, 2, 3))
    found = []
    for repair in ("none", "batch_norm"):
        simulated.repair_with(repair)
        found.append((run(simulated, policy, inputs).double().std((0, 2, 3)) / wanted - 1).abs().max())
    assert found[1] < 0.02 < found[0]
    assert simulated.weight("0").dtype == torch.bfloat16
    assert simulated.weight("0").is_contiguous(memory_format=torch.channels_last)


def test_samples_are_drawn_evenly_and_have_a_limit() -> None:
    module, counts = nn.Linear(MOST_VALUES // 50, 1), torch.zeros(200)
    for seed in range(200):
        sample = InputSample(module, seed)
        for part in torch.arange(200.0).split(30):
            sample.add(part.unsqueeze(1).expand(-1, module.in_features))
        chosen = sample.rows[:, 0].long()
        assert len(chosen.unique()) == len(chosen) == 64
        counts[chosen] += 1
    assert (counts / 200 - 0.32).abs().max() < 5 * (0.32 * 0.68 / 200) ** 0.5
    again = [InputSample(module, 7) for _ in range(2)]
    for sample in again:
        sample.add(torch.randn(100, module.in_features, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(again[0].rows, again[1].rows)


def test_large_images_are_cropped_and_others_sizes_left_out() -> None:
    sample = InputSample(nn.Conv2d(3, 4, 3, dilation=2))
    image = torch.arange(3 * 300 * 300.0).view(1, 3, 300, 300)
    sample.add(image.expand(12, -1, -1, -1))
    sample.add(torch.zeros(2, 3, 5, 5))
    rows = sample.rows
    assert len(rows) == LEAST_IMAGES
    assert MOST_VALUES / 1.1 < rows.numel() <= MOST_VALUES
    corner = int(rows[0, 0, 0, 0])
    y, x = corner // 300, corner % 300
    assert torch.equal(rows[0], image[0, :, y : y + rows.shape[2], x : x + rows.shape[3]])


def stored(simulated: QuantizedModel, policy: Policy) -> QuantizedModel:
    """The network as a plan has it: altered parameters and ranges, nothing repaired in the loop."""
    altered = simulated.altered(copy.deepcopy(simulated.apply({})), policy)
    ranges = Ranges(inputs=dict(simulated.ranges.inputs), tensors=dict(simulated.ranges.tensors))
    for name, precision in policy.items():
        ranges.weights[name, precision.weight] = simulated.stored_parameters(name, precision)
    settings = QuantizerSettings(operation_format=simulated.settings.operation_format)
    points = simulated.points
    other = QuantizedModel(copy.deepcopy(simulated.apply({})), simulated.network, settings, ranges, points=points)
    other.alter(altered, keep_ranges=True)
    return other


@pytest.mark.parametrize("placement", ["inputs", "full"])
@pytest.mark.parametrize("repair", ["bias", "batch_norm"])
def test_what_is_stored_computes_the_same_bits(repair: str, placement: str) -> None:
    bench = make_bench(quantizer=QuantizerSettings(repair=repair, placement=placement))
    rng, x = np.random.default_rng(2), bench.task.example_input
    policies = [bench.space.sample(rng), Policy.uniform(bench.network, Precision.parse("ternary/uint4"))]
    for policy in [*policies, Policy.from_dict(dict.fromkeys(bench.network.names, "float/uint4"))]:
        other = stored(bench.simulated, policy)
        expected = run(bench.simulated, policy, x)
        assert torch.equal(run(other, policy, x), expected)
        bench.simulated.repair_with("none")
        assert not torch.equal(run(bench.simulated, policy, x), expected)
        bench.simulated.repair_with(repair)


@pytest.mark.parametrize("placement", ["inputs", "full"])
def test_repaired_choices_travel_in_the_plan(placement: str, tmp_path: Path) -> None:
    bench = make_bench(quantizer=QuantizerSettings(repair="batch_norm", placement=placement))
    policy, x = bench.space.sample(np.random.default_rng(3)), bench.task.example_input
    plan = Plan.load(tiny_plan(bench, tmp_path, policy).save(tmp_path / "plan.json"))
    assert plan.quantizer["repair"] == "batch_norm"
    assert "left.weight" in plan.altered
    assert torch.equal(run(plan.simulate(bench.task.model), policy, x), run(bench.simulated, policy, x))


@pytest.mark.parametrize("repair", ["bias", "batch_norm"])
def test_a_fork_repairs_as_its_origin_does(repair: str) -> None:
    bench, x = make_bench(quantizer=REPAIRED[repair]), TinyTask().example_input
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint4"))
    fork = bench.simulated.fork()
    assert torch.equal(run(fork, policy, x), run(bench.simulated, policy, x))
    fork.alter({"left.bias": torch.zeros(6)})
    fork.repair_with("none")
    bench.simulated.apply({})
    assert bench.simulated.settings.repair == repair
    assert torch.equal(
        run(bench.simulated, policy, x), run(make_bench(quantizer=REPAIRED[repair]).simulated, policy, x)
    )


@pytest.mark.parametrize("repair", ["bias", "batch_norm"])
def test_batch_norm_after_the_search_builds_on_it(repair: str) -> None:
    bench = make_bench(quantizer=REPAIRED[repair])
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint4"))
    repaired = batch_norm(bench.simulated, policy, bench.task)
    for name in bench.network.names:
        wanted, after = Moments(channel_axis(repaired.owner(name))), Moments(channel_axis(repaired.owner(name)))
        watch(bench.simulated, {}, bench.task, outputs={name: wanted.add})
        watch(repaired, policy, bench.task, outputs={name: after.add})
        torch.testing.assert_close(after.mean, wanted.mean, rtol=0, atol=1e-5)
        varied = after.variance > 0
        torch.testing.assert_close(after.variance[varied], wanted.variance[varied], rtol=1e-4, atol=1e-6)


SMALL = {"adaround": {"steps": 20, "samples": 200}, "finetune": {"steps": 10}, "awq": {"grid": 4}}


@pytest.mark.parametrize("name", list(REPAIRS))
def test_repairs_after_the_search_are_stored_with_it(name: str) -> None:
    bench = make_bench(quantizer=REPAIRED["batch_norm"])
    policy, x = Policy.uniform(bench.network, Precision.parse("int3/uint8")), bench.task.example_input
    before = run(bench.simulated, policy, x)
    (step,) = parse_steps([{name: SMALL.get(name, {})}])
    repaired = step(bench.simulated, policy, bench.task, bench.simulated)
    assert torch.equal(run(bench.simulated, policy, x), before)
    assert torch.equal(run(stored(repaired, policy), policy, x), run(repaired, policy, x))


def test_it_helps_at_two_bits() -> None:
    drops = []
    for seed in range(6):
        bench = make_bench(TinyTask(seed), quantizer=QuantizerSettings(repair="auto"))
        policy = Policy.uniform(bench.network, Precision.parse("int2/uint8"))
        drops.append([])
        for repair in ("none", "batch_norm"):
            bench.simulated.repair_with(repair)
            drops[-1].append(bench.evaluator.measure(policy, "report").drop)
    before, after = (sum(column) for column in zip(*drops, strict=True))
    assert after < 0.8 * before


def test_auto_has_to_be_decided_before_anything_is_quantized() -> None:
    bench = make_bench(quantizer=QuantizerSettings(repair="auto"))
    x, policy = bench.task.example_input, Policy.uniform(bench.network, Precision.parse("int4/uint8"))
    assert torch.equal(run(bench.simulated, {}, x), run(make_bench().simulated, {}, x))
    with pytest.raises(ConfigError, match=r"quantizer.repair=auto .*choose_repair"):
        bench.simulated.apply(policy)
    assert torch.equal(bench.simulated.model(x), run(bench.simulated, {}, x)), "nothing was touched"
    with pytest.raises(ConfigError, match=r"quantizer.repair=btach_norm is unknown.*'batch_norm'"):
        bench.simulated.repair_with("btach_norm")
    with pytest.raises(ConfigError, match="needs what calibration observes only if asked to"):
        make_bench().simulated.repair_with("bias")
    model = copy.deepcopy(bench.simulated.model)
    known = QuantizedModel(model, bench.network, REPAIRED["bias"], make_bench().simulated.ranges)
    with pytest.raises(ConfigError, match="call calibrate first"):
        known.apply({"left": Precision.parse("int4")})


class Scored(TinyTask):
    """Scores to be given by hand."""

    def __init__(self, higher_is_better: bool = True, per_sample: bool = True) -> None:
        self.higher_is_better = higher_is_better
        self.per_sample = per_sample  # type: ignore[misc]


def scores_of(*shares: float, samples: int = 400) -> list[np.ndarray]:
    """Right or wrong of every sample, for each policy."""
    return [(np.arange(samples) < share * samples).astype(float) for share in shares]


def test_a_repair_is_taken_where_it_surely_helps() -> None:
    scores = {"none": scores_of(0.5, 0.9), "bias": scores_of(0.505, 0.9), "batch_norm": scores_of(0.7, 0.9)}
    assert best_repair(Scored(), scores) == "batch_norm"
    assert best_repair(Scored(higher_is_better=False), scores) == "none"
    assert best_repair(Scored(), scores | {"batch_norm": scores_of(0.505, 0.9)}) == "none", "the simpler where in doubt"
    assert best_repair(Scored(), scores | {"bias": scores_of(0.698, 0.9)}) == "bias"
    assert best_repair(Scored(), scores | {"batch_norm": scores_of(0.3, 0.95)}) == "none", "worse on the whole"


def test_collapsed_policies_say_nothing() -> None:
    collapsed = np.full(400, np.nan)
    scores = {name: [collapsed, *rows] for name, rows in {"none": scores_of(0.5), "bias": scores_of(0.7)}.items()}
    assert best_repair(Scored(), scores) == "bias"
    assert best_repair(Scored(), {"none": [collapsed], "bias": [collapsed]}) == "none"


def test_without_scores_per_sample_no_policy_may_get_worse() -> None:
    def single(*values: float) -> list[np.ndarray]:
        return [np.array([value]) for value in values]

    task = Scored(per_sample=False)
    assert best_repair(task, {"none": single(0.5, 0.9), "bias": single(0.6, 0.9)}) == "bias"
    assert best_repair(task, {"none": single(0.5, 0.9), "bias": single(0.9, 0.89)}) == "none"
    assert best_repair(task, {"none": single(0.5, 0.9), "bias": single(0.5, 0.9)}) == "none"


def test_choosing_measures_switches_and_records(bench: Bench) -> None:
    found = []
    for _ in range(2):
        bench = make_bench(quantizer=QuantizerSettings(repair="auto"))
        found.append(choose_repair(bench.evaluator, bench.space, samples=80))
        assert bench.simulated.settings.repair == found[-1].repair
    first, second = found
    assert (first.repair, first.drops) == (second.repair, second.drops)
    assert first.samples == 80
    assert first.evaluations == round(3 * len(first.drops) * 80 / 120, 3)
    assert LoopRepair.from_dict(first.to_dict()) == first
    for name, policy in probes(bench.space).items():
        for repair, expected in first.drops[name].items():
            bench.simulated.repair_with(repair)
            assert bench.evaluator.measure(policy, "selection", 80 / 120).drop == expected


def test_probes_are_distinct_and_start_with_the_lowest() -> None:
    bench = make_bench(weight=["int2", "int8"], input=["uint8"], pins={"*": "int8"})
    assert list(probes(bench.space)) == ["lowest"]
    bench = make_bench()
    found = probes(bench.space)
    assert list(found) == ["lowest", "middle", "random 1", "random 2"]
    assert {str(precision) for precision in found["lowest"].values()} == {"int2/uint4"}
    assert {str(precision) for precision in found["middle"].values()} == {"int4/uint8"}


def test_a_network_without_biases_has_nothing_to_choose() -> None:
    task = TinyTask()
    task.model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5, bias=False)).eval()
    bench = make_bench(task, quantizer=QuantizerSettings(repair="auto"))
    assert choose_repair(bench.evaluator, bench.space) == LoopRepair("none", {}, 0, 0.0, 0.0)
    bench.simulated.apply(Policy.uniform(bench.network, Precision.parse("int4/uint8")))


def test_input_quantizers_of_samples_are_those_of_the_layers() -> None:
    bench, uint4 = make_bench(quantizer=REPAIRED["bias"]), Format.parse("uint4")
    x = torch.randn(2, 4, 6, 6)
    expected = input_quantizer(uint4, bench.simulated.input_range("left", uint4), 1)(x)
    assert torch.equal(bench.simulated.input_quantizer("left", uint4)(x), expected)
