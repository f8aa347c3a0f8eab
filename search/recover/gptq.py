"""GPTQ: weights are rounded input by input, and what rounding one loses, those not yet rounded make up for.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2022 (arXiv
2210.17323): with the Hessian `2 X X^T` of a layer's squared output error over its calibration inputs X, the error of
one column is spread over the later ones by a row of the Cholesky factor of the inverse Hessian. The factor 2 cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hwmodels import Format, Precision
from search.errors import ConfigError, DataError
from search.quantize.formats import Parameters, quantize_rows
from search.quantize.grouping import to_groups
from search.quantize.simulate import QuantizedModel
from search.recover.stages import last_of, rounded_layers, stages, weight_format
from search.recover.statistics import Gram, matrix_error
from search.recover.unfold import as_matrix, from_matrix
from search.recover.watch import watch
from search.tasks.task import Task

LARGEST_DAMPING = 1.0
DAMPING_RAISE = 10.0

RoundColumn = Callable[[Tensor, Tensor], Tensor]


def gptq(
    simulated: QuantizedModel,
    policy: Mapping[str, Precision],
    task: Task,
    *,
    damping: float = 0.01,
    activation_order: bool = True,
    block: int = 128,
) -> QuantizedModel:
    """Returns a copy whose quantized linear layers and convolutions hold weights rounded by GPTQ.

    Layer after layer in execution order, on the calibration split's inputs as the network quantized and rounded so far
    passes them on; layers that do not depend on each other share a pass. The new weights lie on the format's grid,
    whose scales stay those of the float weights ("static groups"). A channel that would end up worse than with nearest
    rounding gets that. Left alone are the layers that `rounded_layers` leaves out, and those that no sample reaches.

    Args:
        simulated: Has the network; it is not altered.
        policy: The precisions to repair.
        task: Gives the calibration data.
        damping: Added to the Hessian's diagonal, relative to its mean. Where the Hessian cannot be factorised, it is
            raised tenfold, up to 1.
        activation_order: Whether inputs are taken in the order of decreasing energy rather than as they come.
        block: Columns after whose rounding the rest is corrected at once; results do not depend on it but for
            floating-point error.

    Raises:
        ConfigError: If `damping` or `block` is out of range.
        DataError: If the Hessian of a layer cannot be factorised even so, as with NaN among its inputs.
    """
    if not 0 < damping <= LARGEST_DAMPING or block < 1:
        raise ConfigError(f"gptq takes 0 < damping <= {LARGEST_DAMPING:g} and block >= 1, got {damping=} and {block=}")
    repaired = simulated.fork()
    for stage in stages(repaired.network, rounded_layers(repaired, policy)):
        for name, gram in _grams(repaired, policy, task, stage).items():
            module, format = repaired.owner(name), weight_format(policy, name)
            weight, parameters = repaired.float_weight(name), repaired.weight_parameters(name, format)
            axis = repaired.network[name].channel_axis
            try:
                rounded = gptq_weight(module, weight, gram, format, axis, parameters, damping, activation_order, block)
            except ValueError as error:
                raise DataError(f"layer {name}: {error}; check the calibration data and the model") from error
            repaired.alter({repaired.weight_name(name): rounded}, keep_ranges=True)
    return repaired


def _grams(
    repaired: QuantizedModel, policy: Mapping[str, Precision], task: Task, stage: list[str]
) -> dict[str, Tensor]:
    """Returns each layer's sum of `x @ x.T` over its input patches; layers that no sample reaches are left out."""
    grams = {name: Gram(repaired.owner(name)) for name in stage}
    looks = {name: gram.add for name, gram in grams.items()}
    watch(repaired, policy, task, inputs=looks, until=last_of(repaired.network, stage))
    return {name: gram.value for name, gram in grams.items() if gram.value is not None}


def gptq_weight(
    module: torch.nn.Module,
    weight: Tensor,
    gram: Tensor,
    format: Format,
    axis: int,
    parameters: Parameters,
    damping: float = 0.01,
    activation_order: bool = True,
    block: int = 128,
) -> Tensor:
    """Returns a layer's weight rounded onto its format's grid, of its own shape and type.

    Args:
        module: The linear layer or convolution.
        weight: Its float weight.
        gram: Sum of `x @ x.T` over its input patches, shape `(groups, fan_in, fan_in)`.
        format: The weight's format.
        axis: Of the weight's output channels.
        parameters: What places the format on the weight.
        damping: As of `gptq`.
        activation_order: As of `gptq`.
        block: As of `gptq`.

    Raises:
        ValueError: If `gram` cannot be factorised.
    """
    groups = to_groups(weight.float(), format, axis)
    numbers = torch.arange(len(groups.rows), device=weight.device).unsqueeze(1).expand_as(groups.rows)
    scale_groups = as_matrix(module, groups.restore(numbers))
    every = torch.arange(len(scale_groups), device=weight.device)

    def round_column(values: Tensor, columns: Tensor) -> Tensor:
        chosen = scale_groups[every, :, columns].reshape(-1)
        placed = {name: value[chosen] if value.dim() else value for name, value in parameters.items()}
        return quantize_rows(values.reshape(-1, 1), format, placed).reshape(values.shape)

    matrix = as_matrix(module, weight.float())
    nearest = as_matrix(module, groups.restore(quantize_rows(groups.rows, format, parameters)))
    rounded = gptq_matrix(matrix, gram, round_column, damping, activation_order, block)
    is_worse = matrix_error(rounded - matrix, gram) > matrix_error(nearest - matrix, gram)
    return from_matrix(module, torch.where(is_worse.unsqueeze(-1), nearest, rounded), like=weight)


def gptq_matrix(
    matrix: Tensor,
    gram: Tensor,
    round_column: RoundColumn,
    damping: float = 0.01,
    activation_order: bool = True,
    block: int = 128,
) -> Tensor:
    """Returns matrices rounded column by column, each column's error fed back into those that follow.

    An input that is always zero has no say: its column is rounded as it is.

    Args:
        matrix: Shape `(groups, channels, fan_in)`, float32.
        gram: Sum of `x @ x.T` over the inputs of each group, shape `(groups, fan_in, fan_in)`.
        round_column: Rounds one column of each group, shape `(groups, channels)`, given which of each it is, shape
            `(groups,)`.
        damping: Added to the diagonal, relative to its mean.
        activation_order: Whether to start with the inputs of the most energy.
        block: Columns rounded before all later ones are corrected.

    Raises:
        ValueError: If `gram` cannot be factorised.
    """
    energy = gram.diagonal(dim1=1, dim2=2)
    columns = energy.shape[1]
    order = (
        energy.argsort(dim=1, descending=True, stable=True)
        if activation_order
        else torch.arange(columns, device=gram.device).expand_as(energy)
    )
    ordered = gram.gather(1, order.unsqueeze(2).expand_as(gram)).gather(2, order.unsqueeze(1).expand_as(gram))
    feedback = inverse_factor(ordered, damping).to(matrix.dtype)
    left = matrix.gather(2, order.unsqueeze(1).expand_as(matrix))
    rounded = torch.empty_like(left)
    for start in range(0, columns, block):
        end = min(start + block, columns)
        errors = torch.empty_like(left[:, :, start:end])
        for column in range(start, end):
            rounded[:, :, column] = round_column(left[:, :, column], order[:, column])
            error = (left[:, :, column] - rounded[:, :, column]) / feedback[:, None, column, column]
            left[:, :, column:end] -= error.unsqueeze(2) * feedback[:, None, column, column:end]
            errors[:, :, column - start] = error
        left[:, :, end:] -= errors @ feedback[:, start:end, end:]
    return torch.empty_like(rounded).scatter_(2, order.unsqueeze(1).expand_as(rounded), rounded)


def inverse_factor(gram: Tensor, damping: float = 0.01) -> Tensor:
    """Returns the upper Cholesky factor of the inverse of the damped `gram`, for each group, in float64.

    A zero on the diagonal, an input that is never seen, becomes the diagonal's mean. Where a group cannot be
    factorised, the damping is raised tenfold, at most to 1.

    Raises:
        ValueError: If `gram` is not finite, or cannot be factorised at a damping of 1.
    """
    if not gram.isfinite().all():
        raise ValueError("its Hessian holds NaN or infinite values")
    diagonal = gram.diagonal(dim1=1, dim2=2).double()
    mean = diagonal.mean(1, keepdim=True)
    mean = torch.where(mean > 0, mean, 1.0)
    seen = torch.where(diagonal > 0, diagonal, mean)
    damped = gram.double().clone()
    while True:
        damped.diagonal(dim1=1, dim2=2).copy_(seen + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            upper: Tensor
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed.any():
                return upper
        if damping >= LARGEST_DAMPING:
            raise ValueError(f"its Hessian cannot be factorised, even damped by {damping:g} of its mean diagonal")
        damping = min(damping * DAMPING_RAISE, LARGEST_DAMPING)
