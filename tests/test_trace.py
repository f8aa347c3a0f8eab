"""Networks recovered from a forward pass, against closed forms, random programs and torch's own counter."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import Attention, Branching, Decoder, InPlace, Recurrent, Tagger, TwoInputs
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hwmodels.network import Network
from search.errors import DataError, UnsupportedError
from search.tasks.networks import digits_net, mobilenetv2, resnet20
from search.tasks.task import call
from search.trace import describe, parameter_of, shared_parameters, slow_attention, trace


class Of(nn.Module):
    """A model with two layers and any forward."""

    def __init__(self, forward) -> None:
        super().__init__()
        self.a, self.b, self.body = nn.Linear(4, 4), nn.Linear(4, 4), forward

    def forward(self, x):
        return self.body(self, x)


def reads(network: Network, name: str) -> tuple[str, ...]:
    steps = {step.name: step for step in (*network.layers, *network.operations)}
    return steps[name].reads


def follow(body) -> Network:
    network = trace(Of(body), torch.randn(2, 4))
    check_consistent(network)
    return network


def check_consistent(network: Network) -> None:
    """Reads and writes of the steps, and producers and consumers of the tensors, say the same."""
    steps = {step.name: step for step in (*network.layers, *network.operations)}
    assert len(steps) == len(network.layers) + len(network.operations)
    assert set(network.order) == set(steps)
    for name, tensor in network.tensors.items():
        assert tensor.name == name
        assert tensor.producer is None or name in steps[tensor.producer].writes
        assert set(tensor.consumers) == {step.name for step in steps.values() if name in step.reads}
    for step in steps.values():
        assert set(step.reads) | set(step.writes) <= set(network.tensors)
        assert all(network.tensors[name].producer == step.name for name in step.writes)
    assert set(network.outputs) <= set(network.tensors)
    for layer in network:
        assert network.order.count(layer.name) == layer.calls


def test_every_read_of_resnet20():
    network = trace(resnet20(), torch.randn(2, 1, 28, 28))
    check_consistent(network)
    expected = {"conv": ("input",), "bn": ("conv",), "relu": ("bn",)}
    x = "relu"
    for stage in range(3):
        for block in range(3):
            at = f"stages.{stage}.{block}."
            expected |= {at + "conv1": (x,), at + "bn1": (at + "conv1",), at + "relu": (at + "bn1",)}
            expected |= {at + "conv2": (at + "relu",), at + "bn2": (at + "conv2",)}
            if stage and not block:
                expected |= {at + "shortcut.0": (x,), at + "shortcut.1": (at + "shortcut.0",)}
                x = at + "shortcut.1"
            expected |= {at + "add": (at + "bn2", x), at + "relu.1": (at + "add",)}
            x = at + "relu.1"
    expected |= {"adaptive_avg_pool2d": (x,), "fc": ("adaptive_avg_pool2d",)}
    assert {name: reads(network, name) for name in network.order} == expected
    assert list(network.order) == list(expected)
    assert network.outputs == ("fc",)
    assert {kind for op in network.operations if (kind := op.kind)} == {
        "batch_norm",
        "relu",
        "add",
        "adaptive_avg_pool2d",
    }


def test_sizes_of_resnet20():
    model = resnet20()
    network = trace(model, torch.randn(2, 1, 28, 28))
    convolutions = 3 * [(28, 16, 16)] * 2 + [(14, 16, 32)] + 5 * [(14, 32, 32)] + [(7, 32, 64)] + 5 * [(7, 64, 64)]
    macs = 28**2 * 9 * 16 + sum(side**2 * 9 * c_in * c_out for side, c_in, c_out in convolutions)
    macs += 14**2 * 16 * 32 + 7**2 * 32 * 64 + 64 * 10
    assert sum(layer.macs for layer in network) == macs
    assert network["stages.1.0.conv1"].stride == (2, 2)
    assert network["stages.1.0.conv1"].kernel == (3, 3)
    assert network["stages.1.0.conv1"].input_shape == (2, 16, 28, 28)
    assert network["stages.1.0.conv1"].output_shape == (2, 32, 14, 14)
    assert network["fc"].input_shape == (2, 64)
    assert network.tensors["adaptive_avg_pool2d"].shape == (2, 64, 1, 1)
    assert network.tensors["input"].values == 28 * 28
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert network.other_parameters == sum(4 * norm.num_features for norm in norms)
    stored = network.weight_count + network["fc"].bias_count + network.other_parameters
    assert stored == sum(value.numel() for value in model.state_dict().values() if value.is_floating_point())


def test_mobilenetv2_by_following_its_sequence():
    model = mobilenetv2()
    network = trace(model, torch.randn(2, 1, 28, 28))
    check_consistent(network)
    x, expected = "input", {}
    for index, module in enumerate(model.features):
        at, parts = f"features.{index}", getattr(module, "body", [None])
        for part in range(len(parts)):
            name = f"{at}.body.{part}" if hasattr(module, "body") else at
            expected[name] = (x if part == 0 else f"{at}.body.{part - 1}",)
        last = f"{at}.body.{len(parts) - 1}" if hasattr(module, "body") else at
        if getattr(module, "adds", False):
            expected[f"{at}.add"] = (x, last)
            last = f"{at}.add"
        x = last
    expected |= {"mean": (x,), "classifier": ("mean",)}
    assert {name: reads(network, name) for name in network.order} == expected
    assert sum(layer.is_depthwise for layer in network) == 10
    assert sum(operation.kind == "add" for operation in network.operations) == 6


@pytest.mark.parametrize(
    "model",
    [
        digits_net(),
        resnet20(),
        mobilenetv2(),
        nn.Sequential(nn.Conv2d(1, 4, 3, groups=1), nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2, padding=1)),
        nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, dilation=2), nn.Conv2d(6, 12, 3, groups=3), nn.Linear(9, 5)),
    ],
    ids=["digits", "resnet20", "mobilenetv2", "transposed", "grouped"],
)
def test_macs_are_half_of_what_torch_counts(model):
    image = torch.randn(3, 1, 28, 28) if not isinstance(model, nn.Sequential) else torch.randn(3, 1, 26, 26)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.deepcopy(model).eval()(image)
    assert 2 * 3 * sum(layer.macs for layer in trace(model, image)) == counter.get_total_flops()


@pytest.mark.parametrize(
    ("module", "given", "macs", "kind"),
    [
        (nn.Conv1d(4, 6, 3), (2, 4, 10), 8 * 6 * 4 * 3, "conv1d"),
        (nn.Conv3d(2, 3, 2), (1, 2, 4, 4, 4), 27 * 3 * 2 * 8, "conv3d"),
        (nn.ConvTranspose1d(4, 6, 3), (2, 4, 10), 10 * 4 * 6 * 3, "conv_transpose1d"),
        (nn.ConvTranspose3d(2, 4, 2, groups=2), (2, 2, 3, 3, 3), 27 * 2 * 2 * 8, "conv_transpose3d"),
        (nn.Linear(4, 5), (2, 7, 3, 4), 7 * 3 * 4 * 5, "linear"),
    ],
)
def test_macs_of_one_layer(module, given, macs, kind):
    network = trace(nn.Sequential(module), torch.randn(given))
    assert (network["0"].macs, network["0"].kind) == (macs, kind)
    assert network["0"].bias_count == module.bias.numel()
    assert network["0"].channel_axis == int("transpose" in kind)
    assert network.other_parameters == 0


def test_transformer_by_hand():
    network = trace(Attention(), torch.randn(2, 8, 16))
    check_consistent(network)
    expected = {
        "norm": ("input",),
        "qkv": ("norm",),
        "chunk": ("qkv",),
        "matmul": ("chunk", "chunk:1"),
        "div": ("matmul",),
        "softmax": ("div",),
        "matmul.1": ("softmax", "chunk:2"),
        "out": ("matmul.1",),
        "add": ("input", "out"),
        "up": ("add",),
        "gelu": ("up",),
        "down": ("gelu",),
        "add.1": ("add", "down"),
    }
    assert {name: reads(network, name) for name in network.order} == expected
    assert network["out"].input_shape == (2, 8, 16)
    assert network.tensors["matmul"].shape == (2, 4, 8, 8)


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_encoder(batch_first):
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=batch_first)
    network = trace(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), torch.randn(2, 2, 16))
    check_consistent(network)
    x, expected = "input", {}
    for at in ("layers.0.", "layers.1."):
        expected |= {
            at + "self_attn.in_proj_weight": (x,),
            at + "self_attn": (at + "self_attn.in_proj_weight",),
            at + "self_attn.out_proj.weight": (at + "self_attn",),
            at + "add": (x, at + "self_attn.out_proj.weight"),
            at + "norm1": (at + "add",),
            at + "linear1": (at + "norm1",),
            at + "relu": (at + "linear1",),
            at + "linear2": (at + "relu",),
            at + "add.1": (at + "norm1", at + "linear2"),
            at + "norm2": (at + "add.1",),
        }
        x = at + "norm2"
    assert {name: reads(network, name) for name in network.order} == expected
    projections = network["layers.0.self_attn.in_proj_weight"], network["layers.0.self_attn.out_proj.weight"]
    assert [layer.macs for layer in projections] == [2 * 16 * 48, 2 * 16 * 16]
    assert [layer.bias_count for layer in projections] == [48, 16]
    assert not any(layer.quantizes_input for layer in projections)
    assert network.other_parameters == 2 * 2 * 2 * 16  # the four layer norms


def test_attention_with_separate_projections_and_two_lengths():
    class Cross(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=4, batch_first=True)

        def forward(self, query, key, value):
            return self.attention(query, value=value, key=key)

    network = trace(Cross(), (torch.randn(2, 3, 8), torch.randn(2, 5, 6), torch.randn(2, 5, 4)))
    check_consistent(network)
    macs = {"q_proj_weight": 3 * 8 * 8, "k_proj_weight": 5 * 6 * 8, "v_proj_weight": 5 * 4 * 8}
    macs["out_proj.weight"] = 3 * 8 * 8
    assert {layer.name: layer.macs for layer in network} == {f"attention.{name}": n for name, n in macs.items()}
    assert [layer.bias_count for layer in network] == [8, 8, 8, 8]
    assert reads(network, "attention.k_proj_weight") == ("input.1",)
    assert reads(network, "attention.v_proj_weight") == ("input.2",)
    assert network.outputs == ("attention.out_proj.weight", "attention:1")
    assert network.tensors["attention:1"].shape == (2, 3, 5)
    assert network.other_parameters == 0


def test_recurrent_weights_are_layers():
    model = Tagger()
    network = trace(model, torch.randint(0, 10, (2, 7)))
    check_consistent(network)
    weights = {f"lstm.{name}": value for name, value in model.lstm.named_parameters() if "weight" in name}
    assert network.names == ("embedding", *weights, "head")
    for name, weight in weights.items():
        assert network[name].macs == 7 * weight.numel()
        assert (network[name].bias_count, network[name].kind) == (20, "lstm")
    assert reads(network, "lstm.weight_ih_l0_reverse") == ("embedding",)
    assert reads(network, "lstm.weight_ih_l1") == ()
    assert reads(network, "head") == ("lstm",)
    assert network.other_parameters == 0


def test_packed_sequences_count_the_steps_that_run():
    network = trace(Tagger(), (torch.randint(0, 10, (2, 7)), torch.tensor([7, 5])))
    check_consistent(network)
    assert network["lstm.weight_hh_l0"].macs == (7 + 5) // 2 * 20 * 5
    assert network.tensors["lstm"].values == (7 + 5) // 2 * 10
    assert reads(network, "head") == ("pad_packed_sequence",)


def test_sequence_first_recurrence_counts_steps_not_samples():
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.gru, self.cell, self.head = nn.GRU(3, 4), nn.GRUCell(4, 4, bias=False), nn.Linear(4, 2)

        def forward(self, x):
            states, _ = self.gru(x.transpose(0, 1))
            state = torch.zeros_like(states[0])
            for step in states:
                state = self.cell(step, state)
            return self.head(state), states

    network = trace(SequenceFirst(), torch.randn(2, 5, 3))
    check_consistent(network)
    assert network["gru.weight_ih_l0"].macs == 5 * 12 * 3
    assert network["cell.weight_hh"].macs == 5 * 12 * 4
    assert (network["cell.weight_hh"].calls, network["cell.weight_hh"].kind) == (5, "gru")
    assert network.tensors["gru"].shape == (2, 5, 4)
    assert network.outputs == ("head", "gru")


def test_tied_weights_are_two_layers_and_counted_once():
    model = Decoder()
    network = trace(model, torch.randint(0, 20, (2, 8)))
    check_consistent(network)
    assert shared_parameters(model, network) == (("embedding", "decoder"),)
    assert network["embedding"].macs == 0
    assert not network["embedding"].quantizes_input
    assert network.tensors["input"].is_integer
    assert network.tensors["position.input"].producer is None
    assert network.other_parameters == 2 * 16  # the layer norm


def test_only_the_branch_taken():
    for sign, taken, left in ((1, "positive", "negative"), (-1, "negative", "positive")):
        network = trace(Branching(), sign * torch.ones(2, 4))
        assert network.names == (taken,)
        assert left not in network
        assert network.other_parameters == 20


def test_shared_module_runs_three_times_under_its_first_name():
    network = trace(Recurrent(), torch.randn(2, 4))
    check_consistent(network)
    layer = network["first"]
    assert network.names == ("first",)
    assert (layer.calls, layer.macs) == (3, 3 * 16)
    assert layer.reads == ("input", "tanh", "tanh.1")
    assert layer.writes == ("first", "first:1", "first:2")
    assert network.order == ("first", "tanh", "first", "tanh.1", "first", "tanh.2")


def test_inputs_by_keyword_and_outputs_in_a_dataclass():
    network = trace(TwoInputs(), {"image": torch.randn(2, 1, 5, 5), "ids": torch.tensor([1, 2])})
    check_consistent(network)
    assert reads(network, "image") == ("input",)
    assert reads(network, "ids") == ("input.1",)
    assert reads(network, "cat") == ("mean", "ids")
    assert network.outputs == ("head", "cat")


def test_writing_in_place_is_seen_through_views_and_only_where_it_is():
    network = trace(InPlace(), torch.randn(2, 1, 4, 4))
    check_consistent(network)
    assert reads(network, "relu") == ("conv",)
    assert reads(network, "chunk") == ("relu",)  # `flat` views what the ReLU changed
    assert set(reads(network, "add")) == {"chunk", "relu"}
    whole = next(name for name in network.tensors if reads(network, "sum") == (name,))
    assert network.tensors[whole].producer == "add"
    assert network.tensors[whole].values == 64
    assert reads(network, "sum.1") == ("chunk:1",)  # the other half did not change
    assert reads(network, "setitem") == ("sum",)
    last = reads(network, "fc")[0]
    assert network.tensors[last].producer == "copy"
    assert set(reads(network, "copy")) >= {"sum.1", "setitem"}


@pytest.mark.parametrize(
    "keep",
    [
        lambda x: x.view(2, 2, 2).reshape(4, 2).flatten().view(2, 4),
        lambda x: x.t().contiguous().t(),
        lambda x: x.permute(1, 0).transpose(0, 1),
        lambda x: x.unsqueeze(0).squeeze(0)[None][0],
        lambda x: nn.Flatten()(nn.Identity()(F.dropout(x, 0.5, training=False))),
        lambda x: x.clone().detach().float().to(torch.float32).data,
        lambda x: torch.reshape(x.mT, (4, 2)).mT,
        lambda x: copy.deepcopy(x),
        lambda x: type("Double", (torch.autograd.Function,), {"forward": lambda ctx, x: x.view_as(x)}).apply(x),
    ],
)
def test_the_same_values_are_the_same_tensor(keep):
    network = follow(lambda model, x: model.b(keep(model.a(x))))
    assert reads(network, "b") == ("a",)
    assert network.order == ("a", "b")


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda x: x + 1, "add"),
        (lambda x: 1 - x, "sub"),
        (lambda x: x.div(2), "div"),
        (lambda x: x.double().float(), "double"),
        (lambda x: x.mul_(2), "mul"),
        (lambda x: x.__imul__(2), "mul"),
        (lambda x: F.relu(x, inplace=True), "relu"),
        (lambda x: nn.ReLU(inplace=True)(x), "relu"),
        (lambda x: torch.add(x, 1, out=torch.empty(2, 4)), "add"),
        (lambda x: x.flip(0), "flip"),
        (lambda x: torch.cat([x[:, 2:], x[:, :2]], 1), "getitem"),
        (lambda x: torch.stack(x.unbind(1), 1), "unbind"),
        (lambda x: torch.cat(x.split(2, 1), 1), "split"),
        (lambda x: x.view(2, 2, 2).mean(1, keepdim=True).expand(2, 2, 2).reshape(2, 4), "mean"),
        (lambda x: torch.max(x, 1, keepdim=True).values + torch.zeros(2, 4), "max"),
        (lambda x: F.dropout(x, 0.5, training=True), "dropout"),
        (lambda x: torch.zeros(2, 4).copy_(x), "copy"),
    ],
)
def test_other_values_are_another_tensor(change, kind):
    network = follow(lambda model, x: model.b(change(model.a(x))))
    assert next(op.kind for op in network.operations) == kind
    assert reads(network, network.operations[0].name) == ("a",)
    assert reads(network, "b") != ("a",)
    seen, wanted = set(), {"b"}
    while wanted:  # walks back from the output to the input
        seen |= wanted
        wanted = {network.tensors[name].producer for step in wanted for name in reads(network, step)} - {None}
    assert seen == set(network.order)


def test_constants_are_no_tensors_of_the_network():
    def body(model, x):
        mask = torch.ones_like(x).tril()
        return model.b(model.a(x) * mask + model.a.weight.sum() * x.new_ones(4))

    network = follow(body)
    assert set(network.tensors) == {"input", "a", "mul", "add", "b"}


def test_what_leaves_torch_is_still_given_to_the_layer():
    network = follow(lambda model, x: model.b(torch.from_numpy(model.a(x).numpy() * 2)))
    assert reads(network, "b") == ("b.input",)
    assert network.tensors["b.input"].producer is None


KINDS = ("a", "add", "relu", "maximum", "view", "mul")
STEPS = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 20), st.integers(0, 20)), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(STEPS)
def test_random_programs(steps):
    """Runs programs of layers, operations, views and writes in place; the oracle keeps a name for every value."""
    expected: dict[str, tuple[str, ...]] = {"a": (), "b": ()}

    def body(model, x):
        values, names, count = [x], ["input"], dict.fromkeys(KINDS, 0)
        for kind, *indices in steps:
            first, second = (index % len(values) for index in indices)
            given, other = values[first], values[second]
            if kind == "view":
                values.append(given.view(2, 2, 2).transpose(1, 2).transpose(1, 2).reshape(2, 4))
                names.append(names[first])
                continue
            operands = (names[second], names[first]) if kind in ("add", "maximum") else (names[first],)
            name = kind + f"{':' if kind == 'a' else '.'}{count[kind]}" * bool(count[kind])
            count[kind] += 1
            step = "a" if kind == "a" else name
            expected[step] = tuple(dict.fromkeys((*expected.get(step, ()), *operands)))
            if kind == "mul":  # in place: whatever views these values changes with them
                given.mul_(0.5)
                names = [name if held == names[first] else held for held in names]
            else:
                calls = {"a": model.a, "relu": F.relu, "add": other.__radd__, "maximum": other.maximum}
                values.append(calls[kind](given))
                names.append(name)
        expected["b"] = (names[-1],)
        return model.b(values[-1])

    network = follow(body)
    steps = {step.name: step.reads for step in (*network.operations, *network.layers)}
    assert steps == {name: operands for name, operands in expected.items() if operands}


def test_the_model_is_left_as_it_was():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm, self.drop = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return self.drop(self.norm(self.fc(x.mul_(2)))) + torch.rand(4)

    model, example = Stateful(), torch.randn(2, 4)
    model.norm.eval()
    given, state, seed = example.clone(), copy.deepcopy(model.state_dict()), torch.get_rng_state()
    before = [{key: copy.copy(value) for key, value in vars(module).items()} for module in model.modules()]
    ids = [id(value) for value in model.state_dict(keep_vars=True).values()]
    with slow_attention():
        pass
    trace(model, example)
    assert [vars(module) for module in model.modules()] == before
    assert ids == [id(value) for value in model.state_dict(keep_vars=True).values()]
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert torch.equal(example, given)
    assert torch.equal(torch.get_rng_state(), seed)
    assert torch.backends.mha.get_fastpath_enabled()
    assert model.fc(example).requires_grad


def test_the_model_is_left_as_it_was_after_an_error():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout())
    with pytest.raises(DataError):
        trace(model, torch.randn(2, 3))
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


def test_slow_attention_lets_hooks_see_the_layers():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    seen = []
    layer.linear1.forward = lambda x: seen.append(x) or F.linear(x, layer.linear1.weight, layer.linear1.bias)
    with torch.no_grad():
        layer(torch.randn(2, 3, 8))
        assert not seen
        with slow_attention():
            layer(torch.randn(2, 3, 8))
    assert len(seen) == 1


def test_inference_mode_around_the_call_does_no_harm():
    model = Recurrent()
    with torch.inference_mode():
        assert trace(model, torch.randn(2, 4)) == trace(model, torch.randn(2, 4))
        assert trace(Recurrent(), torch.randn(2, 4)).names == ("first",)


@pytest.mark.parametrize("model", [resnet20(), Tagger(), Decoder(), nn.Transformer(8, 2, 1, 1, 16, batch_first=True)])
def test_every_layer_resolves_to_its_parameter(model):
    example = {
        "ResNet": torch.randn(1, 1, 28, 28),
        "Transformer": (torch.randn(2, 5, 8), torch.randn(2, 3, 8)),
    }.get(type(model).__name__, torch.randint(0, 10, (2, 8)))
    network = trace(model, example)
    check_consistent(network)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for layer in network:
        owner, name = parameter_of(model, layer.name)
        key = layer.name if layer.name in parameters else f"{layer.name}.weight"
        assert getattr(owner, name) is parameters[key]
        assert layer.weight_shape == tuple(parameters[key].shape)
        assert math.prod(layer.output_shape) > 0
    biases = sum(layer.bias_count for layer in network)
    tied = sum(network[names[0]].weight_count * (len(names) - 1) for names in shared_parameters(model, network))
    stored = sum(value.numel() for value in model.state_dict(keep_vars=True).values() if value.is_floating_point())
    stored -= 320 if isinstance(model, Decoder) else 0  # the state dict lists the tied weight twice
    assert network.weight_count - tied + biases + network.other_parameters == stored


def test_a_layer_alone_is_named_by_its_parameter():
    model = nn.Linear(4, 3)
    network = trace(model, torch.randn(2, 4))
    assert network.names == ("weight",)
    assert parameter_of(model, "weight") == (model, "weight")


def test_errors_say_what_to_do():
    with pytest.raises(DataError, match=r"does not run on the example input float32 \[2, 3\].*mat1 and mat2"):
        trace(Recurrent(), torch.randn(2, 3))
    with pytest.raises(DataError, match="holds no samples, got str"):
        trace(Recurrent(), "digits")
    with pytest.raises(DataError, match=r"holds no samples, got float32 \[0, 4\]"):
        trace(Recurrent(), torch.randn(0, 4))
    with pytest.raises(UnsupportedError, match="calls no layer that can be quantized"):
        trace(nn.ReLU(), torch.randn(2, 4))
    with pytest.raises(DataError, match=r"has no layer 'frist'.*did you mean 'first'"):
        parameter_of(Recurrent(), "frist")
    with pytest.raises(UnsupportedError, match=r"0\.weight has no shape yet"):
        trace(nn.Sequential(nn.LazyLinear(3)), torch.randn(2, 4))
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(UnsupportedError, match="weight of layer '0' is computed"):
        trace(normed, torch.randn(2, 4))


def test_describe_names_types_and_shapes():
    given = {"ids": torch.zeros(2, 3, dtype=torch.int64), "pair": (torch.zeros(1), None)}
    assert describe(given) == "{ids: int64 [2, 3], pair: (float32 [1], NoneType)}"


def test_call_and_trace_agree_on_how_inputs_are_passed():
    model, given = Tagger().eval(), (torch.randint(0, 10, (2, 7)), torch.tensor([7, 4]))
    assert trace(model, given).tensors["head"].shape == tuple(call(model, given).shape)
