"""What every range makes of one heavy-tailed tensor, and of logits.

    python experiments/ranges/measure.py

The tensor has 200,000 values of Student's t distribution with three degrees of freedom, seen in 20 batches; its
signal to quantization noise ratio in dB goes to tensor.csv. The logits are 2,000 rows of ten classes with one clear
winner in most; the cross-entropy that quantizing them adds, in millinats, goes to logits.csv. It takes seconds on one
core.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from hwmodels import Format
from search.quantize.affine import Range
from search.quantize.inputs import input_quantizer
from search.quantize.ranges import METHODS, Histogram, LogitSample, input_range

HERE = Path(__file__).parent
FORMATS = ("int2", "int3", "int4", "uint4", "int8", "uint8", "fp4_e2m1", "fp8_e4m3")
VALUES, BATCHES, FREEDOM = 200_000, 20, 3


def heavy_tailed(generator: torch.Generator) -> Tensor:
    """Student's t: a normal value over the root of a mean of squared normal values."""
    normal, *others = torch.randn(1 + FREEDOM, VALUES, generator=generator)
    return normal / torch.stack(others).square().mean(0).sqrt()


def winning(generator: torch.Generator) -> Tensor:
    """Logits in which one of ten classes leads, by a heavy-tailed margin."""
    noise = torch.randn(2000, 10, generator=generator) * 2
    lead = torch.rand(2000, generator=generator).log().neg() * 6
    return noise + lead[:, None] * F.one_hot(torch.arange(2000) % 10, 10)


def noise_ratio(x: Tensor, quantized: Tensor) -> float:
    """Signal to quantization noise ratio, dB."""
    return float(10 * torch.log10(x.double().square().sum() / (x - quantized).double().square().sum()))


def added_cross_entropy(logits: Tensor, quantized: Tensor) -> float:
    """KL of the softmax of quantized logits from that of the logits, millinats."""
    return 1000 * float(
        F.kl_div(quantized.log_softmax(1), logits.log_softmax(1), reduction="batchmean", log_target=True)
    )


def table(x: Tensor, judge: Callable[[Tensor, Tensor], float], logits: bool) -> list[dict[str, str]]:
    """One row per method, one column per format; a dash where a method is not for a format."""
    seen, sample = Histogram(), LogitSample()
    for batch in x.chunk(BATCHES):
        seen.add(batch)
        if logits:
            sample.add(batch)
    rows = []
    for method in METHODS:
        if method == "cross_entropy" and not logits:
            continue
        row = {"method": method}
        for format in map(Format.parse, FORMATS):
            is_even = format.grid == "int" or method != "octav"
            range_ = input_range(seen, format, method, logits=sample) if is_even else None
            row[str(format)] = f"{judge(x, quantize(x, range_, format)):.2f}" if range_ else "-"
        rows.append(row)
    return rows


def quantize(x: Tensor, range_: Range, format: Format) -> Tensor:
    """The values that a tensor takes."""
    return input_quantizer(format, range_, -1)(x)  # type: ignore[no-any-return]


def main() -> None:
    """Measures, prints and writes both tables."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    tables = {
        "tensor": table(heavy_tailed(generator), noise_ratio, logits=False),
        "logits": table(winning(generator), added_cross_entropy, logits=True),
    }
    for name, rows in tables.items():
        print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        print("\n".join("| " + " | ".join(row.values()) + " |" for row in rows), "\n")
        with (HERE / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
