"""Layers as matrix products: torch's own layers are the oracle."""

from __future__ import annotations

import pytest
import torch
from repairing import LAYERS
from torch import nn

from search.recover import unfold
from search.recover.unfold import as_matrix, count_rows, from_matrix, output_rows, patch_chunks, patches


@pytest.mark.parametrize("name", LAYERS)
def test_patches_times_matrix_are_the_layer(name: str) -> None:
    module, shape = LAYERS[name]
    x = torch.randn(shape)
    products = patches(module, x) @ as_matrix(module, module.weight).mT
    bias = module.bias.view(products.shape[0], 1, -1)
    torch.testing.assert_close(products + bias, output_rows(module, module(x)))
    assert count_rows(module, x) == products.shape[1]


@pytest.mark.parametrize("name", LAYERS)
def test_chosen_rows_are_those_rows(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, shape = LAYERS[name]
    x = torch.randn(shape)
    everything = patches(module, x)
    rows = torch.randperm(everything.shape[1])[:5]
    assert torch.equal(patches(module, x, rows), everything[:, rows])
    assert torch.equal(output_rows(module, module(x), rows), output_rows(module, module(x))[:, rows])
    monkeypatch.setattr(unfold, "CHUNK_VALUES", 1)  # one sample at a time
    chunks = list(patch_chunks(module, x))
    assert len(chunks) > 1 or len(x) == 1 or name == "one sample"
    assert torch.equal(torch.cat(chunks, 1), everything)


@pytest.mark.parametrize("name", LAYERS)
def test_matrix_and_weight_are_each_others_inverse(name: str) -> None:
    module, _ = LAYERS[name]
    weight = module.weight.detach().bfloat16()
    restored = from_matrix(module, as_matrix(module, weight).float(), like=weight)
    assert torch.equal(restored, weight)
    assert restored.dtype == torch.bfloat16


def test_memory_layout_is_kept() -> None:
    module = nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last)
    weight, x = module.weight.detach(), torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    assert from_matrix(module, as_matrix(module, weight), like=weight).stride() == weight.stride()
    torch.testing.assert_close(
        patches(module, x) @ as_matrix(module, weight).mT + module.bias, output_rows(module, module(x))
    )


def test_no_samples_have_no_patches() -> None:
    assert list(patch_chunks(nn.Linear(3, 2), torch.zeros(0, 3))) == []
    assert patches(nn.Conv2d(1, 2, 3), torch.zeros(0, 1, 5, 5)).shape == (1, 0, 9)
