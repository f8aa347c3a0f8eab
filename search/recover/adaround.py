"""AdaRound: for each weight it is learned whether it goes up or down on its grid, so that the layer's output is kept.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020 (arXiv 2004.10568): a weight is
`lower + h (upper - lower)` between its two neighbours on the grid, with `h` a rectified sigmoid of a variable that Adam
moves, and the sum of `1 - |2 h - 1|^beta` drives every `h` to 0 or 1 while beta falls. Two things differ from the
paper. Each channel's error counts relative to that of nearest rounding, so that one strength of the regulariser suits
all layers and channels. And any grid will do, as only the neighbours matter: minifloats and codebooks are learned like
integers, and a weight beyond the grid's end chooses between its last two values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hwmodels import Format, Precision
from search.errors import ConfigError, DataError
from search.quantize.formats import Parameters, decode, quantize_rows
from search.quantize.grouping import to_groups
from search.quantize.minifloat import magnitudes
from search.quantize.simulate import QuantizedModel
from search.recover.stages import float_biases, last_of, rounded_layers, stages, weight_format
from search.recover.statistics import Sample
from search.recover.unfold import as_matrix, channel_axis, count_rows, from_matrix, output_rows, patches
from search.recover.watch import watch
from search.tasks.task import Task

STRETCH_LOW, STRETCH_HIGH = -0.1, 1.1  # the sigmoid is stretched to this, then clamped to [0, 1]
LEARNING_RATE = 0.1
REGULARISATION = 3.0  # against the mean relative error, which nearest rounding has at 1
WARM_UP = 0.2  # share of the steps without regulariser
BETA_FIRST, BETA_LAST = 20.0, 2.0


@dataclass(frozen=True)
class Learning:
    """How long a layer's rounding is learned: steps of Adam, rows drawn for each, and the seed they are drawn with."""

    steps: int = 1000
    batch: int = 64
    seed: int = 0


def adaround(
    simulated: QuantizedModel,
    policy: Mapping[str, Precision],
    task: Task,
    reference: QuantizedModel | None = None,
    *,
    steps: int = 1000,
    samples: int = 4096,
    batch: int = 64,
    seed: int = 0,
) -> QuantizedModel:
    """Returns a copy whose quantized linear layers and convolutions hold weights rounded up or down as is learned.

    Layer after layer in execution order: inputs come from the network quantized and rounded so far, the outputs to keep
    from the float network. Where the two run a layer on differing numbers of positions, as when experts are routed,
    kept is what the layer's float weight makes of the quantized inputs. Layers that do not depend on each other share a
    pass. What follows a layer, such as its activation function, is not looked at. The new weights lie on the format's
    grid, whose scales stay. A channel that would end up worse than with nearest rounding gets that. Left alone are the
    layers that `rounded_layers` leaves out, and those that no sample reaches. Memory holds `samples` rows of every
    layer's output, and of the inputs of layers that share a pass.

    Args:
        simulated: Has the network; it is not altered.
        policy: The precisions to repair.
        task: Gives the calibration data.
        reference: Has the float network whose outputs are to be kept, and is left in float; by default `simulated`.
            Needed where an earlier repair altered weights or biases of `simulated`.
        steps: Steps of Adam per layer.
        samples: Positions of the layer's output that are learned from, drawn at random from the calibration split.
        batch: Positions per step.
        seed: Of the positions and batches.

    Raises:
        ConfigError: If `steps`, `samples` or `batch` is not positive.
        DataError: If a layer reads or returns NaN or infinite values.
    """
    if min(steps, samples, batch) < 1:
        raise ConfigError(f"adaround takes positive steps, samples and batch, got {steps=}, {samples=}, {batch=}")
    repaired, learning = simulated.fork(), Learning(steps, batch, seed)
    repaired.repair_with("none")  # what is learned makes up for the inputs' errors too
    layers = rounded_layers(repaired, policy)
    wanted = {name: Sample(samples, seed) for name in layers}
    looks = {name: _output_look(repaired.owner(name), sample) for name, sample in wanted.items()}
    watch(reference or repaired, {}, task, outputs=looks)
    for stage in stages(repaired.network, layers):
        seen = {name: Sample(samples, seed) for name in stage}
        looks = {name: _input_look(repaired.owner(name), sample) for name, sample in seen.items()}
        watch(repaired, policy, task, inputs=looks, until=last_of(repaired.network, stage))
        biases = float_biases(repaired, stage)
        for name, sample in seen.items():
            module, format = repaired.owner(name), weight_format(policy, name)
            weight, parameters = repaired.float_weight(name), repaired.weight_parameters(name, format)
            axis = repaired.network[name].channel_axis
            targets = _targets(module, weight, biases.get(name), sample, wanted.pop(name))
            if sample.rows is not None and targets is not None:
                if not (sample.rows.isfinite().all() and targets.isfinite().all()):
                    raise DataError(f"layer {name}: it reads or returns NaN or infinity; check the calibration data")
                rounded = adaround_weight(module, weight, sample.rows, targets, format, axis, parameters, learning)
                repaired.alter({repaired.weight_name(name): rounded}, keep_ranges=True)
    return repaired


def _input_look(module: nn.Module, sample: Sample) -> Callable[[Tensor], None]:
    return lambda x: sample.add(count_rows(module, x), partial(patches, module, x))


def _output_look(module: nn.Module, sample: Sample) -> Callable[[Tensor], None]:
    return lambda y: sample.add(y.numel() // y.shape[channel_axis(module)], partial(output_rows, module, y))


def _targets(module: nn.Module, weight: Tensor, bias: Tensor | None, seen: Sample, wanted: Sample) -> Tensor | None:
    """What a layer's products should be for the input patches seen; None if there are none."""
    if seen.rows is None or wanted.rows is None or seen.batches != wanted.batches:
        return None if seen.rows is None else seen.rows @ as_matrix(module, weight.float()).mT
    return wanted.rows if bias is None else wanted.rows - bias.float().view(len(wanted.rows), 1, -1)


def adaround_weight(
    module: nn.Module,
    weight: Tensor,
    inputs: Tensor,
    targets: Tensor,
    format: Format,
    axis: int,
    parameters: Parameters,
    learning: Learning,
) -> Tensor:
    """Returns a layer's weight rounded onto its format's grid, of its own shape and type.

    Args:
        module: The linear layer or convolution.
        weight: Its float weight.
        inputs: Patches of its input, shape `(groups, rows, fan_in)`.
        targets: What its products with them should be, bias not added, shape `(groups, rows, channels of one group)`.
        format: The weight's format, of 8 bits at most.
        axis: Of the weight's output channels.
        parameters: What places the format on the weight.
        learning: How long to learn.
    """
    groups = to_groups(weight.float(), format, axis)
    below, above = neighbours(groups.rows, format, parameters)
    nearest = quantize_rows(groups.rows, format, parameters)
    matrix, lower, upper, nearest = (
        as_matrix(module, groups.restore(rows)) for rows in (groups.rows, below, above, nearest)
    )
    error = _squared_error(nearest, inputs, targets)
    importance = torch.where(error > 0, 1 / error, 0.0)
    is_up = learn_rounding(matrix, lower, upper, inputs, targets, importance, learning)
    rounded = torch.where(is_up, upper, lower)
    is_worse = _squared_error(rounded, inputs, targets) > error
    return from_matrix(module, torch.where(is_worse.mT, nearest, rounded), like=weight)


def _squared_error(matrix: Tensor, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean squared output error of every channel, shape `(groups, 1, channels)`."""
    return (inputs @ matrix.mT - targets).square().mean(1, keepdim=True)


def learn_rounding(
    matrix: Tensor,
    lower: Tensor,
    upper: Tensor,
    inputs: Tensor,
    targets: Tensor,
    importance: Tensor,
    learning: Learning,
) -> Tensor:
    """Returns which weights go up, shape `(groups, channels, fan_in)`, bool.

    Args:
        matrix: The weights, shape `(groups, channels, fan_in)`; learning starts where they lie between neighbours.
        lower: The neighbours below.
        upper: The neighbours above.
        inputs: Shape `(groups, rows, fan_in)`.
        targets: Shape `(groups, rows, channels)`.
        importance: Of each channel's squared error, shape `(groups, 1, channels)`.
        learning: How long to learn.
    """
    generator = torch.Generator().manual_seed(learning.seed)
    with torch.inference_mode(False), torch.enable_grad():
        matrix, lower, upper, inputs, targets, importance = (
            tensor.clone() for tensor in (matrix, lower, upper, inputs, targets, importance)
        )
        gap = upper - lower
        share = torch.where(gap > 0, (matrix - lower) / gap, 0.0).clamp(0, 1)
        variable = torch.logit((share - STRETCH_LOW) / (STRETCH_HIGH - STRETCH_LOW)).requires_grad_()
        adam = torch.optim.Adam([variable], lr=LEARNING_RATE)
        for step in range(learning.steps):
            rows = torch.randint(inputs.shape[1], (learning.batch,), generator=generator).to(inputs.device)
            up = _rectified_sigmoid(variable)
            error = inputs[:, rows] @ (lower + up * gap).mT - targets[:, rows]
            loss = (error.square() * importance).mean()
            progress = (step / learning.steps - WARM_UP) / (1 - WARM_UP)
            if progress >= 0:
                beta = BETA_LAST + (BETA_FIRST - BETA_LAST) * 0.5 * (1 + math.cos(math.pi * progress))
                loss = loss + REGULARISATION * (1 - (2 * up - 1).abs() ** beta).mean()
            adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            adam.step()
        return _rectified_sigmoid(variable.detach()) >= 0.5


def _rectified_sigmoid(variable: Tensor) -> Tensor:
    return (torch.sigmoid(variable) * (STRETCH_HIGH - STRETCH_LOW) + STRETCH_LOW).clamp(0, 1)


def neighbours(rows: Tensor, format: Format, parameters: Parameters) -> tuple[Tensor, Tensor]:
    """Returns the grid's value at or below each value, and the next one up; at the ends, the grid's last two.

    Args:
        rows: Shape `(groups, values)`, float32.
        format: The grid, of 8 bits at most.
        parameters: What places it on each group.
    """
    codes = torch.tensor(_ascending_codes(format), dtype=torch.int32, device=rows.device)
    grid = decode(codes.expand(len(rows), -1), format, parameters).contiguous()
    above = torch.searchsorted(grid, rows.contiguous(), right=True).clamp_(1, grid.shape[1] - 1)
    return grid.gather(1, above - 1), grid.gather(1, above)


def _ascending_codes(format: Format) -> list[int]:
    """Lists a format's codes in the order of the values they stand for."""
    match format.grid:
        case "minifloat":
            count, sign_bit = len(magnitudes(format)), 1 << (format.bits - 1)
            return [*range(sign_bit + count - 1, sign_bit, -1), *range(count)]
        case "binary":
            return [-1, 1]
        case "ternary" | "ttq":
            return [-1, 0, 1]
        case "codebook" | "nf4":
            return list(range(1 << format.bits))
    return [-1, 1] if format.bits == 1 and format.signed else list(range(format.lowest, format.highest + 1))
