"""KL calibration: the range under which the quantized distribution tells least about the loss of the original one.

Migacz, "8-bit Inference with TensorRT", GTC 2017, on the bins of a histogram. P is the distribution of the values,
with what is clipped counted to the outermost occupied bin inside the range. Q is what the codes leave of it: the
values of all bins that share a code, without what is clipped, spread evenly over those of its bins that are occupied.
The range is that of least KL(P || Q), among those of at least one bin to a code.

Which bins share a code is decided by rounding their middles, so that any grid will do and both ends of a range may
move; TensorRT cuts magnitudes into as many equal stretches as there are codes. Exact zeros are left out, as every
format keeps them: the spike of a rectified tensor would otherwise decide alone.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from hwmodels import Format
from search.quantize.ranges.density import Density, grid_units, grid_values
from search.quantize.ranges.search import Criterion


def divergence(density: Density, format: Format) -> Criterion:
    """Returns the criterion KL(P || Q) in nats; infinite where a range has fewer bins than codes."""
    units = grid_units(format, density.counts.device)
    counts, bins = density.counts, density.counts.shape[1]
    mass, occupied, information = (
        F.pad(values.cumsum(1), (1, 0)) for values in (counts, (counts > 0).double(), _n_log_n(counts))
    )
    position = torch.arange(bins, device=counts.device).expand_as(counts)
    next_occupied = position.where(counts > 0, bins - 1).flip(1).cummin(1).values.flip(1)
    last_occupied = position.where(counts > 0, 0).cummax(1).values

    def lost(scale: Tensor, zero_point: Tensor | None) -> Tensor:
        codes = grid_values(scale, zero_point, units, density) + density.half
        low, high = codes[..., :1].floor().clamp_(0, bins - 1), codes[..., -1:].ceil().clamp_(1, bins)
        middles = ((codes[..., 1:] + codes[..., :-1]) / 2 - 0.5).ceil_()
        # The bins of code i are borders[i] to borders[i + 1].
        borders = torch.cat([low, middles.clamp(low, high), high], -1).long()
        shared, sharing = _at(mass, borders).diff(), _at(occupied, borders).diff()
        kept, low, high = shared.sum(-1), borders[..., 0], borders[..., -1]
        clipped_low, clipped_high = _at(mass, low), mass[:, -1] - _at(mass, high)

        first, last = _at(next_occupied, low), _at(last_occupied, high - 1)
        at_first = _at(counts, first)
        at_last = _at(counts, last) + torch.where(first == last, clipped_low, 0)
        p_log_p = _at(information, high) - _at(information, low)
        p_log_p += _n_log_n(at_first + clipped_low) - _n_log_n(at_first)
        p_log_p += _n_log_n(at_last + clipped_high) - _n_log_n(at_last)

        log_q = torch.where(shared > 0, (shared / sharing).log(), 0)
        is_used = (shared > 0).byte()
        first_code, last_code = is_used.argmax(-1), is_used.shape[-1] - 1 - is_used.flip(-1).argmax(-1)
        p_log_q = (shared * log_q).sum(-1)
        p_log_q += clipped_low * _at(log_q, first_code) + clipped_high * _at(log_q, last_code)

        total, is_coarse = mass[:, -1], high - low >= codes.shape[-1]
        found = (p_log_p - p_log_q) / total + (kept / total).log()
        return torch.where((kept > 0) & is_coarse, found, torch.inf)

    return lost


def _n_log_n(counts: Tensor) -> Tensor:
    return torch.xlogy(counts, counts)


def _at(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a table, shape `(rows, entries)` or `(candidates, rows, entries)`, at one or several indices per row.

    The indices have the shape `(candidates, rows)` or `(candidates, rows, indices)`.
    """
    several = index if index.dim() == 3 else index[..., None]
    found = table.expand(len(index), -1, -1).gather(-1, several)
    return found if index.dim() == 3 else found[..., 0]
