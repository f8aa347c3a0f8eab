"""Fine-tuning: what it keeps is what it trained, it wins quality back, never loses any, and survives being killed."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import Decoder, InPlace, Recurrent, Tagger, TwoInputs
from tiny import Bench, TinyTask, make_bench
from torch import Tensor, nn
from torch.func import functional_call

from hwmodels import Format, Precision
from search.errors import ConfigError, DataError, UnsupportedError
from search.policy import Policy
from search.quality.evaluate import Evaluator
from search.quantize.simulate import QuantizedModel, QuantizerSettings, exact_inference
from search.quantize.straight_through import fake_quantize
from search.recover.finetune import _divergence, finetune
from search.recover.learner import Learner
from search.recover.recipe import SCHEDULES, Recipe
from search.tasks.digits import SIZES, Digits
from search.tasks.function import FunctionTask
from search.tasks.task import Task, call, main_output, tensors_in
from search.trace import trace


def simulate(model: nn.Module, inputs: Any, **settings: Any) -> QuantizedModel:
    model = model.eval()
    simulated = QuantizedModel(model, trace(model, inputs), QuantizerSettings(**settings))
    simulated.calibrate([inputs])
    return simulated


def run(model: nn.Module, inputs: Any) -> list[Tensor]:
    with exact_inference():
        return [tensor.clone() for tensor in tensors_in(call(model, inputs))]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def shaken(simulated: QuantizedModel, policy: Policy, **options: Any) -> Learner:
    """A learner that has moved everything at random."""
    learner = Learner(simulated, policy, dict.fromkeys(simulated.network.names, 1.0), **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for leaf in learner.tensors:
            leaf.copy_(torch.randn(leaf.shape, generator=generator))
        for leaf in learner.ranges:
            leaf.copy_(torch.randn(leaf.shape, generator=generator) / 10)
    return learner


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, 2, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.attention(x, x, x, need_weights=False)[0])


class Transposed(nn.Module):
    """Layers of the other kinds: one dimension, three, transposed with groups, without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.up = nn.Conv1d(2, 4, 3), nn.ConvTranspose2d(4, 6, 2, groups=2)
        self.three, self.depthwise = nn.Conv3d(6, 2, 1, bias=False), nn.Conv3d(2, 4, 2, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.one(x).unsqueeze(-1))
        return self.depthwise(self.three(x.unsqueeze(-1).expand(-1, -1, -1, -1, 2))).flatten(1)


MODELS = {
    "lstm": lambda: (Tagger(), torch.randint(10, (3, 6))),
    "shared": lambda: (Decoder(), torch.randint(20, (3, 8))),
    "thrice": lambda: (Recurrent(), torch.randn(5, 4)),
    "attention": lambda: (SelfAttention(), torch.randn(4, 6, 8)),
    "keywords": lambda: (TwoInputs(), {"image": torch.randn(3, 1, 8, 8), "ids": torch.randint(10, (3,))}),
    "convolutions": lambda: (Transposed(), torch.randn(2, 2, 6)),
    "in place": lambda: (InPlace(), torch.randn(2, 1, 4, 4)),
    "bfloat16": lambda: (Recurrent().bfloat16(), torch.randn(5, 4).bfloat16()),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("precision", ["int2/uint4", "int8-g3/int8-token", "ttq/fp8_e4m3", "codebook2/mxfp4"])
def test_what_is_kept_is_what_was_trained(name, precision):
    model, inputs = MODELS[name]()
    simulated = simulate(model, inputs)
    policy = Policy.uniform(simulated.network, Precision.parse(precision))
    untrained = run(simulated.apply(policy), inputs)
    before = run(simulated.apply({}), inputs)
    learner = shaken(simulated, policy)
    with learner.running() as running:
        learner.place()
        trained = run(running, inputs)
    assert equal(run(simulated.model, inputs), before), "back in float"
    assert not equal(trained, untrained)
    learner.keep()
    assert equal(run(simulated.apply(policy), inputs), trained)
    simulated.apply({})
    assert equal(run(simulated.fork().apply(policy), inputs), trained)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "in place"])
@pytest.mark.parametrize("precision", ["int3/uint4", "int4-g4/int8-token"])
def test_awkward_models_learn(name, precision):
    model, inputs = MODELS[name]()
    task = FunctionTask(model.eval(), inputs, [inputs], lambda model, split: 0.0, divergence="squared_error")
    simulated = simulate(copy.deepcopy(model), inputs)
    policy = Policy.uniform(simulated.network, Precision.parse(precision))
    tuned = finetune(simulated, policy, task, steps=30, check_steps=10)
    wanted, before, after = (run(model, inputs) for model in (model, simulated.apply(policy), tuned.apply(policy)))
    errors = [float((found[0].float() - wanted[0].float()).square().mean()) for found in (before, after)]
    assert errors[1] < 0.75 * errors[0]
    learner = shaken(simulated.fork(), policy)
    with learner.running() as running:
        learner.place()
        main_output(call(running, inputs)).float().square().sum().backward()
        learner.pass_gradients()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in learner.leaves)
    assert all(weight.weight.moved.grad.any() for weight in learner._weights.values())


def test_what_torch_cannot_differentiate():
    model, inputs = MODELS["in place"]()
    task = FunctionTask(model, inputs, [inputs], lambda model, split: 0.0)
    simulated = simulate(copy.deepcopy(model), inputs)
    with pytest.raises(UnsupportedError, match=r"InPlace cannot be trained: Output 0 of .* is being modified inplace"):
        finetune(simulated, Policy.uniform(simulated.network, Precision.parse("int4")), task, steps=1)


@pytest.mark.parametrize(
    "weight", ["int1", "int4-asym", "binary", "binary-stochastic", "ternary", "nf4", "mxfp6", "nvfp4"]
)
def test_every_grid_is_kept(weight):
    bench = make_bench()
    policy = Policy.uniform(bench.network, Precision.parse(f"{weight}/uint8"))
    learner, images = shaken(bench.simulated, policy), bench.task._data["report"][0]
    with learner.running() as model:
        learner.place()
        trained = run(model, images)
    learner.keep()
    assert equal(run(bench.simulated.apply(policy), images), trained)
    for layer in bench.network.names:
        format = policy[layer].weight
        assert torch.equal(bench.simulated.float_weight(layer), bench.simulated.quantized_weight(layer, format))


@pytest.mark.parametrize(
    "settings", [{"placement": "full"}, {"repair": "bias"}, {"placement": "full", "repair": "bias"}]
)
def test_the_engine_may_do_more_than_quantize_layers(settings):
    task = TinyTask()
    images = task._data["calibration"][0]
    simulated = simulate(make_bench(task).simulated.model, images, **settings)
    policy = Policy.uniform(simulated.network, Precision.parse("int4/uint8"))
    untrained = run(simulated.apply(policy), images)
    untouched = Learner(simulated, policy, {})
    with untouched.running() as model:
        untouched.place()
        assert equal(run(model, images), untrained)
    learner = shaken(simulated, policy)
    with learner.running() as model:
        learner.place()
        trained = run(model, images)
        model(images).sum().backward()
        learner.pass_gradients()
    assert all(leaf.grad is not None and leaf.grad.isfinite().all() for leaf in learner.leaves)
    learner.keep()
    assert equal(run(simulated.apply(policy), images), trained)


def test_gradients_are_those_of_the_quantized_network(bench: Bench) -> None:
    """Against autograd through the same network called with fake-quantized weights in place of its own."""
    policy = Policy.uniform(bench.network, Precision.parse("int3"))
    images, model = bench.task._data["calibration"][0], bench.simulated.model
    learner = shaken(bench.simulated, policy, learn_ranges=False)
    with learner.running():
        learner.place()
        model(images).square().sum().backward()
        learner.pass_gradients()
    found = [leaf.grad.clone() for leaf in learner.tensors]
    given = {}
    for layer, weight in learner._weights.items():
        for leaf in (weight.weight.moved, weight.bias.moved):
            leaf.grad = None
        given[f"{layer}.weight"] = fake_quantize(
            weight.weight.value, Format.parse("int3"), 0, bench.simulated.weight_parameters(layer, Format.parse("int3"))
        )
        given[f"{layer}.bias"] = weight.bias.value
    functional_call(model, given, images).square().sum().backward()
    for leaf, gradient in zip(learner.tensors, found, strict=True):
        torch.testing.assert_close(gradient, leaf.grad)
        assert gradient.any()


def test_layers_that_read_one_tensor_keep_one_range(bench: Bench) -> None:
    policy = Policy.uniform(bench.network, Precision.parse("int4/uint4"))
    uint4 = Format.parse("uint4")
    before = bench.simulated.input_range("left", uint4)
    tuned = finetune(bench.simulated, policy, bench.task, steps=20, range_rate=0.05)
    left, right = (tuned.input_range(layer, uint4) for layer in ("left", "right"))
    assert left == right != before
    assert left.zero_point == before.zero_point


def state(simulated: QuantizedModel) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in simulated.model.state_dict().items()}


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_the_argument_is_left_alone(bench: Bench) -> None:
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint4"))
    images = bench.task._data["report"][0]
    before, float_outputs = run(bench.simulated.apply(policy), images), run(bench.simulated.apply({}), images)
    ranges = bench.simulated.ranges.copy()
    original = {name: value.clone() for name, value in bench.task.model.state_dict().items()}
    tuned = finetune(bench.simulated, policy, bench.task, steps=10)
    assert not equal(run(tuned.apply(policy), images), before)
    assert equal(run(bench.simulated.apply({}), images), float_outputs)
    assert equal(run(bench.simulated.apply(policy), images), before)
    assert bench.simulated.ranges.inputs == ranges.inputs
    assert same(bench.task.model.state_dict(), original)
    for model in (bench.simulated.model, tuned.model):
        assert not any(parameter.grad is not None for parameter in model.parameters())
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_only_quantized_weights_are_trained(bench: Bench) -> None:
    policy = Policy.from_dict({"stem": "int2/uint4", "left": "float", "right": "float/uint8", "head": "int2"})
    tuned = finetune(bench.simulated, policy, bench.task, steps=10)
    changed = tuned.altered(bench.simulated.apply({}), {})
    assert set(changed) == {"stem.weight", "stem.bias", "head.weight", "head.bias"}
    nothing = finetune(bench.simulated, {}, bench.task, steps=10)
    assert same(state(nothing), state(bench.simulated))


def divergence(bench: Bench, simulated: QuantizedModel, policy: Policy, split: str = "report") -> float:
    teacher, total = bench.simulated.fork().apply({}), []
    model = simulated.apply(policy)
    with exact_inference():
        for batch in bench.task.batches(split):
            total.append(bench.task.divergence(bench.task.outputs(teacher, batch), bench.task.outputs(model, batch)))
    return float(torch.cat(total).mean())


@pytest.mark.parametrize("precision", ["int2/uint4", "codebook1/uint4"])
def test_the_tiny_network_comes_closer_to_float(precision: str) -> None:
    """Trained on 48 images of the calibration split, judged on 120 others."""
    before = after = 0.0
    for seed in range(2):
        bench = make_bench(TinyTask(seed))
        policy = Policy.uniform(bench.network, Precision.parse(precision))
        tuned = finetune(bench.simulated, policy, bench.task, steps=60, check_steps=20, seed=seed)
        before += divergence(bench, bench.simulated, policy)
        after += divergence(bench, tuned, policy)
    assert after < 0.35 * before


def test_digits_win_their_accuracy_back() -> None:
    bench = make_bench(Digits())
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint4"))
    tuned = finetune(bench.simulated, policy, bench.task, steps=80, check_steps=40)
    assert bench.evaluator.measure(policy, "report").value < 0.2
    assert Evaluator(bench.task, tuned).measure(policy, "report").value > 0.93


@pytest.mark.parametrize("precision", ["int2/uint8", "int8/uint8"])
def test_it_never_ends_worse_than_it_began(bench: Bench, precision: str) -> None:
    policy = Policy.uniform(bench.network, Precision.parse(precision))
    ruined = finetune(bench.simulated, policy, bench.task, steps=3, rate=1e3, range_rate=1.0)
    images = bench.task._data["report"][0]
    assert equal(run(ruined.apply(policy), images), run(bench.simulated.apply(policy), images))
    assert same(state(ruined.fork()), state(bench.simulated.fork()))


def test_the_best_state_is_kept_not_the_last(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, seen = Policy.uniform(bench.network, Precision.parse("int2/uint4")), []

    def noted(*given: Any) -> float:
        seen.append(_divergence(*given))
        return seen[-1]

    monkeypatch.setattr(sys.modules[finetune.__module__], "_divergence", noted)
    tuned = finetune(bench.simulated, policy, bench.task, steps=12, check_steps=1, rate=0.5, schedule="constant")
    assert len(seen) == 13
    assert min(seen) < seen[-1]
    assert divergence(bench, tuned, policy, "calibration") == min(seen)


def test_one_seed_gives_one_network(bench: Bench) -> None:
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint4"))
    first, again, other = (finetune(bench.simulated, policy, bench.task, steps=6, seed=seed) for seed in (3, 3, 4))
    assert same(state(again), state(first))
    assert not same(state(other), state(first))


def test_fixed_ranges_stay(bench: Bench) -> None:
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint4"))
    scales = {layer: bench.simulated.weight_parameters(layer, Format.parse("int2"))["scale"] for layer in policy}
    inputs = {layer: bench.simulated.input_range(layer, Format.parse("uint4")) for layer in policy}
    tuned = finetune(bench.simulated, policy, bench.task, steps=6, learn_ranges=False)
    assert not same(state(tuned), state(bench.simulated.fork()))
    for layer in policy:
        assert torch.equal(tuned.weight_parameters(layer, Format.parse("int2"))["scale"], scales[layer])
        assert tuned.input_range(layer, Format.parse("uint4")) == inputs[layer]


class KilledError(Exception):
    """Somebody pulled the plug."""


@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_killed_run_ends_as_an_undisturbed_one(tmp_path: Path, at: int) -> None:
    bench, path, seen = make_bench(Digits()), tmp_path / "run" / "finetune.pt", []
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint4"))
    options: dict[str, Any] = {"steps": 6, "check_steps": 2}
    undisturbed = finetune(bench.simulated, policy, bench.task, **options)

    def kill(step: int, steps: int, loss: float) -> None:
        if step == at:
            raise KilledError

    with pytest.raises(KilledError):
        finetune(bench.simulated, policy, bench.task, checkpoint=path, on_step=kill, **options)
    assert path.is_file() == (at > 2)
    resumed = finetune(
        bench.simulated, policy, bench.task, checkpoint=path, on_step=lambda *step: seen.append(step), **options
    )
    assert [step for step, _, _ in seen] == list(range((at - 1) // 2 * 2 + 1, 7))
    assert same(state(resumed), state(undisturbed))
    images = bench.task.load("report")[0]
    assert equal(run(resumed.apply(policy), images), run(undisturbed.apply(policy), images))
    seen.clear()
    finished = finetune(
        bench.simulated, policy, bench.task, checkpoint=path, on_step=lambda *step: seen.append(step), **options
    )
    assert not seen, "a finished run is not run again"
    assert same(state(finished.fork()), state(undisturbed.fork()))


def test_a_checkpoint_belongs_to_one_run(bench: Bench, tmp_path: Path) -> None:
    policy, path = Policy.uniform(bench.network, Precision.parse("int2/uint4")), tmp_path / "finetune.pt"
    finetune(bench.simulated, policy, bench.task, steps=4, checkpoint=path)
    with pytest.raises(DataError, match=r"finetune.pt is that of another network, policy or recipe; delete it"):
        finetune(bench.simulated, policy, bench.task, steps=5, checkpoint=path)
    other = Policy.uniform(bench.network, Precision.parse("int2/uint8"))
    with pytest.raises(DataError, match="another network"):
        finetune(bench.simulated, other, bench.task, steps=4, checkpoint=path)
    with pytest.raises(DataError, match="another network"):
        finetune(make_bench(TinyTask(1)).simulated, policy, bench.task, steps=4, checkpoint=path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"finetune.pt cannot be read: .*; delete it to start again"):
        finetune(bench.simulated, policy, bench.task, steps=4, checkpoint=path)


def test_epochs_in_place_of_steps(bench: Bench) -> None:
    policy, seen = Policy.uniform(bench.network, Precision.parse("int4/uint8")), []
    finetune(bench.simulated, policy, bench.task, epochs=3, on_step=lambda *step: seen.append(step[:2]))
    assert seen == [(step, 6) for step in range(1, 7)], "48 images in batches of 40 and 8"
    assert same(state(finetune(bench.simulated, policy, bench.task, steps=0)), state(bench.simulated.fork()))


def test_the_schedule() -> None:
    options: dict[str, Any] = {
        **{"rate": 1.0, "range_rate": 1.0, "learn_ranges": True, "distill": 1.0, "weight_decay": 0.0, "clip": 1.0},
        **{"check_steps": 1, "seed": 0},
    }
    cosine = Recipe(steps=100, schedule="cosine", warmup=0.1, **options)
    factors = [cosine.factor(step) for step in range(100)]
    assert factors[:10] == sorted(factors[:10])
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert 0 < factors[0] < 0.1
    assert 0 < factors[-1] < 0.001
    assert max(factors) > 0.95
    constant = Recipe(steps=100, schedule="constant", warmup=0.0, **options)
    assert {constant.factor(step) for step in range(100)} == {1.0}
    assert set(SCHEDULES) == {"cosine", "constant"}


def test_decay_pulls_back_to_the_start(bench: Bench, tmp_path: Path) -> None:
    policy, moved = Policy.uniform(bench.network, Precision.parse("int8/uint8")), []
    for decay in (0.0, 40.0):
        path = tmp_path / f"{decay}.pt"
        finetune(bench.simulated, policy, bench.task, steps=30, weight_decay=decay, checkpoint=path)
        moved.append(sum(float(tensor.abs().sum()) for tensor in torch.load(path)["learned"]))
    assert moved[1] < 0.8 * moved[0]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            {"schedule": "cosin"},
            r"finetune.schedule=cosin is unknown \(did you mean 'cosine'\?\); allowed: cosine, const",
        ),
        ({"distill": 1.5}, "finetune.distill=1.5 must be from 0 to 1"),
        ({"rate": -1.0}, "finetune.rate=-1.0 must be from 0 to inf"),
        ({"check_steps": 0}, "finetune.check_steps=0 must be from 1"),
        ({"clip": 0.0}, "finetune.clip=0.0 must be positive"),
        ({"rate": float("nan")}, "finetune.rate=nan must be"),
    ],
)
def test_options_out_of_range(bench: Bench, option: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        finetune(bench.simulated, {}, bench.task, **option)


def test_labels_where_there_are_some(bench: Bench) -> None:
    digits = make_bench(Digits())
    policy = Policy.uniform(digits.network, Precision.parse("int2/uint4"))
    tuned = finetune(digits.simulated, policy, digits.task, steps=25, check_steps=25, distill=0.0)
    assert Evaluator(digits.task, tuned).measure(policy, "report").value > 0.6
    tiny = Policy.uniform(bench.network, Precision.parse("int2/uint4"))
    with pytest.raises(UnsupportedError, match="task tiny has no loss of its own"):
        finetune(bench.simulated, tiny, bench.task, steps=1, distill=0.5)


class Detached(TinyTask):
    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        return super().outputs(model, batch).detach()


class Broken(TinyTask):
    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        return super().divergence(reference, outputs) * (torch.nan if outputs.requires_grad else 1)


class Empty(TinyTask):
    def training_batches(self, epoch: int) -> Iterator[Any]:
        return iter(())


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Detached, "Detached.outputs returns values without a gradient; .*detach"),
        (Broken, "the loss of fine-tuning is nan; try a smaller finetune.rate"),
        (Empty, "task tiny has no batches to fine-tune on"),
    ],
)
def test_tasks_that_cannot_be_trained(bench: Bench, task: type[Task], message: str) -> None:
    policy = Policy.uniform(bench.network, Precision.parse("int2/uint4"))
    with pytest.raises(DataError, match=message):
        finetune(bench.simulated, policy, task(), steps=2)


def test_a_task_of_functions_needs_nothing_more(bench: Bench) -> None:
    images = [batch[0] for batch in bench.task.batches("calibration")]
    with torch.inference_mode():
        images = [image.clone() for image in images]
    task = FunctionTask(bench.task.model, bench.task.example_input, images, lambda model, split: 0.0)
    policy = Policy.uniform(bench.network, Precision.parse("int2"))
    tuned = finetune(bench.simulated, policy, task, steps=20)
    assert divergence(bench, tuned, policy) < divergence(bench, bench.simulated, policy)


def test_the_teacher_is_the_reference(bench: Bench) -> None:
    """A network that an earlier repair ruined learns from the float network it came from."""
    policy = Policy.uniform(bench.network, Precision.parse("int4/uint8"))
    ruined = bench.simulated.fork()
    ruined.alter({"head.weight": torch.randn(5, 6)})
    tuned = finetune(ruined, policy, bench.task, bench.simulated, steps=60, rate=0.1)
    assert divergence(bench, tuned, policy) < 0.3 * divergence(bench, ruined, policy)
    alone = finetune(ruined, policy, bench.task, steps=20)
    assert divergence(bench, alone, policy) > 0.9 * divergence(bench, ruined, policy)


def test_training_batches() -> None:
    tiny = TinyTask()
    epochs = [[len(labels) for _, labels in tiny.training_batches(epoch)] for epoch in range(8)]
    assert {tuple(sizes) for sizes in epochs} == {(40, 8), (8, 40)}
    assert epochs == [[len(labels) for _, labels in tiny.training_batches(epoch)] for epoch in range(8)]
    digits = Digits()
    first, again, second = ([labels for _, labels in digits.training_batches(epoch)] for epoch in (0, 0, 1))
    assert equal(first, again)
    assert not equal(first, second)
    assert {len(labels) for labels in first[:-1]} == {64}
    assert torch.equal(torch.cat(first).sort().values, digits.load("train")[1].sort().values)
    assert len(torch.cat(second)) == SIZES["train"]
