"""Rows that share a scale: which values they hold, and that they give the tensor back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensors import weights
from torch import Tensor

from hwmodels import Format
from search.quantize.grouping import to_groups


def oracle(tensor: Tensor, format: Format, axis: int) -> list[list[float]]:
    """The definition, value by value: channels in turn, each cut into groups."""
    if format.granularity == "tensor":
        return [tensor.movedim(axis, 0).reshape(-1).tolist()]
    channels = [tensor.select(axis, index).reshape(-1).tolist() for index in range(tensor.shape[axis])]
    if format.granularity != "group":
        return channels
    return [row[start : start + format.group] for row in channels for start in range(0, len(row), format.group)]


@pytest.mark.parametrize("name", ["int4", "int4-tensor", "int4-channel", "int4-g1", "int4-g4", "int4-g7", "int4-g1000"])
@given(drawn=weights())
def test_rows_are_groups_of_values_in_order(name: str, drawn: tuple[Tensor, int]) -> None:
    tensor, axis = drawn
    format = Format.parse(name)
    groups = to_groups(tensor, format, axis)
    real = groups.mask if groups.mask is not None else torch.ones_like(groups.rows, dtype=torch.bool)
    assert [row[mask].tolist() for row, mask in zip(groups.rows, real, strict=True)] == oracle(tensor, format, axis)
    assert not groups.rows[~real].any()
    assert len(groups.rows) == format.groups(tensor.shape, axis)
    if groups.mask is not None:
        assert not groups.mask.all()


@given(weights(), st.sampled_from(["int4", "int4-tensor", "int4-g3", "int4-g8", "codebook4"]))
def test_rows_give_the_tensor_back_in_its_layout(drawn: tuple[Tensor, int], name: str) -> None:
    tensor, axis = drawn
    groups = to_groups(tensor, Format.parse(name), axis)
    restored = groups.restore(groups.rows * 2)
    assert torch.equal(restored, tensor * 2)
    assert restored.stride() == tensor.stride()


@pytest.mark.parametrize("name", ["int4", "int4-tensor", "int4-g8", "int4-g5"])
def test_channels_last_stays_channels_last(name: str) -> None:
    weight = torch.randn(6, 4, 3, 3).to(memory_format=torch.channels_last)
    groups = to_groups(weight, Format.parse(name), 0)
    restored = groups.restore(groups.rows.clone())
    assert torch.equal(restored, weight)
    assert restored.is_contiguous(memory_format=torch.channels_last)


def test_rows_of_a_plain_weight_are_a_view() -> None:
    weight = torch.randn(6, 32)
    for name in ("int4", "int4-tensor", "int4-g16"):
        assert to_groups(weight, Format.parse(name), 0).rows.data_ptr() == weight.data_ptr()


def test_a_slice_of_a_larger_tensor_keeps_its_values() -> None:
    weight = torch.randn(6, 32)[::2, 1::3]
    groups = to_groups(weight, Format.parse("int4-g4"), -1)
    assert torch.equal(groups.restore(groups.rows), weight)


def test_a_single_number_is_one_group() -> None:
    for name in ("int4", "int4-tensor", "int4-g4"):
        groups = to_groups(torch.tensor(3.0), Format.parse(name))
        assert groups.rows.tolist() == [[3.0]]
        assert groups.restore(groups.rows).shape == ()


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0,)])
@pytest.mark.parametrize("name", ["int4", "int4-tensor", "int4-g4"])
def test_an_empty_tensor_stays_empty(shape: tuple[int, ...], name: str) -> None:
    format = Format.parse(name)
    groups = to_groups(torch.zeros(shape), format)
    assert groups.restore(groups.rows).shape == shape
    assert len(groups.rows) == format.groups(shape)


def test_gradients_flow_through_padding() -> None:
    weight = torch.randn(3, 5, requires_grad=True)
    groups = to_groups(weight, Format.parse("int4-g2"))
    (groups.restore(groups.rows * 3)).sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.full((3, 5), 3.0))
