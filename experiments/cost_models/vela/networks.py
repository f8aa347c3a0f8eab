"""Three networks for small devices, written down with batch norms folded: no torch, no weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from experiments.haq_mobilenetv2.mobilenetv2 import Writer, mobilenetv2
from hwmodels import Network

STAGES = ((16, 1), (32, 2), (64, 2))
"""ResNet-20 (He et al., 2016, arXiv 1512.03385, section 4.2): channels of a stage, stride of its first block."""

BLOCKS = 3  # in a stage
WIDTHS = (128, 128, 128, 128, 8, 128, 128, 128, 128, 640)
"""Features after each layer of the MLPerf Tiny autoencoder (Banbury et al., 2021, arXiv 2106.07597)."""

FEATURES = 640  # it reads


def resnet20() -> Network:
    """ResNet-20 on images of 32 x 32, with convolutions in the shortcuts that change shape: 22 layers."""
    writer = Writer(3, 32)
    x, channels = writer.operation("relu", "relu", writer.conv("conv", "input", 16, kernel=3)), 16
    for stage, (width, first) in enumerate(STAGES):
        for block in range(BLOCKS):
            name, stride = f"stages.{stage}.{block}", first if block == 0 else 1
            out = writer.conv(f"{name}.conv1", x, width, kernel=3, stride=stride)
            out = writer.conv(f"{name}.conv2", writer.operation(f"{name}.relu1", "relu", out), width, kernel=3)
            if stride > 1 or width != channels:
                x = writer.conv(f"{name}.shortcut", x, width, stride=stride)
            x = writer.operation(f"{name}.relu2", "relu", writer.operation(f"{name}.add", "add", out, x))
            channels = width
    writer.linear("fc", writer.operation("mean", "mean", x, shape=(1, channels)), 10)
    return writer.network()


def autoencoder() -> Network:
    """MLPerf Tiny's autoencoder: 10 linear layers, every weight of which is read once."""
    writer = Writer(FEATURES, 1)
    x = writer.linear("fc1", "input", WIDTHS[0])
    for number, width in enumerate(WIDTHS[1:], start=2):
        x = writer.linear(f"fc{number}", writer.operation(f"relu{number - 1}", "relu", x), width)
    return writer.network()


NETWORKS: Mapping[str, Callable[[], Network]] = {
    "MobileNetV2": mobilenetv2,
    "ResNet-20": resnet20,
    "autoencoder": autoencoder,
}
