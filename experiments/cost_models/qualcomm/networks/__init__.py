"""Networks whose latencies Qualcomm AI Hub publishes, written down in plain torch, and traced.

They follow their papers and, where these leave things open, torchvision, which AI Hub takes most of them from. Nothing
is trained or computed: they live on torch's meta device, which knows shapes only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import nn

from hwmodels import Network
from search.trace import trace

from . import mobile, others, residual
from .blocks import fold

IMAGE = (1, 3, 224, 224)
SMALL_IMAGE = (1, 3, 128, 128)


@dataclass(frozen=True)
class Definition:
    """A network that can be built.

    Attributes:
        build: Returns the module.
        parameters: Its parameters, as published, batch norms included.
        gmacs: Its multiply-accumulates on `image`, in thousands of millions, as published; 0 where nothing is.
        image: Shape that AI Hub's models take at the commit the latencies are of: 224 x 224 also for EfficientNets,
            which are trained on more.
        published_at: Height and width that `gmacs` is published at, where it is not `image`'s.
        attention_gmacs: The part of `gmacs` that is in products of activations, which no layer has.
    """

    build: Callable[[], nn.Module]
    parameters: int
    gmacs: float = 0.0
    image: tuple[int, ...] = IMAGE
    published_at: int = 0
    attention_gmacs: float = 0.0


D = Definition
NETWORKS: dict[str, Definition] = {
    "convnext_base": D(partial(others.convnext, (3, 3, 27, 3), (128, 256, 512, 1024)), 88_591_464, 15.355),
    "convnext_tiny": D(partial(others.convnext, (3, 3, 9, 3), (96, 192, 384, 768)), 28_589_128, 4.456),
    "densenet121": D(residual.densenet121, 7_978_856, 2.834),
    "efficientnet_b0": D(partial(mobile.efficientnet, 1.0, 1.0, 1280), 5_288_548, 0.386),
    "efficientnet_b4": D(partial(mobile.efficientnet, 1.4, 1.8, 1792), 19_341_616, 4.394, published_at=380),
    "efficientnet_v2_s": D(mobile.efficientnet_v2_s, 21_458_488, 8.366, published_at=384),
    "fcn_resnet50": D(residual.fcn_resnet50, 32_957_013, 142.726, image=(1, 3, 520, 520)),
    "googlenet": D(others.googlenet, 6_624_904, 1.498),
    "mnasnet05": D(mobile.mnasnet05, 2_218_512, 0.104),
    "mobilenet_v2": D(mobile.mobilenet_v2, 3_504_872, 0.301),
    "mobilenet_v3_large": D(partial(mobile.mobilenet_v3, mobile.LARGE, 1280), 5_483_032, 0.217),
    "mobilenet_v3_small": D(partial(mobile.mobilenet_v3, mobile.SMALL, 1024), 2_542_856, 0.057),
    "quicksrnetmedium": D(partial(others.quicksrnet, 5), 61_008, image=SMALL_IMAGE),
    "quicksrnetsmall": D(partial(others.quicksrnet, 2), 33_264, image=SMALL_IMAGE),
    "real_esrgan_general_x4v3": D(others.CompactUpscaler, 1_213_296, image=SMALL_IMAGE),
    "real_esrgan_x4plus": D(others.real_esrgan_x4plus, 16_697_987, image=SMALL_IMAGE),
    "regnet_y_800mf": D(residual.regnet_y_800mf, 6_432_512, 0.834),
    "resnet18": D(residual.resnet18, 11_689_512, 1.814),
    "resnet50": D(partial(residual.bottleneck_classifier, (3, 4, 6, 3)), 25_557_032, 4.089),
    "resnet101": D(partial(residual.bottleneck_classifier, (3, 4, 23, 3)), 44_549_160, 7.801),
    "resnet_3d": D(residual.resnet_3d, 33_371_472, 40.697, image=(1, 3, 16, 112, 112)),
    "resnext50": D(partial(residual.bottleneck_classifier, (3, 4, 6, 3), 4, 32), 25_028_904, 4.230),
    "resnext101": D(partial(residual.bottleneck_classifier, (3, 4, 23, 3), 8, 32), 88_791_336, 16.414),
    "shufflenet_v2": D(mobile.shufflenet_v2, 1_366_792, 0.040),
    "squeezenet1_1": D(others.squeezenet1_1, 1_235_496, 0.349),
    "unet_segmentation": D(others.UNet, 31_037_698, image=(1, 3, 640, 1280)),
    "vit": D(others.VisionTransformer, 86_567_656, 17.564, attention_gmacs=0.715),
    "wideresnet50": D(partial(residual.bottleneck_classifier, (3, 4, 6, 3), 128), 68_883_240, 11.398),
}
"""AI Hub's name to definition. Parameters and multiply-accumulates are those of torchvision's documentation, recalled;
parameters of the others those of AI Hub's model cards, to the digits given there."""

ANCHORS = ("densenet121", "mobilenet_v3_large", "mobilenet_v3_small", "resnet50", "resnet101")
"""Networks that no parameter is fitted to: their latencies are not in the table but in the device files."""


@cache
def load(name: str, side: int = 0) -> Network:
    """Traces a network, batch norms folded.

    Args:
        name: A key of `NETWORKS`.
        side: Height and width of its image; 0 for what AI Hub takes.
    """
    definition = NETWORKS[name]
    image = (*definition.image[:-2], side, side) if side else definition.image
    with torch.device("meta"):
        return trace(fold(definition.build()), torch.empty(image))


def count_parameters(name: str) -> int:
    """Parameters of a network, batch norms included."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in NETWORKS[name].build().parameters())
