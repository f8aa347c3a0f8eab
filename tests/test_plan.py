"""Plans: what is written is what is read, belongs to one model, and simulates what was measured."""

from __future__ import annotations

import copy
import hashlib
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import Bench, TinyNet, make_bench, tiny_plan

from hwmodels import Precision, Roofline
from search.errors import DataError
from search.plan import Plan, PlannedRepair, fingerprint, tensor_digests
from search.policy import Policy
from search.quantize.simulate import exact_inference
from search.recover import Gain


@pytest.fixture
def plan(bench: Bench, tmp_path: Path) -> Plan:
    return tiny_plan(bench, tmp_path, bench.space.sample(np.random.default_rng(1)))


@pytest.fixture
def saved(plan: Plan, tmp_path: Path) -> Path:
    return plan.save(tmp_path / "saved" / "plan.json")


def test_a_round_trip_changes_no_bit(plan: Plan, saved: Path, tmp_path: Path) -> None:
    again = Plan.load(saved)
    assert again == plan
    assert again != plan.model_copy(update={"seed": 7})
    assert again.policy == plan.policy
    assert again._tensors.keys() == plan._tensors.keys()
    for name, tensor in plan._tensors.items():
        assert again._tensors[name].dtype == tensor.dtype
        assert torch.equal(again._tensors[name], tensor)
    assert again._model_digests == plan._model_digests
    again.save(tmp_path / "again" / "plan.json")
    for name in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (saved.parent / name).read_bytes()
    assert Plan.load(saved.parent) == plan, "a folder stands for the plan in it"


def test_the_same_content_gives_the_same_bytes(bench: Bench, saved: Path, tmp_path: Path) -> None:
    other = make_bench()  # everything anew, in another order
    for policy in reversed(list(bench.space)[:5]):
        other.simulated.apply(policy)
    policy = Plan.load(saved).policy
    folder = tmp_path / "other"
    folder.mkdir()
    path = tiny_plan(other, folder, Policy(dict(reversed(list(policy.items()))))).save(folder / "plan.json")
    for name in ("plan.json", "plan.safetensors"):
        assert path.with_name(name).read_bytes() == saved.with_name(name).read_bytes()


def test_what_the_plan_says(bench: Bench, plan: Plan) -> None:
    costs = bench.pricing.costs(plan.policy)
    quality = bench.evaluator.measure(plan.policy, "report")
    assert plan.digest == plan.policy.digest
    assert [layer.name for layer in plan.layers] == list(bench.network.names)
    assert plan.cost["weight_bytes"].value == costs["weight_bytes"]
    assert plan.cost["weight_bytes"].reference == bench.pricing.reference("float")["weight_bytes"]
    assert plan.cost["latency_s"].value is None
    assert (plan.quality.value, plan.quality.drop, plan.quality.samples) == (quality.value, quality.drop, 120)
    assert (plan.quality.split, plan.selection.split) == ("report", "selection")
    assert plan.average_weight_bits == costs["average_weight_bits"]
    assert plan.model.folded == (("stem", "norm"),)
    assert plan.budget.limits == {"size_ratio": 0.5}
    assert plan.budget.verdict == "met"
    assert plan.recover == ()
    total = sum(layer.weight_bytes for layer in plan.layers)
    assert total + bench.pricing.fixed["weight_bytes"] == pytest.approx(costs["weight_bytes"])


def test_costs_of_a_device_that_knows_time(tmp_path: Path) -> None:
    bench = make_bench(cost_model=Roofline("zen5"))
    plan = tiny_plan(bench, tmp_path, Policy.uniform(bench.network, Precision.parse("int8/uint8")))
    assert plan.cost["latency_s"].value == bench.pricing.costs(plan.policy)["latency_s"]
    assert all(layer.compute for layer in plan.layers)


def test_it_simulates_what_was_measured(bench: Bench, saved: Path) -> None:
    """From the files and the user's model alone."""
    images = bench.task._data["report"][0]
    model = copy.deepcopy(bench.task.model)
    before = tensor_digests(model)
    plan = Plan.load(saved)
    with exact_inference():
        expected = bench.simulated.apply(plan.policy)(images)
        found = plan.apply(model)(images)
    assert torch.equal(found, expected)
    assert tensor_digests(model) == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    with exact_inference():
        assert not torch.equal(model(images), found)


@pytest.mark.parametrize("precision", ["float", "int4", "float/uint8"])
def test_layers_in_float_need_no_ranges(precision: str, tmp_path: Path) -> None:
    bench = make_bench(weight=("int4", "float"), input=("uint8", "float"))
    policy = Policy.uniform(bench.network, Precision.parse(precision))
    plan = Plan.load(tiny_plan(bench, tmp_path, policy).save(tmp_path / "plan.json"))
    x = bench.task.example_input
    with exact_inference():
        assert torch.equal(plan.apply(bench.task.model)(x), bench.simulated.apply(policy)(x))


def test_altered_parameters_travel(bench: Bench, tmp_path: Path) -> None:
    policy = Policy.uniform(bench.network, Precision.parse("int4/uint8"))
    bias = torch.randn(6)
    bench.simulated.alter({"left.bias": bias})
    plan = tiny_plan(bench, tmp_path, policy, [Gain("bias_correction", 0.5, 0.25, True, 1.0)])
    assert plan.recover == (PlannedRepair(repair="bias_correction", before=0.5, after=0.25, kept=True),)
    loaded = Plan.load(plan.save(tmp_path / "plan.json"))
    assert list(loaded.altered) == ["left.bias"]
    x = bench.task.example_input
    with exact_inference():
        assert torch.equal(loaded.apply(bench.task.model)(x), bench.simulated.apply(policy)(x))
    assert torch.equal(loaded.simulate(bench.task.model).model.left.bias, bias)


def edit(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema="bitplan/2"), r"has schema 'bitplan/2'; this version of bitplan reads 'bitplan/1'"),
        (lambda c: c.pop("schema"), "has schema None"),
        (lambda c: c.update(extra=1), "is damaged: extra: Extra inputs are not permitted"),
        (lambda c: c["layers"][1].update(bits=4), "is damaged: layers.1.bits: Extra inputs"),
        (lambda c: c.pop("seed"), "is damaged: seed: Field required"),
        (lambda c: c.update(seed="many"), "is damaged: seed: Input should be a valid integer"),
        (lambda c: c["layers"][0].update(weight="int9"), "is damaged: 'int9' is no format; allowed"),
        (lambda c: c["tensors"].update(sha256="0" * 64), r"damaged or belongs to another plan: its sha256 is \w+"),
        (lambda c: c["tensors"].update(file="other.safetensors"), "needs other.safetensors beside it"),
    ],
)
def test_damaged_json(saved: Path, change, message: str) -> None:
    edit(saved, change)
    with pytest.raises(DataError, match=message):
        Plan.load(saved)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"plan"', "\x00", '{"schema": "bitplan/1"}'])
def test_no_plan_at_all(saved: Path, text: str) -> None:
    saved.write_text(text)
    with pytest.raises(DataError, match=r"damaged|has schema"):
        Plan.load(saved)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.999])
def test_a_flipped_byte_is_noticed(saved: Path, share: float) -> None:
    beside = saved.with_name("plan.safetensors")
    content = bytearray(beside.read_bytes())
    content[int(share * len(content))] ^= 1
    beside.write_bytes(content)
    with pytest.raises(DataError, match=r"plan.safetensors is damaged or belongs to another plan"):
        Plan.load(saved)


def test_damaged_tensors_with_a_matching_hash(saved: Path) -> None:
    beside = saved.with_name("plan.safetensors")
    beside.write_bytes(b"not safetensors")
    edit(saved, lambda c: c["tensors"].update(sha256=hashlib.sha256(b"not safetensors").hexdigest()))
    with pytest.raises(DataError, match=r"plan.safetensors is damaged"):
        Plan.load(saved)


def test_a_range_that_is_missing(bench: Bench, tmp_path: Path) -> None:
    bench = make_bench(weight=("int4", "float"), input=("uint8", "float"))
    path = tiny_plan(bench, tmp_path, Policy.uniform(bench.network, Precision.parse("int4"))).save(
        tmp_path / "plan.json"
    )
    edit(path, lambda c: c["layers"][1].update(input="uint8"))
    with pytest.raises(DataError, match="lacks left/input_scale, which the int4/uint8 of that layer needs"):
        Plan.load(path)


def test_missing_files(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no plan at .*nowhere.json; name a plan.json or a run directory"):
        Plan.load(tmp_path / "nowhere.json")
    saved.with_name("plan.safetensors").unlink()
    with pytest.raises(DataError, match=r"plan.safetensors beside it, and it is not there; copy both files"):
        Plan.load(saved)


def renamed(model: TinyNet) -> TinyNet:
    model.heads, _ = model.head, delattr(model, "head")
    return model


def reshaped(model: TinyNet) -> TinyNet:
    model.right = torch.nn.Conv2d(4, 6, 5)
    return model


def changed(model: TinyNet) -> TinyNet:
    model.norm.running_mean[2] += 1e-6
    return model


def extended(model: TinyNet) -> TinyNet:
    model.extra = torch.nn.Linear(1, 1)
    return model


def retyped(model: TinyNet) -> TinyNet:
    model.left.bias.data = model.left.bias.data.double()
    return model


@pytest.mark.parametrize(
    ("alter", "message"),
    [
        (renamed, r"it has head.weight, this one has not \(did you mean 'heads.weight'\?\)"),
        (reshaped, r"right.weight was \(6, 4, 3, 3\) float32, here \(6, 4, 5, 5\) float32"),
        (retyped, r"left.bias was \(6,\) float32, here \(6,\) float64"),
        (changed, r"norm.running_mean values differ \(sha256 \w{12}\.\.\., here \w{12}\.\.\.\)"),
        (extended, "this one has extra.weight, which the plan's has not"),
    ],
)
def test_another_model_is_refused(bench: Bench, saved: Path, alter, message: str) -> None:
    plan, other = Plan.load(saved), alter(copy.deepcopy(bench.task.model))
    with pytest.raises(DataError, match=message):
        plan.check(other)
    with pytest.raises(DataError, match="the plan is for another model"):
        plan.apply(other)
    plan.check(copy.deepcopy(bench.task.model))


def test_order_of_tensors_does_not_make_another_model(bench: Bench, saved: Path) -> None:
    other = copy.deepcopy(bench.task.model)
    other._modules = OrderedDict(reversed(other._modules.items()))
    assert list(other.state_dict()) != list(bench.task.model.state_dict())
    assert fingerprint(other) == fingerprint(bench.task.model)
    Plan.load(saved).check(other)


def test_fingerprint_sees_every_value(bench: Bench) -> None:
    model = bench.task.model
    first = fingerprint(model)
    assert first == fingerprint(copy.deepcopy(model)) == fingerprint(model.to(memory_format=torch.channels_last))
    for name in model.state_dict():
        other = copy.deepcopy(model)
        other.state_dict()[name][(-1,) * other.state_dict()[name].dim()] += 1
        assert fingerprint(other) != first, name
