"""Energy of operations and bytes: an index for comparing precisions, joules only where power was calibrated."""

from __future__ import annotations

import re

from hwmodels.device import OperationEnergy

ACCUMULATOR_BITS = 32
FLOAT32_TYPES = ("fp32", "tf32")
FLOAT16_TYPES = ("fp16", "bf16")


def mac_energy(energy: OperationEnergy, compute: str, weight_bits: int, input_bits: int) -> float:
    """Joules of one multiply-accumulate.

    Floats of 32 and 16 bits have figures of their own. Integer multipliers, and those of narrower floats by their
    widths, grow as (w a / 64)^0.99 from 8 x 8 bits, adders as (b / 8)^0.87 from 8 bits, with accumulators of 32 bits:
    powers through the 8-bit and 32-bit figures of Horowitz, "Computing's energy problem", ISSCC 2014.
    """
    if compute in FLOAT32_TYPES:
        return energy.fp32_multiply.number + energy.fp32_add.number
    if compute in FLOAT16_TYPES:
        return energy.fp16_multiply.number + energy.fp32_add.number
    widest = int((re.search(r"[0-9]+", compute) or ["8"])[0])  # of packed operands the kernel multiplies wider ones
    weight_bits, input_bits = min(weight_bits, widest), min(input_bits, widest)
    multiply: float = energy.int8_multiply.number * (weight_bits * input_bits / 64) ** 0.99
    add: float = energy.int8_add.number * (ACCUMULATOR_BITS / 8) ** 0.87
    return multiply + add
