"""What is sent backward from the outputs: random vectors whose mean square is the metric, and slopes of losses.

Every sample has random numbers of its own, from the seed and its place in the split: results do not depend on how
samples are batched, nor on which process takes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from search.errors import ConfigError, UnsupportedError, closest
from search.sensitivity.tangent import belongs, root_of_curvature
from search.tasks.task import Task

Kind = Literal["labels", "signs"]
KINDS: tuple[Kind, ...] = get_args(Kind)


def draw_cotangents(
    task: Task, outputs: Tensor, samples: Iterable[int], draws: int, seed: int, kind: Kind = "labels"
) -> list[Tensor]:
    """Returns random vectors `u` with `E[u u'] = H`, the second derivative of the divergence, sample by sample.

    `labels` are drawn from the softmax of the outputs: `u` is the slope of their log-likelihood, over the square root
    of the number of rows of a sample, as rows are independent. `signs` are those of the metric's coordinates, `u` their
    sum with random signs; this is how outputs are treated that are no logits.

    Args:
        task: Says how outputs are compared.
        outputs: Of the network, shape `(samples, ...)`, detached.
        samples: Numbers of the samples in the split.
        draws: How many vectors.
        seed: Of the random numbers.
        kind: `labels` or `signs`.

    Returns:
        `draws` tensors in the shape of the outputs, float32 or finer.

    Raises:
        ConfigError: If `kind` is unknown.
        UnsupportedError: If the task's divergence has no second derivative.
    """
    if kind not in KINDS:
        raise ConfigError(f"kind={kind!r} is unknown{closest(str(kind), KINDS)}; allowed: {', '.join(KINDS)}")
    generators = [
        torch.Generator().manual_seed(int(np.random.SeedSequence((seed, sample)).generate_state(1)[0]))
        for sample in samples
    ]
    if kind == "labels" and _is_softmax(task, outputs):
        return _labels(outputs, draws, generators)
    if belongs(task, "tangent"):
        return _signs(task, outputs, draws, generators)
    shape = outputs.flatten(1).shape[1:]
    signs = _random_signs(draws, shape, generators).to(outputs.device)
    return [root_of_curvature(task.divergence, outputs, r.view_as(outputs)).view_as(outputs) for r in signs]


def _is_softmax(task: Task, outputs: Tensor) -> bool:
    """Whether the task compares outputs as logits: tried out on a random change of the first sample."""
    if not belongs(task, "tangent") or outputs.dim() < 2:
        return False
    first = outputs[:1].double()
    change = torch.randn(first.shape, generator=torch.Generator().manual_seed(0), dtype=first.dtype).to(first.device)
    own, default = task.tangent(first, change), Task.tangent(task, first, change)
    return own.shape == default.shape and torch.allclose(own.double(), default, rtol=1e-4, atol=1e-8)


def _labels(outputs: Tensor, draws: int, generators: Sequence[torch.Generator]) -> list[Tensor]:
    p = outputs.double().softmax(-1)
    rows = p[0, ..., 0].numel()
    chances = torch.stack([torch.rand((draws, rows), generator=g, dtype=torch.float64) for g in generators], 1)
    cumulated = p.cumsum(-1)
    ends = cumulated[..., -1:]
    found = []
    for chance in chances.to(p.device):
        label = torch.searchsorted(cumulated, chance.view_as(ends) * ends).clamp_max(p.shape[-1] - 1)
        found.append((torch.zeros_like(p).scatter_(-1, label, 1.0) - p).float() / rows**0.5)
    return found


def _signs(task: Task, outputs: Tensor, draws: int, generators: Sequence[torch.Generator]) -> list[Tensor]:
    with torch.enable_grad():
        change = torch.zeros_like(outputs, dtype=torch.promote_types(outputs.dtype, torch.float32), requires_grad=True)
        coordinates = task.tangent(outputs, change)
    if not coordinates.requires_grad:
        raise UnsupportedError(
            f"`tangent` of task {task.name} cannot be differentiated by the change; compute it with torch functions"
        )
    signs = _random_signs(draws, coordinates.shape[1:], generators).to(coordinates)
    return [torch.autograd.grad(coordinates, change, r, retain_graph=True)[0] for r in signs]


def _random_signs(draws: int, shape: Sequence[int], generators: Sequence[torch.Generator]) -> Tensor:
    """Random numbers of 1 and -1, shape `(draws, samples, *shape)`."""
    drawn = [torch.randint(2, (draws, *shape), generator=generator) for generator in generators]
    return torch.stack(drawn, 1) * 2 - 1


def loss_slope(task: Task, outputs: Tensor, batch: Any) -> Tensor | None:
    """Returns the derivative of every sample's loss by its outputs, in their shape; None where there are no labels.

    Args:
        task: Its `loss`.
        outputs: Shape `(samples, ...)`, detached.
        batch: The samples.
    """
    with torch.enable_grad():
        leaf = outputs.float().requires_grad_()
        try:
            loss = task.loss(leaf, batch)
        except UnsupportedError:
            return None
        return torch.autograd.grad(loss.sum(), leaf)[0]
