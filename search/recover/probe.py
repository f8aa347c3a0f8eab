"""Tries proposed sites out: which channel of the producer does each input channel of a reader hold, if any?

The producer's output is replaced by random positive values, once as they are and then with every channel times a power
of two, which numbers of any floating-point type carry exactly. Wherever the values go, through views, heads, pooling or
a product with another tensor, the input channels of the readers must grow by one such power throughout. As several runs
spell the number of each channel in powers, digit by digit, the growth also tells which channel it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hwmodels.network import Layer
from search.quantize.affine import per_channel
from search.quantize.observe import first_tensor
from search.quantize.simulate import QuantizedModel
from search.recover.scaling import Site
from search.tasks.task import call

EXPONENTS = torch.tensor([4, -4, 3, -3, 2, -2, 1, -1])
"""Of the powers of two that stand for the digits 0 to 7; a channel that was not scaled grows by none of them."""


@dataclass(frozen=True)
class Proposal:
    """A site as the data flow has it.

    Attributes:
        producer: A layer or a norm.
        channels: Number of its channels.
        axis: Where they are in its output.
        readers: The layers that read them, in execution order.
        offset: As `Site` has it.
    """

    producer: str
    channels: int
    axis: int
    readers: tuple[str, ...]
    offset: float = 0.0


def tried_out(simulated: QuantizedModel, proposals: list[Proposal], example_input: Any) -> Iterator[Site]:
    """Yields the sites among the proposals, in their order where no two have a reader in common."""
    while proposals:
        now, later = _apart(proposals)
        columns = _columns(simulated, now, example_input)
        for proposal in now:
            known = {reader: found for reader in proposal.readers if (found := columns[reader]) is not None}
            if len(known) == len(proposal.readers) and any((found >= 0).any() for found in known.values()):
                yield Site(proposal.producer, proposal.channels, known, proposal.offset)
        proposals = later


def _apart(proposals: list[Proposal]) -> tuple[list[Proposal], list[Proposal]]:
    """Splits proposals so that those tried now have no reader in common, which could not tell their powers apart."""
    now: list[Proposal] = []
    later: list[Proposal] = []
    busy: set[str] = set()
    for proposal in proposals:
        (later if busy.intersection(proposal.readers) else now).append(proposal)
        busy.update(proposal.readers)
    return now, later


def _columns(simulated: QuantizedModel, proposals: list[Proposal], example_input: Any) -> dict[str, Tensor | None]:
    """Returns the producer's channel behind every input channel of each reader, None where it is not one."""
    digits = 1
    while len(EXPONENTS) ** digits < max(proposal.channels for proposal in proposals):
        digits += 1
    clean = _inputs(simulated, proposals, example_input)
    growths: dict[str, list[Tensor | None]] = {reader: [] for reader in clean}
    for digit in range(digits):
        for reader, inputs in _inputs(simulated, proposals, example_input, digit, clean).items():
            layer = simulated.network[reader]
            growths[reader].append(_growth(_rows(clean[reader], layer), _rows(inputs, layer)))
    is_dead = {reader: (_rows(inputs, simulated.network[reader]) == 0).all(0) for reader, inputs in clean.items()}
    return {
        reader: _channels(growths[reader], is_dead[reader], proposal.channels)
        for proposal in proposals
        for reader in proposal.readers
    }


def _inputs(
    simulated: QuantizedModel,
    proposals: list[Proposal],
    example_input: Any,
    digit: int | None = None,
    clean: Mapping[str, list[Tensor]] | None = None,
) -> dict[str, list[Tensor]]:
    """Runs the model with random producer outputs; returns what every call of each reader was given.

    Args:
        simulated: The network, in float.
        proposals: Who produces what for whom.
        example_input: One batch of model inputs.
        digit: The digit of a channel's number by whose power the channel grows; None for none.
        clean: Inputs that readers compute with in place of those they are given, so that no power gets past them.
    """
    seen: dict[str, list[Tensor]] = {reader: [] for proposal in proposals for reader in proposal.readers}

    def produce(proposal: Proposal) -> Any:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            values = torch.rand(output.shape, generator=torch.Generator().manual_seed(0)).to(output) + 0.5
            if digit is None:
                return values
            powers = torch.exp2(EXPONENTS[_digit(proposal.channels, digit)]).to(output)
            return values * per_channel(powers, output, proposal.axis)

        return hook

    def read(reader: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            given = first_tensor(args, kwargs)
            seen[reader].append(given.clone())
            if clean is None or len(seen[reader]) > len(clean[reader]):
                return None
            x = clean[reader][len(seen[reader]) - 1]
            return (
                tuple(x if value is given else value for value in args),
                {key: x if value is given else value for key, value in kwargs.items()},
            )

        return hook

    with ExitStack() as hooks:
        for proposal in proposals:
            module = simulated.model.get_submodule(proposal.producer)
            hooks.callback(module.register_forward_hook(produce(proposal)).remove)
            for reader in proposal.readers:
                hook = simulated.owner(reader).register_forward_pre_hook(read(reader), with_kwargs=True)
                hooks.callback(hook.remove)
        call(simulated.model, example_input)
    return seen


def _growth(clean: Tensor, scaled: Tensor) -> Tensor | None:
    """Returns the exponent of the power of two by which each column grew; None if one grew by anything else.

    So it is for readers that were not reached, or not as often.

    Args:
        clean: A reader's input, shape `(positions, columns)`.
        scaled: The same with the producer's channels scaled.
    """
    if scaled.shape != clean.shape or not len(clean):
        return None
    peak = clean.abs().argmax(0, keepdim=True)
    largest = clean.gather(0, peak)
    exponent = (scaled.gather(0, peak) / largest).float().log2().round().nan_to_num(0)
    error = (scaled * torch.exp2(-exponent).to(scaled) - clean).abs()
    tolerance = torch.finfo(clean.dtype).eps ** 0.5
    return exponent[0].long().cpu() if (error <= tolerance * largest.abs()).all() else None


def _channels(growths: list[Tensor | None], is_dead: Tensor, channels: int) -> Tensor | None:
    """Reads the channel of every column from the exponents by which it grew, one per digit of the channel's number.

    Args:
        growths: What `_growth` found for each digit.
        is_dead: True for columns that held zeros only, behind a gate that was shut throughout.
        channels: Channels of the producer.

    Returns:
        Channels, int64 of shape `(columns,)`, -1 for columns of other origin. None where there is no such assignment;
        dead columns are taken to hold the channels in order, if all others do.
    """
    number = torch.zeros(len(is_dead), dtype=torch.int64)
    is_other = torch.ones_like(number, dtype=torch.bool)
    for digit, growth in enumerate(growths):
        if growth is None:
            return None
        matches = growth[:, None] == EXPONENTS
        number += torch.where(matches.any(1), matches.int().argmax(1), channels) * len(EXPONENTS) ** digit
        is_other &= growth == 0
    number[is_other] = -1
    if is_dead.any():
        order = torch.arange(len(number))
        number = torch.where(is_dead.cpu(), order, number)
        if not torch.equal(number, order):
            return None
    return number if (number < channels).all() else None


def _digit(channels: int, digit: int) -> Tensor:
    """Returns one digit of the number of every channel."""
    base = len(EXPONENTS)
    return torch.arange(channels).div(base**digit, rounding_mode="floor") % base


def _rows(inputs: list[Tensor], layer: Layer) -> Tensor:
    """Joins the inputs of all calls of a layer, shape `(positions, input channels)`; empty where there was no call."""
    axis = feature_axis(layer)
    if not inputs:
        return torch.empty(0, 0)
    return torch.cat([x.movedim(axis, -1).reshape(-1, x.shape[axis]) for x in inputs])


def feature_axis(layer: Layer) -> int:
    """The axis of the channels in what a layer reads and writes, counted from the last as samples may be missing."""
    return -1 - len(layer.kernel)
