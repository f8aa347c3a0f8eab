"""Plans of NVIDIA ModelOpt's `auto_quantize` (gradient method) at every budget; writes modelopt.json.

A format is weights of 2, 4 or 8 bits, symmetric per output channel, with 8-bit inputs per tensor. ReLU outputs are
unsigned, the network's standardised images signed. ModelOpt does not fold batch norm: it gets the folded network.
"""

from __future__ import annotations

import copy
import time
from importlib.metadata import version
from typing import Any

import modelopt.torch.quantization as mtq
from common import BITS, BUDGETS, INPUT_BITS, plan, seconds_since, subject, weight_counts, write
from torch import Tensor, nn
from torch.nn import functional as F

from search.quantize.fold import fold_batch_norm

STEM = "conv"  # the only layer that reads negative values
# Calibration of weight ranges; with narrow_range 2 bits are {-1, 0, 1}, without it {-2, -1, 0, 1}.
VARIANTS = {"max": ("max", False), "mse": ("mse", False), "mse_narrow": ("mse", True)}
SETTINGS = {
    "method": "gradient",
    "loss": "cross-entropy with the labels, summed over the batch",
    "calibration": "500 images, 5 batches, for ranges and for scores",
    "model": "batch norm folded before",
    "weights": "int2, int4, int8 symmetric per output channel; every layer quantized (allow_no_quant=False)",
    "inputs": "8 bits per tensor, range of the maximum; unsigned, but signed for the stem; outputs not quantized",
    "variants": {name: {"algorithm": a, "narrow_range": n} for name, (a, n) in VARIANTS.items()},
}

Batch = tuple[Tensor, Tensor]


def formats(algorithm: str, narrow_range: bool, unsigned: bool) -> list[dict[str, Any]]:
    """Returns the quantization formats a layer may have, in ModelOpt's words."""
    inputs = {"quantizer_name": "*input_quantizer", "cfg": {"num_bits": INPUT_BITS, "axis": None, "unsigned": unsigned}}
    return [
        {
            "quant_cfg": [
                {
                    "quantizer_name": "*weight_quantizer",
                    "cfg": {"num_bits": bits, "axis": 0, "narrow_range": narrow_range},
                },
                inputs,
            ],
            "algorithm": algorithm,
        }
        for bits in BITS
    ]


def loss(logits: Tensor, batch: Batch) -> Tensor:
    """Returns the summed cross-entropy; scores are squared gradients, tiny for CBC's tolerances if it were the mean."""
    return F.cross_entropy(logits, batch[1], reduction="sum")


def weight_bits(model: nn.Module) -> dict[str, int]:
    """Reads the chosen bits from the quantizers of the searched model."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    unquantized = [name for name, layer in layers.items() if not layer.weight_quantizer.is_enabled]
    if unquantized:
        raise ValueError(f"left in float: {unquantized}")
    return {name: layer.weight_quantizer.num_bits for name, layer in layers.items()}


def main() -> None:
    """Searches every budget with every variant."""
    given = subject()
    folded = fold_batch_norm(given.model, given.task.example_input).model
    counts = weight_counts(folded)
    plans = []
    for variant, (algorithm, narrow_range) in VARIANTS.items():
        signed, unsigned = (formats(algorithm, narrow_range, unsigned=flag) for flag in (False, True))
        others = [name for name in counts if name != STEM]
        for budget in BUDGETS:
            wall, processor = time.perf_counter(), time.process_time()
            model, state = mtq.auto_quantize(
                copy.deepcopy(folded),
                constraints={"effective_bits": budget},
                quantization_formats=unsigned,
                module_search_spaces=[  # without `allow_no_quant` a layer may also stay in float
                    {"module_name_patterns": [STEM], "quantization_formats": signed, "allow_no_quant": False},
                    {"module_name_patterns": others, "quantization_formats": unsigned, "allow_no_quant": False},
                ],
                data_loader=given.calibration,
                forward_step=lambda network, batch: network(batch[0]),
                loss_func=loss,
                num_calib_steps=len(given.calibration),
                num_score_steps=len(given.calibration),
                method="gradient",
            )
            seconds = seconds_since(wall, processor)
            facts = {
                "constraint": {"effective_bits": budget},
                "tool_effective_bits": state["best"]["constraints"]["effective_bits"],
                **seconds,
                "accuracy": given.accuracy(model.eval()),
            }
            plans.append(plan(variant, budget, weight_bits(model), counts, **facts))
            print(variant, budget, {k: v for k, v in plans[-1].items() if k != "weight_bits"}, flush=True)
        write("modelopt", version("nvidia-modelopt"), given, SETTINGS, plans)


if __name__ == "__main__":
    main()
