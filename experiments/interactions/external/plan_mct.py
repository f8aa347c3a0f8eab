"""Plans of Sony's Model Compression Toolkit at every budget, with and without its bias correction; writes mct.json.

Default target platform capabilities (IMX500, version 1.0): weights of 2, 4 or 8 bits, symmetric per output channel,
outputs of operations in 8 bits with ranges that are powers of two. MCT folds batch norm itself.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from types import ModuleType
from typing import Any

import numpy as np
from common import BITS, BUDGETS, Subject, plan, seconds_since, subject, weight_counts, write
from torch import nn

# MCT's custom layers import torchvision for non-maximum suppression alone, which no network here has, and torchvision's
# wheels fail over another build of torch: they get an empty module while they are imported, and MCT itself sees none.
sys.modules["torchvision"] = ModuleType("torchvision")
sys.modules["torchvision"].__version__ = "0.28.0"  # type: ignore[attr-defined]
import edgemdt_cl.pytorch  # noqa: E402, F401

del sys.modules["torchvision"]
import model_compression_toolkit as mct  # noqa: E402
from mct_quantizers import PytorchQuantizationWrapper  # noqa: E402

VARIANTS = {"images32": 32, "images500": 500}  # images that score a layer; 32 is MCT's default
SETTINGS = {
    "target_platform_capabilities": "get_target_platform_capabilities(), that is IMX500 1.0",
    "calibration": "500 images, 5 batches, for ranges; for scores as the variant says",
    "weights": f"{BITS} bits, symmetric per output channel, ranges of least squared error",
    "activations": "results of operations, 8 bits per tensor, power-of-two ranges of least squared error",
    "bias_correction": "on by default; off with weights_bias_correction=False, the plan repeated",
    "variants": {name: {"num_of_images": images} for name, images in VARIANTS.items()},
}


def representative(given: Subject) -> Callable[[], Iterator[list[np.ndarray]]]:
    """Returns MCT's view of the calibration images: a function that starts an iterator of input lists."""
    return lambda: ([images.numpy()] for images, _ in given.calibration)


def quantize(
    given: Subject, weights_memory: float, images: int, bias_correction: bool, overwrite: list[int] | None = None
) -> tuple[nn.Module, Any]:
    """Returns MCT's quantized model and what it says about it; `overwrite` repeats a configuration found before."""
    core = mct.core.CoreConfig(
        quantization_config=mct.core.QuantizationConfig(weights_bias_correction=bias_correction),
        mixed_precision_config=mct.core.MixedPrecisionQuantizationConfig(
            num_of_images=images, configuration_overwrite=overwrite
        ),
    )
    model, info = mct.ptq.pytorch_post_training_quantization(
        copy.deepcopy(given.model),
        representative(given),
        target_resource_utilization=mct.core.ResourceUtilization(weights_memory=weights_memory),
        core_config=core,
        target_platform_capabilities=mct.get_target_platform_capabilities(),
    )
    return model.eval(), info


def weight_bits(model: nn.Module, counts: dict[str, int]) -> dict[str, int]:
    """Reads the chosen bits from the wrappers of the quantized model, whose names are flattened and end in `_bn`."""
    wrapped = {name: m for name, m in model.named_modules() if isinstance(m, PytorchQuantizationWrapper)}
    wrapped = {name.removesuffix("_bn"): m for name, m in wrapped.items() if "weight" in m.weights_quantizers}
    bits = {}
    for layer, count in counts.items():
        wrapper = wrapped.pop(layer.replace(".", "_"))
        if wrapper.weight.numel() != count:
            raise ValueError(f"{layer} has other weights in the quantized model")
        bits[layer] = wrapper.weights_quantizers["weight"].num_bits
    if wrapped:
        raise ValueError(f"wrappers of no layer: {sorted(wrapped)}")
    return bits


def main() -> None:
    """Searches every budget with every variant."""
    given = subject()
    counts = weight_counts(given.model)
    plans = []
    for variant, images in VARIANTS.items():
        for budget in BUDGETS:
            weights_memory = budget * sum(counts.values()) / 8  # bytes; MCT counts kernels only, as we do
            wall, processor = time.perf_counter(), time.process_time()
            model, info = quantize(given, weights_memory, images, bias_correction=True)
            seconds = seconds_since(wall, processor)
            bits = weight_bits(model, counts)
            uncorrected, _ = quantize(given, weights_memory, images, False, overwrite=info.mixed_precision_cfg)
            if weight_bits(uncorrected, counts) != bits:
                raise ValueError("the plan without bias correction is another one")
            facts = {
                "constraint": {"weights_memory": weights_memory},
                "tool_effective_bits": 8 * info.final_resource_utilization.weights_memory / sum(counts.values()),
                **seconds,
                "accuracy": given.accuracy(model),
                "accuracy_without_bias_correction": given.accuracy(uncorrected),
            }
            plans.append(plan(variant, budget, bits, counts, **facts))
            print(variant, budget, {k: v for k, v in plans[-1].items() if k != "weight_bits"}, flush=True)
        write("mct", version("model-compression-toolkit"), given, SETTINGS, plans)


if __name__ == "__main__":
    main()
