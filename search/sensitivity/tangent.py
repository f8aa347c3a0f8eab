"""The metric on outputs: coordinates in which the squared length of a change is twice its divergence.

For logits this is the Fisher metric, which the task writes down. For a task with a divergence of its own it is the
Gauss-Newton form of that: the second derivative `H` of the divergence at the reference, a change's coordinates being
`H^1/2 change`. Only products of `H` with vectors are needed, sample by sample, for which automatic differentiation and
a few Lanczos steps do (Golub and Van Loan, Matrix Computations, 4th ed., 10.1).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from search.errors import UnsupportedError
from search.tasks.task import Task

LANCZOS_STEPS = 24
NEGLIGIBLE = 1e-10  # a residual this small beside the largest one is rounding: the Krylov space is exhausted

Divergence = Callable[[Tensor, Tensor], Tensor]


def belongs(task: Task, method: str) -> bool:
    """Whether a method that goes with the divergence still does: not if a subclass overrides the divergence alone."""
    lineage = type(task).__mro__

    def owner(name: str) -> int:
        return next(place for place, cls in enumerate(lineage) if name in vars(cls))

    return owner(method) <= owner("divergence")


def tangent(task: Task, reference: Tensor, change: Tensor) -> Tensor:
    """Returns the coordinates of a change of a task's outputs, shape `(samples, coordinates)`.

    Args:
        task: Its own `tangent` gives them, unless it overrides only `divergence`.
        reference: Outputs, shape `(samples, ...)`.
        change: What is added to them, same shape.

    Raises:
        UnsupportedError: If the task overrides `divergence`, but not `tangent`, and it has no second derivative.
    """
    if belongs(task, "tangent"):
        return task.tangent(reference, change)
    return root_of_curvature(task.divergence, reference, change)


def root_of_curvature(divergence: Divergence, reference: Tensor, change: Tensor, steps: int = LANCZOS_STEPS) -> Tensor:
    """Returns `H^1/2 change`, with `H` the second derivative of a divergence at the reference, sample by sample.

    Squared lengths are `change' H change` whatever the number of steps; products of two changes' coordinates are exact
    where a sample has no more outputs than there are steps, or `H` no more distinct eigenvalues, and approximate else.
    Memory: `steps` times the outputs in float64.

    Args:
        divergence: From a reference and outputs to one value per sample, smallest where both are equal.
        reference: Outputs, shape `(samples, ...)`.
        change: What is added to them, same shape.
        steps: Most products with `H`.

    Returns:
        Shape `(samples, outputs)`, float64.

    Raises:
        UnsupportedError: If the divergence has no second derivative, or none that is finite, or none but zero.
    """
    reference, change = reference.detach().double(), change.detach().double()
    if not change.isfinite().all():
        return torch.full_like(change.flatten(1), torch.nan)
    length = change.flatten(1).norm(dim=1, keepdim=True)
    times = _curvature(divergence, reference)
    vectors = [_unit(change.flatten(1), length)]
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    for _ in range(min(steps, vectors[0].shape[1])):
        product = times(vectors[-1])
        diagonal.append((product * vectors[-1]).sum(1))
        for _ in range(2):  # once more, since rounding in the first leaves a little of the others
            for vector in vectors:
                product = product - (product * vector).sum(1, keepdim=True) * vector
        residual = product.norm(dim=1, keepdim=True)
        residual = torch.where(residual > NEGLIGIBLE * max(map(_largest, (residual, *beside, *diagonal))), residual, 0)
        beside.append(residual[:, 0])
        vectors.append(_unit(product, residual))
        if not residual.any():
            break
    tridiagonal = torch.stack(diagonal, 1).diag_embed()
    if len(diagonal) > 1:
        inner = torch.stack(beside[:-1], 1)
        tridiagonal += inner.diag_embed(1) + inner.diag_embed(-1)
    if not tridiagonal.isfinite().all():
        raise UnsupportedError(_advice("has no finite second derivative where both outputs are equal"))
    values, bases = torch.linalg.eigh(tridiagonal)
    weights = torch.einsum("nij,nj,nj->ni", bases, values.clamp_min(0).sqrt(), bases[:, 0])
    krylov = torch.stack(vectors[: weights.shape[1]], 1)
    found: Tensor = length * torch.einsum("ni,nio->no", weights, krylov)
    rise = divergence(reference, reference + change) - divergence(reference, reference)
    if not found.any() and (rise > NEGLIGIBLE * length[:, 0] ** 2).any():
        raise UnsupportedError(_advice("has second derivative zero where both outputs are equal"))
    return found


def slope(task: Task, reference: Tensor, point: Tensor) -> Tensor:
    """Returns the derivative of every sample's divergence by its outputs at a point, in its shape, float64.

    Raises:
        UnsupportedError: If the divergence is computed without automatic differentiation.
    """
    with torch.enable_grad():
        leaf = point.detach().double().requires_grad_()
        distances = task.divergence(reference.detach().double(), leaf)
        if not distances.requires_grad:
            raise UnsupportedError(_advice("cannot be differentiated"))
        found: Tensor = torch.autograd.grad(distances.sum(), leaf)[0]
    return found


def _curvature(divergence: Divergence, reference: Tensor) -> Callable[[Tensor], Tensor]:
    """The product with the second derivative at the reference, of vectors of shape `(samples, outputs)`."""
    with torch.enable_grad():
        leaf = reference.clone().requires_grad_()
        distances = divergence(reference, leaf)
        if not distances.requires_grad:
            raise UnsupportedError(_advice("cannot be differentiated"))
        (gradient,) = torch.autograd.grad(distances.sum(), leaf, create_graph=True)
    if not gradient.requires_grad:
        raise UnsupportedError(_advice("has no second derivative"))

    def times(vectors: Tensor) -> Tensor:
        (product,) = torch.autograd.grad(gradient, leaf, vectors.view_as(leaf), retain_graph=True)
        return product.flatten(1)

    return times


def _unit(vectors: Tensor, length: Tensor) -> Tensor:
    """Vectors over their lengths; zero where that is zero."""
    return torch.where(length > 0, vectors / torch.where(length > 0, length, 1), 0)


def _largest(values: Tensor) -> float:
    return float(values.abs().max())


def _advice(problem: str) -> str:
    return (
        f"the task's divergence {problem}, so interactions cannot be derived from it; override `Task.tangent` "
        "to return coordinates in which a change's squared length is about twice its divergence"
    )


@dataclass(frozen=True)
class Projection:
    """A random projection under which products of vectors keep their mean: `E R R' = 1`.

    Every coordinate is added to or taken from one column drawn for it (count sketch: Charikar, Chen and Farach-Colton,
    ICALP 2002), so that nothing of the size of coordinates x width is held. The variance of a product is about
    `(|a|^2 |b|^2 + (a.b)^2) / width`. Samples get draws of their own, so that errors average out over them. Vectors no
    longer than the width stay as they are.

    Attributes:
        width: Most numbers kept of a sample.
        seed: Of the draws; batches need different ones.
    """

    width: int
    seed: tuple[int, ...] = (0,)

    def __call__(self, coordinates: Tensor) -> Tensor:
        """Projects rows, shape `(samples, coordinates)`, to `(samples, width)` at most."""
        samples, count = coordinates.shape
        if count <= self.width:
            return coordinates
        seed = int(np.random.SeedSequence(self.seed).generate_state(1)[0])
        draws = torch.randint(2 * self.width, (count + samples,), generator=torch.Generator().manual_seed(seed))
        drawn = draws.to(coordinates.device).unfold(0, count, 1)[:samples]  # one table, read from another start by each
        projected = coordinates.new_zeros(samples, self.width)
        return projected.scatter_add_(1, drawn // 2, torch.where(drawn % 2 > 0, coordinates, -coordinates))
