"""What a repair needs to know of the tensors that pass a layer, gathered batch by batch in bounded memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from search.recover.unfold import patch_chunks


class Moments:
    """Mean and variance of every channel, merged batch by batch (Chan, Golub and LeVeque, 1979), in float64.

    Attributes:
        count: Values seen of each channel.
        mean: Shape `(channels,)`.
    """

    def __init__(self, axis: int) -> None:
        """Starts with nothing seen; channels lie along `axis`."""
        self.count = 0
        self.mean = torch.zeros(())
        self._axis = axis
        self._squares = torch.zeros(())  # sum of squared distances from the mean

    def add(self, x: Tensor) -> None:
        """Adds a batch."""
        rows = x.detach().movedim(self._axis, -1).reshape(-1, x.shape[self._axis])
        if not len(rows):
            return
        mean = rows.mean(0, dtype=torch.float64)
        centred = rows.float() - mean.float()
        squares = centred.square().sum(0, dtype=torch.float64) - len(rows) * (mean - mean.float()).square()
        total = self.count + len(rows)
        step = mean - self.mean.to(mean)
        self._squares = self._squares.to(mean) + squares + step.square() * (self.count * len(rows) / total)
        self.mean = self.mean.to(mean) + step * (len(rows) / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        """Shape `(channels,)`, with Bessel's correction, as batch norms keep it."""
        return self._squares.clamp_min(0) / max(self.count - 1, 1)


class Gram:
    """Sums `x @ x.T` over all patches `x` of a layer's input, for each of its groups.

    Attributes:
        value: Shape `(groups, fan_in, fan_in)`, float64; None before anything was seen.
    """

    def __init__(self, module: nn.Module) -> None:
        self.value: Tensor | None = None
        self._module = module

    def add(self, x: Tensor) -> None:
        """Adds a batch of inputs."""
        for patches in patch_chunks(self._module, x):
            products = (patches.mT @ patches).double()
            self.value = products if self.value is None else self.value.add_(products)


class Sample:
    """A random sample of rows from a stream of unknown length, every row with the same chance.

    Each row draws a number, and the rows with the largest ones stay. Samples of one seed and size choose the same rows
    from streams whose batches are of the same sizes.

    Attributes:
        rows: Shape `(groups, at most size, values)`; None before anything was seen.
        batches: Rows of each batch seen.
    """

    def __init__(self, size: int, seed: int) -> None:
        self.rows: Tensor | None = None
        self.batches: list[int] = []
        self._size = size
        self._generator = torch.Generator().manual_seed(seed)
        self._drawn = torch.zeros(0)

    def add(self, count: int, take: Callable[[Tensor], Tensor]) -> None:
        """Adds a batch.

        Args:
            count: Its rows.
            take: Returns those at the given indices, shape `(groups, rows, values)`.
        """
        self.batches.append(count)
        drawn = torch.cat([self._drawn, torch.rand(count, generator=self._generator)])
        kept = drawn.topk(min(self._size, len(drawn))).indices
        held = len(self._drawn)
        old, new = kept[kept < held], kept[kept >= held] - held
        if len(new):
            taken = take(new)
            self.rows = taken if self.rows is None else torch.cat([self.rows[:, old.to(taken.device)], taken], 1)
            self._drawn = drawn[torch.cat([old, new + held])]


def matrix_error(error: Tensor, gram: Tensor) -> Tensor:
    """Returns the squared output error of every channel, summed over all patches, shape `(groups, channels)`, float64.

    Args:
        error: Quantized minus float matrix, shape `(groups, channels, fan_in)`.
        gram: As `Gram` sums it.
    """
    error = error.double()
    return ((error @ gram) * error).sum(-1)
