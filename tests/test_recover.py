"""Repairs: the shift they take back, and that they never make things worse."""

from __future__ import annotations

import pytest
import torch
from tiny import Bench, TinyTask, make_bench

from hwmodels import Precision
from search.errors import ConfigError
from search.policy import Policy
from search.quality.evaluate import Evaluator
from search.quantize.simulate import exact_inference
from search.recover import REPAIRS, check_repairs, repair
from search.recover.bias import bias_correction


def output_means(bench: Bench, policy: Policy | dict, layer: str) -> torch.Tensor:
    """Mean of each output channel of a layer over the calibration images."""
    found = []
    model = bench.simulated.apply(policy)
    hook = model.get_submodule(layer).register_forward_hook(lambda module, args, output: found.append(output))
    with exact_inference():
        model(bench.task._data["calibration"][0])
    hook.remove()
    output = found[0].double()
    return output.mean((0, 2, 3)) if output.dim() == 4 else output.mean(0)


def state(bench: Bench) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in bench.simulated.apply({}).state_dict().items()}


@pytest.mark.parametrize("precision", ["int2/uint8", "int2/uint4", "int4/uint8"])
def test_bias_correction_takes_the_mean_shift_back(precision: str) -> None:
    bench = make_bench()
    policy = Policy.uniform(bench.network, Precision.parse(precision))
    wanted = {name: output_means(bench, {}, name) for name in bench.network.names}
    before = {name: output_means(bench, policy, name) - wanted[name] for name in bench.network.names}
    assert all(shift.abs().max() > 1e-3 for shift in before.values())
    bench.simulated.alter(bias_correction(bench.evaluator, policy))
    for name in bench.network.names:
        after = output_means(bench, policy, name) - wanted[name]
        assert after.abs().max() < 1e-5, f"{name}: every layer before it is corrected already"


def test_bias_correction_itself_alters_nothing(bench: Bench) -> None:
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint4"))
    before, model = state(bench), bench.task.model.state_dict()
    original = {name: value.clone() for name, value in model.items()}
    corrected = bias_correction(bench.evaluator, policy)
    assert set(corrected) == {f"{name}.bias" for name in bench.network.names}
    assert all(torch.equal(value, before[name]) for name, value in state(bench).items())
    assert all(torch.equal(value, original[name]) for name, value in model.items())
    assert not any(module._forward_hooks for module in bench.simulated.model.modules())


def test_only_quantized_weights_are_corrected(bench: Bench) -> None:
    policy = Policy.from_dict({"stem": "int4/uint8", "left": "float", "right": "float/uint8", "head": "int2"})
    assert set(bias_correction(bench.evaluator, policy)) == {"stem.bias", "head.bias"}


@pytest.mark.parametrize("seed", range(4))
def test_a_repair_never_makes_the_selection_split_worse(seed: int) -> None:
    bench = make_bench(TinyTask(seed))
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint8"))
    before = bench.evaluator.measure(policy, "selection")
    altered, after = repair(["bias_correction"], bench.evaluator, policy, before)
    assert after.drop <= before.drop
    assert bench.evaluator.measure(policy, "selection") == after
    assert bool(altered) or after == before


def test_bias_correction_helps_at_two_bits() -> None:
    drops = []
    for seed in range(6):
        bench = make_bench(TinyTask(seed))
        policy = Policy.uniform(bench.network, Precision.parse("int2/uint8"))
        before = bench.evaluator.measure(policy, "report").drop
        bench.simulated.alter(bias_correction(bench.evaluator, policy))
        drops.append((before, bench.evaluator.measure(policy, "report").drop))
    assert sum(after for _, after in drops) < 0.8 * sum(before for before, _ in drops)


def harm(evaluator: Evaluator, policy: Policy) -> dict[str, torch.Tensor]:
    return {"head.bias": torch.tensor([0.0, 0, 0, 0, 1e3])}


def test_what_does_not_help_is_taken_back_exactly(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPAIRS, "harm", harm)
    policy = Policy.uniform(bench.network, Precision.parse("int8/uint8"))
    before, quality = state(bench), bench.evaluator.measure(policy, "selection")
    altered, after = repair(["harm"], bench.evaluator, policy, quality)
    assert altered == {}
    assert after == quality
    assert all(torch.equal(value, before[name]) for name, value in state(bench).items())
    assert bench.evaluator.measure(policy, "selection") == quality


def test_a_weight_that_does_not_help_is_taken_back_exactly(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPAIRS, "harm", lambda *_: {"left.weight": torch.full((6, 4, 3, 3), -9.0)})
    policy = Policy.uniform(bench.network, Precision.parse("int4/uint8"))
    before = state(bench)
    bench.evaluator.float_scores("selection")  # known, so that measuring leaves the policy applied
    quality = bench.evaluator.measure(policy, "selection")
    assert repair(["harm"], bench.evaluator, policy, quality) == ({}, quality)
    assert all(torch.equal(value, before[name]) for name, value in state(bench).items())


def test_repairs_follow_each_other(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(REPAIRS, "harm", harm)
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint8"))
    before = bench.evaluator.measure(policy, "selection")
    altered, after = repair(["harm", "bias_correction", "harm"], bench.evaluator, policy, before)
    assert after.drop < before.drop
    assert set(altered) == {f"{name}.bias" for name in bench.network.names}
    assert repair([], bench.evaluator, policy, after) == ({}, after)


def test_unknown_repairs() -> None:
    check_repairs(["bias_correction"])
    with pytest.raises(ConfigError, match=r"'bias_corection' is unknown.*did you mean 'bias_correction'.*allowed"):
        check_repairs(["bias_correction", "bias_corection"])
