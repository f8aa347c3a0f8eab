"""Backward scores: per-sample gradients against torch.func, the Fisher form against its closed form."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from networks import Decoder, Recurrent, Tagger, TwoInputs
from scoring import Given, Squared, bench_of, mean_and_error, output_changes
from tiny import make_bench
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from hwmodels import Precision
from search.errors import ConfigError, DataError, UnsupportedError
from search.quantize.settings import QuantizerSettings
from search.sensitivity.backward import backward_scores
from search.sensitivity.choices import choices_of
from search.sensitivity.cotangents import KINDS, draw_cotangents
from search.sensitivity.per_sample import bias_gradients, by_sample, weight_gradients
from search.sensitivity.samples import SampleScorer
from search.tasks.function import FunctionTask


class PositionsFirst(nn.Module):
    """A linear layer that reads positions along the first axis, samples along the second."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.inner(x.transpose(0, 1))).mean(0))


class Reused(nn.Module):
    """Multiplies with its embedding's weight, outside of the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner = nn.Embedding(20, 6), nn.Linear(6, 6)

    def forward(self, ids):
        return torch.tanh(self.inner(self.embedding(ids))) @ self.embedding.weight.T


LAYERS = {
    "conv": (nn.Conv2d(3, 4, 3, padding=1), (3, 6, 5)),
    "strided": (nn.Conv2d(3, 4, 3, stride=2, padding=1), (3, 6, 5)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2, dilation=2), (4, 7, 6)),
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (4, 5, 5)),
    "same": (nn.Conv2d(2, 3, (3, 5), padding="same", dilation=2), (2, 6, 5)),
    "reflecting": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (2, 6, 5)),
    "1d": (nn.Conv1d(3, 4, 3, padding=2, stride=2), (3, 9)),
    "3d": (nn.Conv3d(2, 3, (1, 3, 3), padding=(0, 1, 1)), (2, 3, 4, 5)),
    "transposed": (nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1), (4, 4, 3)),
    "transposed groups": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, dilation=2), (4, 5)),
    "linear": (nn.Linear(5, 3), (5,)),
    "linear on sequences": (nn.Linear(5, 3), (4, 2, 5)),
    "embedding": (nn.Embedding(7, 3), (6,)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_per_sample_gradients_are_those_of_torch_func(name):
    module, shape = LAYERS[name]
    x = torch.randint(7, (5, *shape)) if isinstance(module, nn.Embedding) else torch.randn(5, *shape)
    cotangent = torch.randn(module(x).shape)
    parameters = dict(module.named_parameters())

    def inner(parameters, x, cotangent):
        return (functional_call(module, parameters, (x.unsqueeze(0),)) * cotangent.unsqueeze(0)).sum()

    expected = vmap(grad(inner), (None, 0, 0))(parameters, x, cotangent)
    found = weight_gradients(module, by_sample(x, 0, 5), by_sample(cotangent, 0, 5))
    torch.testing.assert_close(found, expected["weight"])
    if "bias" in expected:
        torch.testing.assert_close(bias_gradients(module, by_sample(cotangent, 0, 5)), expected["bias"])


def test_several_entries_of_the_batch_axis_and_another_axis_belong_to_one_sample():
    conv, frames = nn.Conv2d(2, 3, 3), torch.randn(4, 3, 2, 5, 5)  # four videos of three frames
    cotangent = torch.randn(4, 3, 3, 3, 3)
    found = weight_gradients(conv, by_sample(frames.flatten(0, 1), 0, 4), by_sample(cotangent.flatten(0, 1), 0, 4))
    for one, x, g in zip(found, frames, cotangent, strict=True):
        (expected,) = torch.autograd.grad(conv(x), conv.weight, g)
        torch.testing.assert_close(one, expected)
    linear, x, g = nn.Linear(5, 3), torch.randn(6, 4, 5), torch.randn(6, 4, 3)  # positions first
    found = weight_gradients(linear, by_sample(x, 1, 4), by_sample(g, 1, 4))
    torch.testing.assert_close(found, torch.einsum("pno,pni->noi", g, x))


def exact_gram(task, outputs, changes):
    """The Fisher form of output changes, mean over samples, in float64."""
    features = torch.stack([task.tangent(outputs.double(), change.double()) for change in changes]).flatten(1)
    return features @ features.T / len(outputs)


def assert_unbiased(estimates, exact, nonlinearity=0.0):
    """Independent estimates are, on average, what they estimate, within five standard errors."""
    mean, error = mean_and_error(estimates)
    exact = torch.as_tensor(exact)
    allowed = 5 * error + nonlinearity * torch.sqrt(exact.diagonal()[:, None] * exact.diagonal()) + 1e-9
    assert ((mean - exact).abs() <= allowed).all()
    relative = error.diagonal() / exact.diagonal().clamp_min(1e-12)
    assert (relative[exact.diagonal() > 1e-9] < 0.2).all()  # the test would see a factor of two


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_softmax_models_fisher_is_that_of_the_closed_form(kind):
    task = Given(nn.Linear(4, 3), torch.randn(12, 4).abs(), batch_size=12)
    bench, choices = bench_of(task, ["int2", "int3", "int8"], ["uint3", "uint8"])
    changes = output_changes(bench, choices)  # exact: the outputs are linear in weight and input
    exact = exact_gram(task, bench.simulated.model(task.data).detach(), changes)
    found = [
        backward_scores(task, bench.simulated, choices, draws=16, seed=seed, kind=kind).gram.mean for seed in range(16)
    ]
    assert_unbiased(found, exact)


def test_sequences_of_logits_average_over_positions():
    task = Given(nn.Linear(4, 3), torch.randn(6, 5, 4).abs(), batch_size=6)
    bench, choices = bench_of(task, ["int2", "int4"], ["uint3"])
    changes = output_changes(bench, choices)
    outputs = bench.simulated.model(task.data).detach()
    found = [backward_scores(task, bench.simulated, choices, draws=16, seed=seed).gram.mean for seed in range(16)]
    assert_unbiased(found, exact_gram(task, outputs, changes))
    small = 1e-3 * changes[0]
    torch.testing.assert_close(
        0.5 * exact_gram(task, outputs, small[None])[0, 0],
        task.divergence(outputs, outputs + small).mean(),
        rtol=0.01,
        atol=0,
    )


def test_outputs_that_are_no_logits_take_the_second_derivative_of_their_divergence():
    task = Squared(nn.Linear(4, 3), torch.randn(12, 4).abs(), torch.zeros(12, 3), batch_size=12)
    bench, choices = bench_of(task, ["int2", "int4"], ["uint3"])
    changes = output_changes(bench, choices).double().flatten(1)
    found = [backward_scores(task, bench.simulated, choices, draws=16, seed=seed).gram.mean for seed in range(16)]
    assert_unbiased(found, changes @ changes.T / 12)


@pytest.mark.parametrize("kind", KINDS)
def test_backward_and_forward_agree_for_small_changes(bench, kind):
    weight, input = ["int8", "int7"], ["uint8"]
    bench, choices = bench_of(bench.task, weight, input)
    changes = output_changes(bench, choices)
    images = torch.cat([batch[0] for batch in bench.task.batches("calibration")])
    exact = exact_gram(bench.task, bench.simulated.model(images).detach(), changes)
    found = [
        backward_scores(bench.task, bench.simulated, choices, draws=16, seed=seed, kind=kind).gram.mean
        for seed in range(6)
    ]
    assert_unbiased(found, exact, nonlinearity=0.03)


def test_the_form_is_positive_semidefinite_and_its_diagonal_is_the_fisher_score(bench):
    choices = choices_of(bench.space)
    found = backward_scores(bench.task, bench.simulated, choices, draws=2)
    assert np.linalg.eigvalsh(found.gram.mean).min() > -1e-12
    np.testing.assert_array_equal(found.fisher, np.diagonal(found.gram.mean))
    assert (found.fisher_diagonal > 0).all()
    assert found.gradient is None  # there are no labels, and the divergence is flat


def test_shards_add_up_to_the_whole(bench):
    choices = choices_of(bench.space)
    arguments = (bench.task, bench.simulated, choices)
    whole = backward_scores(*arguments, {"stem": Precision.parse("int4/uint4")}, draws=2)
    parts = [
        backward_scores(*arguments, {"stem": Precision.parse("int4/uint4")}, draws=2, shard=(i, 3)) for i in range(3)
    ]
    merged = parts[0] + parts[1] + parts[2]
    assert merged.gram.count == whole.gram.count == 48
    for name in ("fisher", "fisher_diagonal", "gradient"):
        np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=2e-3, atol=1e-8)
    np.testing.assert_allclose(merged.gram.mean, whole.gram.mean, rtol=2e-3, atol=1e-7)
    with pytest.raises(DataError, match="use fewer shards"):
        backward_scores(*arguments, shard=(48, 49))


def one_by_one(monkeypatch):
    """Scores samples alone from now on, weights by the gradients of their parameters."""
    monkeypatch.setattr(SampleScorer, "rehearse", lambda *_: None)


BASES = {
    "float": {},
    "low": dict.fromkeys(("stem", "left", "right", "head"), Precision.parse("int4/uint8")),
    "mixed": {"stem": Precision.parse("int8/float"), "right": Precision.parse("int8")},
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize(
    "settings",
    [QuantizerSettings(), QuantizerSettings(repair="bias"), QuantizerSettings(placement="full")],
    ids=["inputs", "repaired", "full"],
)
def test_samples_taken_apart_score_as_they_do_alone(base, settings, monkeypatch, caplog):
    bench = make_bench(quantizer=settings, weight=["int3", "int8"], input=["uint5"])
    arguments = (bench.task, bench.simulated, choices_of(bench.space), BASES[base])
    together = backward_scores(*arguments, draws=1)
    assert not caplog.records
    one_by_one(monkeypatch)
    alone = backward_scores(*arguments, draws=1)
    scale = np.sqrt(np.outer(alone.fisher_diagonal, alone.fisher_diagonal))
    assert (np.abs(together.gram.mean - alone.gram.mean) <= 0.02 * scale + 1e-12).all()
    np.testing.assert_allclose(together.fisher_diagonal, alone.fisher_diagonal, rtol=0.02)


def test_choices_of_the_base_score_zero(bench):
    choices = choices_of(bench.space)
    found = backward_scores(bench.task, bench.simulated, choices, BASES["low"], draws=1)
    held = np.array([choice.is_in(BASES["low"]) for choice in choices])
    assert held.any()
    assert not found.gram.mean[held].any()
    assert not found.gradient[held].any()
    assert found.fisher[~held].all()


def slopes_of_weights(bench, choices, base, loss):
    """The derivative of a mean loss by the weights and biases, along every weight choice's change of them."""
    names = [name for name, _ in bench.simulated.model.named_parameters()]
    held = {name: p.detach().clone() for name, p in bench.simulated.apply(base).named_parameters()}
    model = copy.deepcopy(bench.simulated.model).requires_grad_(True)
    gradients = dict(zip(names, torch.autograd.grad(loss(model), list(model.parameters())), strict=True))
    found = []
    for choice in choices:
        made = dict(bench.simulated.apply(choice.on(base)).named_parameters())
        found.append(sum(float((gradients[name] * (made[name].detach() - held[name])).sum()) for name in names))
    bench.simulated.apply({})
    return np.array(found)


@pytest.mark.parametrize("base", [{}, dict.fromkeys(("0", "2"), Precision.parse("int4"))], ids=["float", "int4"])
def test_the_gradient_is_that_of_the_loss_at_the_float_base_and_of_the_divergence_elsewhere(base):
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    task = Given(model, torch.randn(12, 4), torch.randint(3, (12,)))
    settings = QuantizerSettings(repair="bias")
    bench, choices = bench_of(task, ["int2", "int4", "int8"], ["float"], quantizer=settings)
    reference = bench.simulated.apply({})(task.data).detach()

    def loss(model):
        outputs = model(task.data)
        return (task.divergence(reference, outputs) if base else task.loss(outputs, (None, task.labels))).mean()

    expected = slopes_of_weights(bench, choices, base, loss)
    found = backward_scores(task, bench.simulated, choices, base, draws=1)
    np.testing.assert_allclose(found.gradient, expected, rtol=1e-3, atol=1e-7)


class Overwriting(nn.Module):
    """Writes in place to what a layer has read, and to what one returns."""

    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.stem, self.side, self.head = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 1), nn.Linear(4, 3)
        self.in_place = in_place

    def forward(self, x):
        x = self.stem(x)
        y = self.side(x)
        x, y = F.leaky_relu(x, 0.5, self.in_place), F.relu(y, self.in_place)
        return self.head((x + y).mean((2, 3)))


def test_tensors_that_the_model_overwrites_are_scored_as_they_were():
    found = []
    images = torch.randn(10, 1, 6, 6)
    for in_place in (False, True):
        torch.manual_seed(0)
        bench, choices = bench_of(Given(Overwriting(in_place), images), ["int2", "int4"], ["int4"])
        found.append(backward_scores(bench.task, bench.simulated, choices, draws=2))
    np.testing.assert_allclose(found[1].gram.mean, found[0].gram.mean, rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(found[1].fisher_diagonal, found[0].fisher_diagonal, rtol=1e-4)


AWKWARD = {
    "called three times": (Recurrent(), torch.randn(10, 4), False),
    "shared positions": (Decoder(), torch.randint(20, (10, 8)), True),
    "an LSTM": (Tagger(), torch.randint(10, (10, 6)), True),
    "positions first": (nn.Sequential(nn.Unflatten(1, (5, 2)), PositionsFirst()), torch.randn(10, 10), False),
    "weights used elsewhere": (Reused(), torch.randint(20, (10, 8)), True),
}


@pytest.mark.parametrize("name", AWKWARD)
def test_awkward_networks_have_the_slopes_of_their_parameters(name, caplog):
    model, inputs, is_alone = AWKWARD[name]
    with torch.no_grad():
        shape = model(inputs).shape
    task = Given(model, inputs, torch.randint(shape[-1], shape[:-1]))
    bench, choices = bench_of(task, ["int3", "int8"], ["int8"])
    weights = [index for index, choice in enumerate(choices) if choice.decision.side == "weight"]
    expected = slopes_of_weights(
        bench, [choices[i] for i in weights], {}, lambda model: task.loss(model(inputs), (None, task.labels)).mean()
    )
    found = backward_scores(task, bench.simulated, choices, draws=1)
    np.testing.assert_allclose(found.gradient[weights], expected, rtol=2e-3, atol=1e-6)
    assert bool(caplog.records) == is_alone


def test_inputs_by_keyword_are_taken_apart_too(caplog):
    model = TwoInputs().eval()
    batches = [{"image": torch.randn(4, 1, 5, 5), "ids": torch.randint(10, (4,))} for _ in range(2)]
    task = FunctionTask(model, batches[0], batches, lambda model, split: 0.0)
    bench, choices = bench_of(task, ["int2", "int8"], ["int8"])
    found = backward_scores(task, bench.simulated, choices, draws=2)
    assert found.gram.count == 8
    assert all(score > 0 for score, choice in zip(found.fisher, choices, strict=True) if not choice.format.is_float)
    assert not caplog.records


def test_a_bfloat16_model_scores_about_as_in_float32():
    images = torch.randn(12, 4)
    model = nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 3))
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        task = Given(copy.deepcopy(model).to(dtype), images.to(dtype))
        bench, choices = bench_of(task, ["int2", "int3"], ["int3"])
        rows.append(backward_scores(task, bench.simulated, choices, draws=4, kind="signs").fisher)
    np.testing.assert_allclose(rows[1], rows[0], rtol=0.15)


def test_errors_say_what_to_do(bench):
    choices = choices_of(bench.space)
    with pytest.raises(ConfigError, match="did you mean 'labels'"):
        backward_scores(bench.task, bench.simulated, choices, kind="label")
    task = FunctionTask(Recurrent(), torch.randn(4, 4), [{"x": torch.randn(4, 4), "y": torch.randn(3)}], len)
    with pytest.raises(UnsupportedError, match="cannot be taken out of the calibration batches"):
        backward_scores(task, bench.simulated, choices)


@pytest.mark.parametrize("kind", KINDS)
def test_random_vectors_depend_on_the_sample_alone(kind, task):
    outputs = torch.randn(6, 4, 3)
    whole = torch.stack(draw_cotangents(task, outputs, range(6), 3, 0, kind), 1)
    parts = [torch.stack(draw_cotangents(task, outputs[i : i + 2], range(i, i + 2), 3, 0, kind), 1) for i in (0, 2, 4)]
    torch.testing.assert_close(torch.cat(parts), whole)
    assert not torch.equal(whole, torch.stack(draw_cotangents(task, outputs, range(6), 3, 1, kind), 1))
