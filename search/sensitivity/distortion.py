"""How far choices move what they quantize, and what the layer makes of it: scores that know nothing of the loss.

All are taken at the float network, over the calibration split; sums over batches are all that is kept.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from search.errors import DataError
from search.quantize.observe import first_tensor
from search.quantize.simulate import QuantizedModel
from search.sensitivity.changes import Changes, Site, quantized_at
from search.sensitivity.choices import Choice
from search.tasks.task import Task, tensors_in
from search.trace import slow_attention

EXACT_DB = 150.0
"""What a choice without any error counts as: about the noise of float32 itself."""


@dataclass(frozen=True)
class Distortion:
    """Scores over flat positions of choices, all of shape `(K,)`.

    A decision about several layers takes the sum of their errors, for `sqnr_db` over the sum of their squares, and the
    mean of their relative output errors. A weight or tensor that several of them share counts once.

    Attributes:
        weight_error: Squared error: of weights summed over values, of inputs summed over a sample's values and averaged
            over samples.
        sqnr_db: Signal to quantization noise, `10 log10(sum of squares / squared error)`, higher is better; at most
            150.
        output_error: Squared error of a layer's outputs over their squares, all else in float; repaired biases are
            included. Zero where it was not asked for.
    """

    weight_error: np.ndarray
    sqnr_db: np.ndarray
    output_error: np.ndarray


def distortion(
    task: Task, simulated: QuantizedModel, choices: Sequence[Choice], with_outputs: bool = True
) -> Distortion:
    """Measures the errors of choices.

    Args:
        task: Gives the data.
        simulated: The network, calibrated; left in float.
        choices: What is measured; those in float have no error.
        with_outputs: Whether layers are run with every choice, for `output_error`.

    Raises:
        DataError: If the calibration split is empty, or an error is not finite.
    """
    meter = _Meter(simulated, choices, with_outputs)
    model = simulated.apply({})
    samples = 0
    with torch.inference_mode(False), torch.no_grad(), slow_attention(), meter.watching():
        for batch in task.batches("calibration"):
            meter.begin()
            samples += len(task.outputs(model, batch))
    if not samples:
        raise DataError("the calibration split is empty; errors are measured on at least one batch")
    found = meter.result(samples)
    wrong = np.flatnonzero(~np.isfinite(found.weight_error + found.output_error))
    if len(wrong):
        raise DataError(f"the error of {choices[wrong[0]]} is not finite; weights and calibration data must be")
    return found


class _Meter:
    """Adds up squared errors and squares, choice by choice, while the float network runs."""

    def __init__(self, simulated: QuantizedModel, choices: Sequence[Choice], with_outputs: bool) -> None:
        self._simulated, self._with_outputs = simulated, with_outputs
        self._formats = [choice.format for choice in choices]
        self._is_input = np.array([choice.decision.side == "input" for choice in choices])
        self._changes = Changes(simulated, choices, {})
        self._sums = np.zeros((len(choices), 2))  # squared error and squares, of weights or inputs
        self._of_outputs: list[defaultdict[nn.Module, np.ndarray]] = [defaultdict(lambda: np.zeros(2)) for _ in choices]
        self._calls: Counter[str] = Counter()
        self._inputs: defaultdict[str, list[int]] = defaultdict(list)  # layer -> positions of its input choices
        self._readers: dict[tuple[int, str], str] = {}  # position and tensor -> the layer with which it is counted
        for position, choice in enumerate(choices):
            if choice.decision.side == "input" and not choice.format.is_float:
                for layer in choice.decision.layers:
                    self._inputs[layer].append(position)
                    for tensor in simulated.network[layer].reads:
                        self._readers.setdefault((position, tensor), layer)

    def begin(self) -> None:
        """Gets ready for a pass."""
        self._calls.clear()

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The context in which passes are measured; weights are before they begin."""
        simulated = self._simulated
        weights = {simulated.weight_name(layer) for layer in simulated.network.names}
        for name in weights & self._changes.parameters.keys():
            square = _squares(simulated.model.get_parameter(name))
            for position, change in zip(self._changes.parameters[name], self._changes.of(name), strict=True):
                self._sums[position] += _squares(change), square
        owners: defaultdict[nn.Module, list[str]] = defaultdict(list)
        for layer in simulated.network.names:
            owners[simulated.owner(layer)].append(layer)
        with ExitStack() as hooks:
            for owner, layers in owners.items():
                look = partial(self._look, layers)
                hooks.callback(owner.register_forward_hook(look, with_kwargs=True, prepend=True).remove)
            yield

    def _look(
        self, layers: Sequence[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Looks at one call of a module, which runs one layer or several."""
        if self._with_outputs:
            for position, changed in self._changed_parameters(layers).items():
                with _replaced(changed):
                    self._compare(position, module, module.forward(*args, **kwargs), output)
        for layer in layers:
            if not self._inputs[layer]:
                continue
            x = first_tensor(args, kwargs)
            square = _squares(x)
            for position in self._inputs[layer]:
                quantized = quantized_at(self._simulated, Site(layer), self._formats[position], x)
                if self._is_counted(position, layer):
                    self._sums[position] += _squares(quantized - x), square
                if self._with_outputs:
                    given = (quantized, *args[1:]) if args else ()
                    named = kwargs if args else kwargs | {next(iter(kwargs)): quantized}
                    self._compare(position, module, module.forward(*given, **named), output)
            self._calls[layer] += 1

    def _is_counted(self, position: int, layer: str) -> bool:
        """Whether the error of what a layer reads now is its own to count, and not that of another reader."""
        reads, call = self._simulated.network[layer].reads, self._calls[layer]
        return call >= len(reads) or self._readers[position, reads[call]] == layer

    def _changed_parameters(self, layers: Sequence[str]) -> dict[int, list[tuple[nn.Parameter, Tensor]]]:
        """For every choice that changes parameters of these layers, the parameters and their values then."""
        simulated = self._simulated
        names = [name for layer in layers for name in (simulated.weight_name(layer), simulated.bias_name(layer))]
        found: defaultdict[int, list[tuple[nn.Parameter, Tensor]]] = defaultdict(list)
        for name in dict.fromkeys(names):
            for row, position in enumerate(self._changes.parameters.get(name or "", [])):
                parameter = simulated.model.get_parameter(name or "")
                value = (parameter.float() + self._changes.of(name or "")[row]).to(parameter.dtype)
                found[position].append((parameter, value))
        return found

    def _compare(self, position: int, module: nn.Module, changed: Any, output: Any) -> None:
        now, before = (
            next(tensor for tensor in tensors_in(value) if tensor.is_floating_point()) for value in (changed, output)
        )
        self._of_outputs[position][module] += _squares(now - before), _squares(before)

    def result(self, samples: int) -> Distortion:
        """The scores over so many samples."""
        error, square = self._sums.T
        is_exact = error <= square * 10 ** (-EXACT_DB / 10)
        sqnr = 10 * np.log10(np.divide(square, error, out=np.ones_like(error), where=~is_exact))
        return Distortion(
            np.where(self._is_input, error / samples, error),
            np.where(is_exact, EXACT_DB, sqnr),
            np.array([_mean_ratio([*outputs.values()]) for outputs in self._of_outputs]),
        )


@contextmanager
def _replaced(values: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Parameters hold other values while the context lasts."""
    kept = [parameter.data for parameter, _ in values]
    for parameter, value in values:
        parameter.data = value
    try:
        yield
    finally:
        for (parameter, _), value in zip(values, kept, strict=True):
            parameter.data = value


def _squares(x: Tensor) -> float:
    return float(x.detach().float().square().sum(dtype=torch.float64))


def _mean_ratio(sums: Sequence[np.ndarray]) -> float:
    """The mean of errors over squares; outputs that are all zero without the error count as an error of one."""
    ratios = [error / square if square else float(error > 0) for error, square in sums]
    return float(np.mean(ratios)) if ratios else 0.0
