"""Codebooks: values chosen by k-means or from a table; what is stored of a weight is the index of the nearest one."""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_SAMPLE = 1 << 22  # values of a row that are clustered; of a longer row, a seeded sample
LARGEST_POINTS = 512  # stretches that a row is summed up in before they are joined into clusters
POINTS_PER_ENTRY = 16
SMALLEST_POINTS = 128
CAPPING_STEPS = 10
LLOYD_STEPS = 100
TABLE_BYTES = 1 << 26  # of the gains of all stretches, for as many rows as fit

# Quantiles of a normal distribution scaled to [-1, 1], with a zero (Dettmers et al., "QLoRA", 2023, arXiv 2305.14314,
# appendix E). Their scales are float32 here, not quantized once more.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


def nf4_book(device: torch.device) -> Tensor:
    """NF4's values as a book for all groups, shape `(1, 16)`."""
    return torch.tensor([NF4], device=device)


def nearest(rows: Tensor, book: Tensor) -> Tensor:
    """Returns the index of the nearest entry of each row's book, int32; halfway between two, the lower one.

    Args:
        rows: Shape `(groups, values)`, float32.
        book: Shape `(groups, size)`, or `(1, size)` for all rows, ascending.
    """
    middles = _middles(book)
    if len(middles) == 1:
        return torch.searchsorted(middles[0], rows.contiguous(), out_int32=True)
    return torch.searchsorted(middles, rows.contiguous(), out_int32=True)


def _middles(book: Tensor) -> Tensor:
    """The largest values that belong to each entry but the last.

    Between neighbouring floats the middle rounds to one of them; an entry must still be nearest to itself.
    """
    below = torch.nextafter(book[:, 1:], book.new_tensor(-torch.inf))
    return torch.minimum(book[:, :-1] / 2 + book[:, 1:] / 2, below).contiguous()


def kmeans(rows: Tensor, size: int, mask: Tensor | None = None, seed: int = 0) -> Tensor:
    """Returns the book of each row with the least squared distance to its values, shape `(groups, size)`, ascending.

    Clusters of numbers are stretches of the sorted numbers, so the best ones can be found without guessing a start, by
    dynamic programming (Wang and Song, "Ckmeans.1d.dp", The R Journal 3/2, 2011): here over at most 512 short
    stretches, followed by Lloyd's iterations on all values. Deep Compression starts these from evenly spaced entries
    (Han et al., 2016, arXiv 1510.00149, section 3.2), which ends in worse optima where tails are heavy.

    No value is special: zeros are clustered like others, where Deep Compression, which prunes, leaves them out. A row
    with no more distinct values than the book has entries is reproduced exactly. Of rows of over 4 million values a
    seeded sample is clustered, together with the smallest and largest value.

    Args:
        rows: Shape `(groups, values)`, float32 and finite.
        size: Entries of a book.
        mask: False for values that are padding; None where all count.
        seed: Of the sample.
    """
    values, counts = _sorted(rows, mask, seed)
    sums = torch.cat([values.new_zeros(len(values), 1).double(), values.double().cumsum(1)], 1)
    ends = _stretches(values, counts, min(max(POINTS_PER_ENTRY * size, SMALLEST_POINTS), LARGEST_POINTS))
    at_once = max(TABLE_BYTES // (8 * ends.shape[1] ** 2), 1)
    parts = zip(*(torch.split(tensor, at_once) for tensor in (ends, sums, counts)), strict=True)
    book = torch.cat([_join(part, part_sums, part_counts, size) for part, part_sums, part_counts in parts])
    return _exact_where_few(values, _lloyd(values, counts, sums, book))


def _sorted(rows: Tensor, mask: Tensor | None, seed: int) -> tuple[Tensor, Tensor]:
    """Returns ascending values, the largest repeated in place of padding, and how many are real, `(groups, 1)`."""
    present = rows if mask is None else torch.where(mask, rows, torch.inf)
    if rows.shape[1] > LARGEST_SAMPLE:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randint(rows.shape[1], (LARGEST_SAMPLE,), generator=generator).to(rows.device)
        largest = present.where(present.isfinite(), -torch.inf).amax(1, keepdim=True)
        present = torch.cat([present[:, chosen], present.amin(1, keepdim=True), largest], 1)
    values = present.sort(1).values
    counts = values.isfinite().sum(1, keepdim=True)
    return torch.minimum(values, values.gather(1, counts - 1)).contiguous(), counts


def _stretches(values: Tensor, counts: Tensor, points: int) -> Tensor:
    """Returns where short stretches of sorted values begin and end, shape `(groups, points + 1)`.

    Their lengths are spaced as the entries of the best fine codebook are, by the cube root of the density (Panter and
    Dite, 1951): the density is one over the distance of neighbours, so each distance counts with its power of 2/3, but
    for no more than two stretches, so that a value far from all others gets its own but does not use them up.
    """
    total = values.shape[1]
    if total <= points:
        return torch.arange(total + 1, device=values.device).minimum(counts)
    reach = (values[:, -1:] - values[:, :1]).clamp_min(torch.finfo(values.dtype).tiny)
    shares = (values.diff(dim=1) / reach).double().pow_(2 / 3)
    for _ in range(CAPPING_STEPS):
        shares = shares.minimum(2 / points * shares.sum(1, keepdim=True))
    covered = shares.cumsum(1)
    marks = torch.arange(1, points, device=values.device) / points
    inner = torch.searchsorted(covered, marks * covered[:, -1:]) + 1
    return torch.cat([torch.zeros_like(counts), inner.minimum(counts), counts], 1)


def _join(ends: Tensor, sums: Tensor, counts: Tensor, size: int) -> Tensor:
    """Returns the means of the `size` clusters that neighbouring stretches are best joined into; NaN if one is empty.

    The squared error of clusters is the sum of all squares less `sum**2 / count` of each; the latter, their gain, is
    what is made large. `gains[g, j, i]` is that of stretches i to j as one cluster.
    """
    mean = sums.gather(1, counts) / counts
    sums = sums.gather(1, ends) - mean * ends
    count = (ends[:, :, None] - ends[:, None]).double()
    gains = (sums[:, :, None] - sums[:, None]).square_().div_(count).masked_fill_(count == 0, 0)
    later = torch.ones_like(gains[0], dtype=torch.bool).triu(1)
    gains.masked_fill_(later, -torch.inf)
    best, begins = gains[:, :, 0], []
    for _ in range(size - 1):
        best, begin = (gains + best[:, None]).max(2)
        begins.append(begin)
    cuts = [torch.full_like(counts, ends.shape[1] - 1)]
    for begin in reversed(begins):
        cuts.append(begin.gather(1, cuts[-1]))
    bounds = torch.cat([torch.zeros_like(counts), *reversed(cuts)], 1)
    means = sums.gather(1, bounds).diff(dim=1) / ends.gather(1, bounds).diff(dim=1)
    return (means + mean).float()


def _lloyd(values: Tensor, counts: Tensor, sums: Tensor, book: Tensor) -> Tensor:
    """Moves entries to the mean of the values nearest to them until they stay.

    A cluster is a stretch of sorted values, so its mean is a difference of two prefix sums: an iteration takes time in
    the number of clusters, not of values. An entry without values keeps its place.
    """
    lowest = values[:, :1].expand_as(book)
    book = torch.where(book.isnan(), lowest, book).cummax(1).values
    for _ in range(LLOYD_STEPS):
        ends = torch.searchsorted(values, _middles(book), right=True).minimum(counts)
        ends = torch.cat([torch.zeros_like(counts), ends, counts], 1)
        means = sums.gather(1, ends).diff(dim=1) / ends.diff(dim=1)
        moved = torch.where(means.isnan(), book, means.float())
        if torch.equal(moved, book):
            break
        book = moved
    return book


def _exact_where_few(values: Tensor, book: Tensor) -> Tensor:
    """Gives rows with no more distinct values than entries a book of these values."""
    size = book.shape[1]
    is_new = values.diff(dim=1) > 0
    rank = torch.cat([torch.zeros_like(values[:, :1], dtype=torch.long), is_new.long().cumsum(1)], 1)
    distinct = values[:, -1:].repeat(1, size).scatter(1, rank.clamp_max(size - 1), values)
    return torch.where(rank[:, -1:] < size, distinct, book)
