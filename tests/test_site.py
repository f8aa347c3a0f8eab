"""Sites against what tracing finds: multiplications, values read and written, weights, products; of every kind."""

from __future__ import annotations

import math
from typing import Any

import networks
import pytest
import torch
from torch import Tensor, nn

from hwmodels import Gemm, Layer, Network, Site, Workload
from hwmodels.capability import LAYER_KINDS
from hwmodels.site import mean_size
from search.trace import trace

BATCH = 3


class SelfAttention(nn.Module):
    """PyTorch's own attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


class Gated(nn.Module):
    """A GRU, of which a sequence of outputs is wanted."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


class TwoSizes(nn.Module):
    """One convolution, called on a picture and on half of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.pool(self.conv(x)))


class CrossAttention(nn.Module):
    """PyTorch's own attention, of 5 queries to 9 keys."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.attention(x, y, y)[0]


MODELS: dict[str, tuple[nn.Module, Any]] = {
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, groups=2), torch.zeros(2, 4, 9)),
    "conv2d": (nn.Conv2d(3, 8, 3, stride=2, padding=1), torch.zeros(2, 3, 13, 11)),
    "conv2d of rectangles": (nn.Conv2d(3, 8, (1, 5), stride=(2, 1), dilation=(1, 2)), torch.zeros(2, 3, 13, 11)),
    "depthwise": (nn.Conv2d(8, 8, 3, padding=1, groups=8), torch.zeros(2, 8, 7, 6)),
    "depthwise with two filters": (nn.Conv2d(8, 16, 3, groups=8), torch.zeros(2, 8, 7, 6)),
    "conv3d": (nn.Conv3d(2, 4, (1, 2, 3), stride=(1, 2, 1)), torch.zeros(1, 2, 4, 6, 5)),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2), torch.zeros(2, 4, 9)),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1), torch.zeros(2, 4, 5, 7)),
    "conv_transpose3d": (nn.ConvTranspose3d(2, 3, 2, stride=2), torch.zeros(1, 2, 2, 3, 2)),
    "depthwise transposed": (nn.ConvTranspose2d(4, 4, 3, groups=4), torch.zeros(2, 4, 5, 6)),
    "depthwise transposed with two filters": (nn.ConvTranspose2d(4, 8, 3, groups=4), torch.zeros(2, 4, 5, 6)),
    "linear": (nn.Linear(4, 3), torch.zeros(2, 5, 7, 4)),
    "self-attention": (SelfAttention(), torch.zeros(2, 5, 8)),
    "gru": (Gated(), torch.zeros(3, 4, 6)),
    "decoder": (networks.Decoder(), torch.zeros(2, 8, dtype=torch.long)),
    "tagger": (networks.Tagger(), torch.zeros(2, 7, dtype=torch.long)),
    "recurrent": (networks.Recurrent(), torch.zeros(2, 4)),
    "in place": (networks.InPlace(), torch.zeros(2, 1, 4, 4)),
    "two inputs": (
        networks.TwoInputs(),
        {"image": torch.zeros(2, 1, 6, 6), "ids": torch.zeros(2, dtype=torch.long)},
    ),
}


@pytest.fixture(scope="module")
def traced() -> dict[str, Network]:
    """Every model as a network; a lone layer goes into a container that gives it a name."""
    return {
        name: trace((model if type(model).__module__ == "networks" else nn.Sequential(model)).eval(), example)
        for name, (model, example) in MODELS.items()
    }


def one(network: Network) -> tuple[Layer, Site]:
    """A network's only layer and its site."""
    (layer,) = network
    return layer, Site.of(layer, Workload(batch=BATCH))


def test_there_is_a_layer_of_every_kind(traced: dict[str, Network]) -> None:
    assert {layer.kind for network in traced.values() for layer in network} == set(LAYER_KINDS)


@pytest.mark.parametrize("name", MODELS)
def test_sites_do_what_their_layers_do(traced: dict[str, Network], name: str) -> None:
    for layer in traced[name]:
        site = Site.of(layer, Workload(batch=BATCH))
        assert site.macs * layer.calls == layer.macs * BATCH, layer.name
        assert mean_size(layer, site, Workload(batch=BATCH)) == 1, layer.name
        assert site.input_values == math.prod(layer.input_shape[1:]) * BATCH, layer.name
        assert site.output_values == math.prod(layer.output_shape[1:]) * BATCH, layer.name
        if layer.kind != "embedding":  # reads one row of its weights
            assert site.weight_values == layer.weight_count, layer.name
        assert site.gemm.m * site.gemm.n * site.gemm.k * site.gemm.groups == site.macs


@pytest.mark.parametrize("name", MODELS)
def test_sites_grow_with_the_batch(traced: dict[str, Network], name: str) -> None:
    for layer in traced[name]:
        single, several = (Site.of(layer, Workload(batch=batch)) for batch in (1, BATCH))
        assert several.batch == BATCH * single.batch
        for values in ("macs", "input_values", "output_values"):
            assert getattr(several, values) == BATCH * getattr(single, values), (layer.name, values)
        assert several.weight_values == single.weight_values
        assert several.gemm[1:] == single.gemm[1:]


@pytest.mark.parametrize(
    ("name", "gemm"),
    [
        ("conv1d", Gemm(BATCH * 4, 3, 2 * 3, 2)),
        ("conv2d", Gemm(BATCH * 7 * 6, 8, 3 * 9)),
        ("depthwise", Gemm(BATCH * 7 * 6, 1, 9, 8)),
        ("depthwise with two filters", Gemm(BATCH * 5 * 4, 2, 9, 8)),
        ("conv3d", Gemm(BATCH * 4 * 3 * 3, 4, 2 * 6)),
        ("conv_transpose1d", Gemm(BATCH * 9, 3 * 3, 2, 2)),
        ("conv_transpose2d", Gemm(BATCH * 5 * 7, 6 * 9, 4)),
        ("linear", Gemm(BATCH * 5 * 7, 3, 4)),
    ],
)
def test_products_are_those_kernels_run(traced: dict[str, Network], name: str, gemm: Gemm) -> None:
    layer, site = one(traced[name])
    assert site.gemm == gemm
    assert gemm.macs == BATCH * layer.macs


@pytest.mark.parametrize(
    ("name", "expected"),
    [(name, name.startswith("depthwise")) for name in MODELS if "conv" in name or "depthwise" in name],
)
def test_depthwise_is_told(traced: dict[str, Network], name: str, expected: bool) -> None:
    layer, site = one(traced[name])
    assert site.is_depthwise is layer.is_depthwise is expected


def test_embeddings_are_look_ups(traced: dict[str, Network]) -> None:
    site = Site.of(traced["decoder"]["embedding"], Workload(batch=BATCH))
    assert (site.batch, site.in_channels, site.out_channels) == (BATCH * 8, 1, 16)
    assert site.macs == 0


def test_layers_that_run_several_times_have_one_site(traced: dict[str, Network]) -> None:
    layer, site = one(traced["recurrent"])
    assert layer.calls == 3
    assert site == Site("linear", BATCH, 4, 4)


def test_calls_of_two_sizes_are_told_by_their_multiplications() -> None:
    layer, site = one(trace(TwoSizes().eval(), torch.zeros(2, 4, 8, 8)))
    assert (site.in_size, layer.calls) == ((8, 8), 2)
    assert mean_size(layer, site, Workload(batch=BATCH)) == (64 + 16) / 2 / 64


def test_parts_of_a_weight_that_read_sequences_of_two_lengths_count_whole_rows() -> None:
    examples = {"x": torch.zeros(1, 5, 8), "y": torch.zeros(1, 9, 8)}
    layer = trace(CrossAttention().eval(), examples)["attention.in_proj_weight"]
    site = Site.of(layer, Workload(batch=BATCH))
    rows = (5 + 2 * 9) / 3  # of the whole weight
    assert site.batch == BATCH * round(rows)
    assert mean_size(layer, site, Workload(batch=BATCH)) == pytest.approx(rows / round(rows))
