"""Distortion: errors of single layers in closed form, and of whole networks by running them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from networks import Decoder, Recurrent, Tagger
from scoring import Given, bench_of
from torch import nn
from torch.nn import functional as F

from search.quantize.settings import QuantizerSettings
from search.sensitivity.choices import choices_of
from search.sensitivity.distortion import EXACT_DB, distortion


def test_errors_of_a_linear_layer_are_those_of_the_definitions():
    task = Given(nn.Linear(4, 3), torch.randn(12, 4))
    bench, choices = bench_of(task, ["int2", "int4", "float"], ["uint3", "uint8", "float"])
    found = distortion(task, bench.simulated, choices)
    simulated, x = bench.simulated, task.data.double()
    layer = simulated.network.names[0]
    weight = simulated.float_weight(layer).double()
    bias = simulated.owner(layer).bias.detach().double()
    output = F.linear(x, weight, bias)
    for position, choice in enumerate(choices):
        if choice.format.is_float:
            assert found.weight_error[position] == found.output_error[position] == 0
            assert found.sqnr_db[position] == EXACT_DB
            continue
        if choice.decision.side == "weight":
            quantized = simulated.quantized_weight(layer, choice.format).double()
            error, square, per = (quantized - weight).square().sum(), weight.square().sum(), 1
            now = F.linear(x, quantized, bias)
        else:
            range_ = simulated.input_range(layer, choice.format)
            codes = (x / range_.scale).round() + range_.zero_point
            quantized = (codes.clamp(0, 2**choice.format.bits - 1) - range_.zero_point) * range_.scale
            error, square, per = (quantized - x).square().sum(), x.square().sum(), len(x)
            now = F.linear(quantized, weight, bias)
        assert found.weight_error[position] == pytest.approx(float(error) / per, rel=1e-4)
        assert found.sqnr_db[position] == pytest.approx(10 * np.log10(float(square / error)), abs=1e-3)
        expected = (now - output).square().sum() / output.square().sum()
        assert found.output_error[position] == pytest.approx(float(expected), rel=1e-3)


def test_a_tensor_that_two_layers_read_counts_once_and_a_tie_adds_up(bench):
    apart = distortion(bench.task, bench.simulated, choices_of(bench.space))
    tied, tied_choices = bench_of(bench.task, ["int2", "int4", "int8"], ["uint4", "uint8"], ties=[["left", "head"]])
    found = distortion(bench.task, tied.simulated, tied_choices)
    alone = {str(choice): index for index, choice in enumerate(choices_of(bench.space))}
    seen = 0
    for position, choice in enumerate(tied_choices):
        if choice.decision.side == "weight":
            parts = [alone[f"the weight of {layer} in {choice.format}"] for layer in choice.decision.layers]
            seen += len(parts) > 1
            assert found.weight_error[position] == pytest.approx(apart.weight_error[parts].sum())
            assert found.output_error[position] == pytest.approx(apart.output_error[parts].mean())
    assert seen == 3
    shared = next(i for i, c in enumerate(choices_of(bench.space)) if "left, right" in str(c))
    images = torch.cat([batch[0] for batch in bench.task.batches("calibration")])
    stem = F.relu(bench.simulated.apply({}).stem(images)).detach().double()
    range_ = bench.simulated.input_range("left", choices_of(bench.space)[shared].format)
    quantized = ((stem / range_.scale).round() + range_.zero_point).clamp(0, 15).sub(range_.zero_point) * range_.scale
    expected = (quantized - stem).square().sum() / len(images)
    assert apart.weight_error[shared] == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize(
    ("model", "ties"), [(Tagger(), []), (Decoder(), [["embedding", "decoder"]])], ids=["lstm", "tied embedding"]
)
def test_recurrent_and_tied_weights_are_measured_by_running_their_modules(model, ties):
    inputs = torch.randint(10, (8, 6))
    bench, choices = bench_of(Given(model, inputs), ["int3", "int8"], ["int8"], ties=ties)
    found = distortion(bench.task, bench.simulated, choices)
    for position, choice in enumerate(choices):
        if choice.decision.side != "weight":
            continue
        assert found.output_error[position] > 0
        layer = choice.decision.layers[0]
        module = bench.simulated.owner(layer)
        if not isinstance(module, nn.LSTM):
            continue
        outputs = []
        for policy in ({}, choice.on({})):
            bench.simulated.apply(policy)
            with torch.no_grad():
                x = F.embedding(inputs, bench.simulated.float_weight("embedding"))
                outputs.append(module(x)[0].double())
        expected = (outputs[1] - outputs[0]).square().sum() / outputs[0].square().sum()
        assert found.output_error[position] == pytest.approx(float(expected), rel=1e-3)
    assert bench.simulated.apply({}) is bench.simulated.model


def test_a_layer_called_on_several_tensors_adds_them_up():
    task = Given(Recurrent(), torch.randn(12, 4))
    bench, choices = bench_of(task, ["int4"], ["int4"])
    found = distortion(task, bench.simulated, choices)
    x, error = task.data, 0.0
    layer = bench.simulated.network.names[0]
    for _ in range(3):
        scale = bench.simulated.input_range(layer, choices[1].format).scale
        error += float(((x / scale).round().clamp(-8, 7) * scale - x).double().square().sum())
        with torch.no_grad():
            x = torch.tanh(bench.simulated.owner(layer)(x))
    assert found.weight_error[1] == pytest.approx(error / 12, rel=1e-3)


def test_repaired_biases_count_and_outputs_may_be_left_out():
    task = Given(nn.Linear(4, 3), torch.randn(12, 4) + 2)
    plain, repaired = (
        bench_of(task, ["int2"], ["float"], quantizer=QuantizerSettings(repair=repair)) for repair in ("none", "bias")
    )
    before = distortion(task, plain[0].simulated, plain[1])
    after = distortion(task, repaired[0].simulated, repaired[1])
    assert after.output_error[0] < 0.7 * before.output_error[0]
    assert after.weight_error[0] == before.weight_error[0]
    assert not distortion(task, plain[0].simulated, plain[1], with_outputs=False).output_error.any()
