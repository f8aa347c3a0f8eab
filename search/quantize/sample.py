"""A small random sample of what a layer reads, kept at calibration, in memory that does not grow with the data."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from search.quantize.shift import input_rows

MOST_VALUES = 1 << 18  # 1 MiB in float32
LEAST_VECTORS = 64  # of a linear layer, even if they are longer
LEAST_IMAGES = 8  # of a convolution: larger ones are cropped


class InputSample:
    """Rows drawn evenly from all inputs of a layer: vectors of a linear layer, samples of a convolution.

    Each row gets a random number, and those with the smallest numbers stay. Samples of a convolution that are too
    large are cropped to a box, whose place changes from batch to batch; the layer pads it as it pads whole ones.

    Attributes:
        rows: As `search.quantize.shift.input_rows` has them, in the input's type; None before anything was seen.
    """

    def __init__(self, module: nn.Module, seed: int = 0) -> None:
        self.rows: Tensor | None = None
        self._module = module
        self._generator = torch.Generator().manual_seed(seed)
        self._keys = torch.empty(0)

    def add(self, x: Tensor) -> None:
        """Adds a batch of inputs; samples of a convolution with another size than the first are left out."""
        new = self._cropped(input_rows(self._module, x.detach()))
        if not new.numel() or (self.rows is not None and new.shape[1:] != self.rows.shape[1:]):
            return
        least = LEAST_VECTORS if isinstance(self._module, nn.Linear) else LEAST_IMAGES
        keys = torch.cat([self._keys, torch.rand(len(new), generator=self._generator)])
        kept = keys.argsort(stable=True)[: max(MOST_VALUES // new[0].numel(), least)]
        held, drawn = kept[kept < len(self._keys)], kept[kept >= len(self._keys)] - len(self._keys)
        if len(drawn):
            rows = new[drawn.to(new.device)]
            self.rows = rows if self.rows is None else torch.cat([self.rows[held.to(rows.device)], rows])
            self._keys = keys[torch.cat([held, drawn + len(self._keys)])]

    def _cropped(self, rows: Tensor) -> Tensor:
        most = MOST_VALUES // LEAST_IMAGES
        if isinstance(self._module, nn.Linear) or not len(rows) or rows[0].numel() <= most:
            return rows
        share = (most / rows[0].numel()) ** (1 / (rows.dim() - 2))
        for axis in range(2, rows.dim()):
            size = rows.shape[axis]
            length = min(size, max(int(size * share), self._reach(axis - 2)))
            start = int(torch.randint(size - length + 1, (), generator=self._generator))
            rows = rows.narrow(axis, start, length)
        return rows

    def _reach(self, axis: int) -> int:
        """How many neighbouring inputs along a spatial axis one output depends on."""
        size, dilation = (getattr(self._module, name)[axis] for name in ("kernel_size", "dilation"))
        return int(dilation * (size - 1) + 1)
