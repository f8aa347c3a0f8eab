"""Where factors may move from producers to readers: sites that exist, some that only seem to, and how outputs stay."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import Attention, Decoder, InPlace, Recurrent, Tagger, TwoInputs
from rescaled import Block, Given, Of, RMSNorm, outputs, parameters, relative_error, simulate, tiny_llama, uniform
from torch import nn
from torch.nn import functional as F

from hwmodels.network import Layer
from search.policy import Policy
from search.recover.scaling import Rescaling, Site, along, largest, quantized_sites
from search.recover.sites import find_sites
from search.tasks.networks import digits_net, mobilenetv2, resnet20
from search.trace import trace


def images(channels: int = 3, size: int = 8) -> torch.Tensor:
    return torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(1))


def conv_pair(between, channels: int = 4, after: nn.Module | None = None) -> Of:
    """A convolution, something, and a convolution."""
    after = after or nn.Conv2d(channels, 5, 3)
    return Of(lambda m, x: m.after(between(m.before(x))), before=nn.Conv2d(3, channels, 3), after=after)


def found(model: nn.Module, *batches) -> dict[str, tuple[str, ...]]:
    task = Given(model, *(batches or [images()]))
    return {site.producer: site.readers for site in find_sites(simulate(task), task)}


# The geometry of weights


LAYERS = {
    "linear": lambda g: nn.Linear(6, 4),
    "conv1d": lambda g: nn.Conv1d(6, 4 * g, 3, groups=g),
    "conv2d": lambda g: nn.Conv2d(6, 4 * g, (2, 3), groups=g),
    "conv3d": lambda g: nn.Conv3d(6, 4 * g, 2, groups=g),
    "conv_transpose1d": lambda g: nn.ConvTranspose1d(6, 4 * g, 3, groups=g),
    "conv_transpose2d": lambda g: nn.ConvTranspose2d(6, 4 * g, 2, groups=g),
}


@given(kind=st.sampled_from(sorted(LAYERS)), groups=st.sampled_from([1, 2, 3, 6]), seed=st.integers(0, 9))
def test_factors_along_inputs_and_outputs(kind: str, groups: int, seed: int) -> None:
    torch.manual_seed(seed)
    module = LAYERS[kind](groups).double()
    module.bias.data.zero_()
    x = torch.randn(2, 6, *[4] * (module.weight.dim() - 2)).double()
    layer = trace(module, x).layers[0]
    inputs, channels = 6, module(x).shape[1]
    s, t = torch.rand(inputs).double() + 0.5, torch.rand(channels).double() + 0.5
    ones = [1] * (x.dim() - 2)
    expected = module(x * s.view(-1, *ones)) * t.view(-1, *ones)
    with torch.no_grad():
        module.weight.mul_(along(layer, s, "input") * along(layer, t, "output"))
    torch.testing.assert_close(module(x), expected)


@given(
    kind=st.sampled_from(sorted(LAYERS)),
    groups=st.sampled_from([1, 2, 3, 6]),
    side=st.sampled_from(["input", "output"]),
)
def test_largest_weight_of_a_channel(kind: str, groups: int, side: str) -> None:
    module = LAYERS[kind](groups)
    layer = Layer("a", kind, weight_shape=tuple(module.weight.shape), groups=groups if kind != "linear" else 1)
    count = {"input": 6, "output": 4 if kind == "linear" else 4 * groups}[side]
    values = largest(layer, module.weight.detach(), side)
    assert values.shape == (count,)
    for channel in range(count):
        mark = torch.zeros(count)
        mark[channel] = 1
        chosen = module.weight.detach() * along(layer, mark, side)
        assert values[channel] == chosen.abs().max()


def test_a_site_spreads_to_columns_and_gathers_from_them() -> None:
    site = Site("a", 3, {"b": torch.tensor([2, 2, 0, -1]), "c": torch.tensor([0, 0])})
    assert site.spread("b", torch.tensor([2.0, 3.0, 5.0])).tolist() == [5, 5, 2, 1]
    values = {"b": torch.tensor([1.0, 4.0, 2.0, 99.0]), "c": torch.tensor([6.0, 4.0])}
    assert site.gather(values).tolist() == [6, 0, 4]
    assert site.gather(values, "mean").tolist() == [4, 0, 2.5]


# Sites that are there


BETWEEN = {
    "nothing": lambda x: x,
    "relu": F.relu,
    "relu_in_place": lambda x: F.relu(x, inplace=True),
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "max_pool": lambda x: F.max_pool2d(F.relu(x), 2, 1),
    "avg_pool": lambda x: F.avg_pool2d(F.relu(x), 2, 1),
    "dropout": lambda x: F.dropout(x, 0.5, training=False),
    "constant": lambda x: x * 0.3 / 2,
    "upsampled": lambda x: F.interpolate(x, scale_factor=2.0),
    "zero_padding": lambda x: F.pad(x, (1, 1, 1, 1)),
    "negated": lambda x: F.relu(-x),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_factors_pass(name: str) -> None:
    assert found(conv_pair(BETWEEN[name])) == {"before": ("after",)}


STOPS = {
    "gelu": F.gelu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu6": F.relu6,
    "elu": F.elu,
    "clamp": lambda x: x.clamp(-100, 100),
    "residual": lambda x: x + 1,
    "softmax": lambda x: x.softmax(1),
    "other_padding": lambda x: F.pad(x, (1, 1, 1, 1), value=1.0),
    "mean_over_channels": lambda x: x.mean(1, keepdim=True).expand(-1, 4, -1, -1),
    "square": lambda x: x * x,
    "norm": lambda x: F.group_norm(x, 2),
    "rounding": torch.round,
}


@pytest.mark.parametrize("name", STOPS)
def test_factors_do_not_pass(name: str) -> None:
    assert found(conv_pair(STOPS[name])) == {}


def test_no_site_across_a_residual_addition() -> None:
    model = Of(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))) + x)), **{n: nn.Conv2d(3, 3, 3, padding=1) for n in "abc"})
    assert found(model) == {"a": ("b",)}, "b is added to x"


def test_every_reader_must_be_rescaled() -> None:
    both = Of(
        lambda m, x: m.b(m.a(x)).sum() + m.c(F.relu(m.a(x))), a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4)
    )
    x = torch.randn(3, 4)
    assert found(both, x) == {"a": ("b", "c")}
    returned = Of(lambda m, x: (y := m.a(x), m.b(y)), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    assert found(returned, x) == {}, "the model returns what a writes"
    used = Of(lambda m, x: (y := m.a(x)).sum() + m.b(y), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    assert found(used, x) == {}


def test_flattened_pixels_are_columns_of_one_channel() -> None:
    model = Of(
        lambda m, x: m.head(F.max_pool2d(F.relu(m.conv(x)), 2).flatten(1)),
        conv=nn.Conv2d(3, 4, 3),
        head=nn.Linear(36, 5),
    )
    task = Given(model, images())
    (site,) = find_sites(simulate(task), task)
    assert site.columns["head"].tolist() == [column // 9 for column in range(36)]
    last = Of(
        lambda m, x: m.head(m.conv(x).permute(0, 2, 3, 1).flatten(1)), conv=nn.Conv2d(3, 4, 3), head=nn.Linear(144, 5)
    )
    task = Given(last, images())
    (site,) = find_sites(simulate(task), task)
    assert site.columns["head"].tolist() == [column % 4 for column in range(144)]


def test_a_depthwise_convolution_reads_and_produces() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), nn.Conv2d(8, 2, 1), nn.Flatten()
    )
    assert found(model) == {"0": ("2",), "2": ("4",)}


def test_grouped_and_transposed_convolutions() -> None:
    model = nn.Sequential(
        nn.ConvTranspose2d(3, 6, 3, groups=3),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(4, 2, 2),
    )
    assert found(model) == {"0": ("2",), "2": ("4",)}


def test_shuffled_channels_are_told_apart() -> None:
    shuffle = nn.ChannelShuffle(2)
    task = Given(conv_pair(shuffle, channels=12, after=nn.Conv2d(12, 4, 3, groups=2)), images())
    (site,) = find_sites(simulate(task), task)
    assert site.columns["after"].tolist() == [0, 6, 1, 7, 2, 8, 3, 9, 4, 10, 5, 11]


def test_more_channels_than_one_digit_can_spell() -> None:
    order = torch.randperm(600)
    model = Of(lambda m, x: m.b(F.relu(m.a(x)).index_select(1, order)), a=nn.Linear(4, 600), b=nn.Linear(600, 3))
    task = Given(model, torch.randn(3, 4))
    (site,) = find_sites(simulate(task), task)
    assert torch.equal(site.columns["b"], order)


def test_a_concatenation_is_two_sites_of_one_reader() -> None:
    model = Of(
        lambda m, x: m.c(torch.cat([F.relu(m.a(x)), m.b(x)], 1)),
        a=nn.Conv2d(3, 2, 1),
        b=nn.Conv2d(3, 3, 1),
        c=nn.Conv2d(5, 2, 1),
    )
    task = Given(model, images())
    sites = {site.producer: site.columns["c"].tolist() for site in find_sites(simulate(task), task)}
    assert sites == {"a": [0, 1, -1, -1, -1], "b": [-1, -1, 0, 1, 2]}


def test_squeeze_and_excitation() -> None:
    model = Of(
        lambda m, x: m.out(
            (y := F.relu(m.conv(x))) * torch.sigmoid(m.rise(F.relu(m.fall(y.mean((2, 3), keepdim=True)))))
        ),
        conv=nn.Conv2d(3, 4, 3),
        fall=nn.Conv2d(4, 2, 1),
        rise=nn.Conv2d(2, 4, 1),
        out=nn.Conv2d(4, 3, 1),
    )
    assert found(model) == {"conv": ("fall", "out"), "fall": ("rise",)}


TOKENS = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(2))
BLOCK = {"first": ("q", "k", "v"), "v": ("o",), "second": ("gate", "up"), "up": ("down",)}


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm, nn.RMSNorm, RMSNorm, lambda width: RMSNorm(width, 1.0)],
    ids=["layer", "rms", "llama", "gemma"],
)
def test_a_transformer_block(norm) -> None:
    task = Given(Block(norm=norm), TOKENS)
    sites = {site.producer: site for site in find_sites(simulate(task), task)}
    assert {name: site.readers for name, site in sites.items()} == BLOCK
    columns = [*range(8), *range(8), *range(8, 16), *range(8, 16)]
    assert sites["v"].columns["o"].tolist() == columns, "two query heads share each value head"


def test_a_gate_that_lets_factors_through_is_a_site_of_its_own() -> None:
    assert found(Block(gate=F.relu), TOKENS) == BLOCK | {"gate": ("down",)}


def test_columns_behind_a_shut_gate_are_in_order_as_the_others_are() -> None:
    model = Of(lambda m, x: m.c(F.relu(m.b(x)) * m.a(x)), a=nn.Linear(4, 6), b=nn.Linear(4, 6), c=nn.Linear(6, 2))
    model.b.bias.data[1] = -1e3
    task = Given(model, torch.randn(3, 4))
    sites = {site.producer: site.columns["c"].tolist() for site in find_sites(simulate(task), task)}
    assert sites["a"] == list(range(6))


def test_torchs_own_encoder() -> None:
    layer = nn.TransformerEncoderLayer(16, 4, 32, norm_first=True, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    sites = {"norm1": "self_attn.in_proj_weight", "norm2": "linear1", "linear1": "linear2"}
    expected = {f"layers.0.{producer}": (f"layers.0.{reader}",) for producer, reader in sites.items()}
    assert found(encoder, torch.randn(2, 5, 16)) == expected


def test_a_batch_norm_that_could_not_be_folded_is_a_norm() -> None:
    model = Of(lambda m, x: m.conv(F.relu(m.norm(x))), norm=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 2, 3))
    assert found(model) == {"norm": ("conv",)}


LLAMA = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.v_proj": ("self_attn.o_proj",),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.up_proj": ("mlp.down_proj",),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_llama(dtype: torch.dtype, tied: bool) -> None:
    task = tiny_llama(dtype, tied)
    sites = {site.producer: site.readers for site in find_sites(simulate(task), task)}
    expected = {
        f"model.layers.{block}.{producer}": tuple(f"model.layers.{block}.{reader}" for reader in readers)
        for block in range(2)
        for producer, readers in LLAMA.items()
    }
    assert sites == expected | ({} if tied else {"model.norm": ("lm_head",)}), "a tied head would change the embedding"


def test_the_built_in_networks() -> None:
    x = torch.randn(2, 1, 28, 28)
    blocks = [f"stages.{stage}.{block}" for stage in range(3) for block in range(3)]
    assert found(resnet20(), x) == {f"{block}.conv1": (f"{block}.conv2",) for block in blocks}
    assert found(mobilenetv2(), x) == {}, "ReLU6 behind every expansion, an addition or ReLU6 behind every projection"
    assert found(digits_net(), x) == {f"stages.{stage}.0.conv1": (f"stages.{stage}.0.conv2",) for stage in range(3)}


# Sites that only seem to be there


def test_shared_weights_stay() -> None:
    model = Of(lambda m, x: m.b(F.relu(m.a(x))) + m.c(x), **{name: nn.Linear(4, 4) for name in "abc"})
    assert found(model, torch.randn(2, 4)) == {"a": ("b",)}
    model.c.weight = model.a.weight
    assert found(model, torch.randn(2, 4)) == {}
    assert found(Recurrent(), torch.randn(2, 4)) == {}
    assert found(Decoder(), torch.randint(0, 20, (2, 5))) == {"block.norm": ("block.qkv",)}


def test_a_weight_used_behind_our_back_is_left_alone() -> None:
    model = Of(
        lambda m, x: m.d(F.relu(m.c(m.b(F.relu(m.a(x))) + F.linear(x, m.a.weight)))),
        **{name: nn.Linear(4, 4) for name in "abcd"},
    )
    assert found(model, torch.randn(2, 4)) == {"c": ("d",)}, "the others are kept"


def test_a_module_whose_weight_does_not_scale_its_output_is_no_norm() -> None:
    class Shift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4))

        def forward(self, x):
            return x * self.weight.sigmoid()

    assert found(nn.Sequential(Shift(), nn.Linear(4, 2)), torch.randn(3, 4)) == {}


def test_a_norm_may_have_other_parameters() -> None:
    class Norm(nn.Module):
        def __init__(self, shape: tuple[int, ...]) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(shape))
            self.power = nn.Parameter(torch.rand(3, 5))

        def forward(self, x):
            return F.layer_norm(x, (4,)) * self.power.sum() * self.weight + self.bias

    assert found(nn.Sequential(Norm((4,)), nn.Linear(4, 2)), torch.randn(3, 4)) == {"0": ("1",)}
    assert found(nn.Sequential(Norm((1,)), nn.Linear(4, 2)), torch.randn(3, 4)) == {}, "one bias for all channels"


def test_a_norm_called_twice_is_left_alone() -> None:
    model = Of(lambda m, x: m.a(m.n(x)) + m.b(m.n(2 * x)), n=nn.LayerNorm(4), a=nn.Linear(4, 4), b=nn.Linear(4, 4))
    assert found(model, torch.randn(3, 4)) == {}


def test_a_reader_that_the_probe_does_not_reach_is_left_alone() -> None:
    """The probe replaces what `a` writes by positive values, for which the model takes another path."""

    def body(m, x):
        y = m.a(x)
        return m.b(y) if y.detach().numpy().sum() < 0 else m.c(y)  # numpy is not followed

    model = Of(body, **{name: nn.Linear(4, 4) for name in "abc"})
    model.a.bias.data -= 10
    assert found(model, torch.randn(3, 4)) == {}


def test_a_reader_of_two_tensors_is_left_alone() -> None:
    model = Of(lambda m, x: m.c(m.a(x)) + m.c(m.b(x)), **{name: nn.Linear(4, 4) for name in "abc"})
    assert found(model, torch.randn(3, 4)) == {}
    twice = Of(lambda m, x: m.c(m.a(x)) + m.c(m.a(2 * x)), a=nn.Linear(4, 4), c=nn.Linear(4, 4))
    assert found(twice, torch.randn(3, 4)) == {}


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (Tagger(), torch.randint(0, 10, (2, 5))),
        (TwoInputs(), {"image": torch.randn(2, 1, 8, 8), "ids": torch.randint(0, 10, (2,))}),
        (InPlace(), torch.randn(3, 1, 2, 2)),
        (Attention(), torch.randn(2, 5, 16)),
    ],
    ids=["tagger", "two_inputs", "in_place", "attention"],
)
def test_awkward_models_keep_their_outputs(model: nn.Module, inputs) -> None:
    check_preserved(Given(model, inputs))


# Moving factors


def random_factors(site: Site, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.exp2(torch.rand(site.channels, generator=generator) * 6 - 3)


def check_preserved(task: Given, tolerance: float = 1e-5) -> None:
    simulated = simulate(task)
    before, untouched = outputs(simulated, task.example_input), parameters(simulated)
    sites = find_sites(simulated, task)
    rescaling = Rescaling(simulated)
    for site in sites:
        rescaling.move(site, random_factors(site))
    assert all(torch.equal(value, untouched[name]) for name, value in parameters(simulated).items())
    tensors = rescaling.tensors()
    assert bool(tensors) == bool(sites)
    assert all(value.dtype == untouched[name].dtype for name, value in tensors.items())
    assert all(not torch.equal(value, untouched[name]) for name, value in tensors.items() if "weight" in name)
    changed = rescaling.applied(task)
    assert relative_error(outputs(changed, task.example_input), before) < tolerance
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in changed.model.modules())


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (resnet20(), torch.randn(2, 1, 28, 28)),
        (mobilenetv2(), torch.randn(2, 1, 28, 28)),
        (Block(gate=F.relu), TOKENS),
        (Block(norm=nn.LayerNorm), TOKENS),
        (Block(norm=lambda width: RMSNorm(width, 1.0)), TOKENS),
        (nn.TransformerEncoderLayer(16, 4, 32, norm_first=True, batch_first=True), torch.randn(2, 5, 16)),
        (Decoder(), torch.randint(0, 20, (2, 5))),
        (conv_pair(nn.ChannelShuffle(2)).to(memory_format=torch.channels_last), images()),
    ],
    ids=["resnet20", "mobilenetv2", "reglu", "layer_norm", "gemma", "encoder", "decoder", "channels_last"],
)
def test_moving_factors_changes_no_output(model: nn.Module, inputs) -> None:
    check_preserved(Given(model, inputs))


def test_moving_factors_changes_no_output_of_llama() -> None:
    check_preserved(tiny_llama())


def test_in_bfloat16_rescaled_weights_are_as_good_as_the_original_ones() -> None:
    task = tiny_llama(torch.bfloat16)
    wide = simulate(Given(copy.deepcopy(task.model).float(), task.example_input))
    exact = outputs(wide, task.example_input)
    simulated = simulate(task)
    before = relative_error(outputs(simulated, task.example_input), exact)
    rescaling = Rescaling(simulated)
    for site in find_sites(simulated, task):
        rescaling.move(site, random_factors(site))
    after = relative_error(outputs(rescaling.applied(task), task.example_input), exact)
    assert before > 1e-3, "the rounding of this type"
    assert after < 1.5 * before


def test_powers_of_two_change_no_bit_even_in_bfloat16() -> None:
    task = tiny_llama(torch.bfloat16)
    simulated = simulate(task)
    before = outputs(simulated, task.example_input)
    rescaling = Rescaling(simulated)
    for site in find_sites(simulated, task):
        rescaling.move(site, random_factors(site).log2().round().exp2())
    for one, other in zip(outputs(rescaling.applied(task), task.example_input), before, strict=True):
        assert torch.equal(one, other)


def test_memory_format_is_kept() -> None:
    task = Given(conv_pair(F.relu, channels=8).to(memory_format=torch.channels_last), images())
    simulated = simulate(task)
    rescaling = Rescaling(simulated)
    for site in find_sites(simulated, task):
        rescaling.move(site, random_factors(site))
    weight = rescaling.applied(task).weight("after")
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_moving_back_restores() -> None:
    task = Given(conv_pair(F.relu), images())
    simulated = simulate(task)
    (site,) = find_sites(simulated, task)
    rescaling, factors = Rescaling(simulated), random_factors(site)
    rescaling.move(site, factors)
    rescaling.move(site, 1 / factors)
    before = parameters(simulated)
    for name, value in rescaling.tensors().items():
        torch.testing.assert_close(value, before[name])


def test_only_sites_whose_readers_are_all_quantized() -> None:
    task = Given(Block(), TOKENS)
    simulated = simulate(task)
    sites = find_sites(simulated, task)
    policy = uniform(simulated, "int4")
    assert len(quantized_sites(sites, policy)) == 4
    some = Policy.from_dict(policy.to_dict() | {"k": "float", "down": "float/uint8", "o": "float"})
    assert [site.producer for site in quantized_sites(sites, some)] == ["second", "up"]
    assert quantized_sites(sites, {}) == []


def test_sites_are_the_same_every_time() -> None:
    task = tiny_llama()
    one, two = (find_sites(simulate(task), task) for _ in range(2))
    assert [site.producer for site in one] == [site.producer for site in two]
    for site, same in zip(one, two, strict=True):
        assert all(torch.equal(site.columns[reader], same.columns[reader]) for reader in site.readers)
