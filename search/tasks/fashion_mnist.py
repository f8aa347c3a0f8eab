"""The Fashion-MNIST task: ResNet-20 or MobileNetV2 on 28x28 photographs of clothes (Xiao et al., arXiv 1708.07747)."""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from search.errors import ConfigError, DataError, closest
from search.tasks.classification import CHECKPOINTS, Classification, Labelled, stratified_splits
from search.tasks.networks import mobilenetv2, resnet20

NETWORKS = {"resnet20": resnet20, "mobilenetv2": mobilenetv2}
ROOT_VARIABLE = "FASHION_MNIST_ROOT"
DEBIAN_ROOT = Path("/usr/share/datasets/fashion-mnist")
PIXEL_MEAN, PIXEL_STD = 0.2860, 0.3530  # of the training images, scaled to [0, 1]


class FashionMNIST(Classification):
    """Top-1 accuracy on Fashion-MNIST; calibration from the training images, the other splits from the test images."""

    def __init__(
        self,
        model: str = "resnet20",
        root: str | Path | None = None,
        calibration_samples: int = 500,
        checkpoint: str | Path | None = None,
    ) -> None:
        """Creates the task; the images are read when first needed.

        Args:
            model: `resnet20` or `mobilenetv2`.
            root: Folder of the four IDX files, gzipped or not. Default: `$FASHION_MNIST_ROOT`, then the folder of
                Debian's package dataset-fashion-mnist.
            calibration_samples: Training images used for ranges and sensitivities.
            checkpoint: A `.safetensors` file with the network's weights. Default: the one shipped with the package.

        Raises:
            ConfigError: If `model` is unknown or `calibration_samples` is out of range.
        """
        if model not in NETWORKS:
            raise ConfigError(
                f"task.model={model} is unknown{closest(model, NETWORKS)}; allowed: {', '.join(NETWORKS)}"
            )
        if not 10 <= calibration_samples < 60_000:
            raise ConfigError(f"task.calibration_samples={calibration_samples} must be from 10 to 59999")
        self.name = f"fashion_mnist_{model}"
        self.checkpoint = Path(checkpoint or CHECKPOINTS / f"{self.name}.safetensors")
        self._network = model
        self._root = Path(root or os.environ.get(ROOT_VARIABLE) or DEBIAN_ROOT)
        self._calibration_samples = calibration_samples

    def network(self) -> nn.Module:
        return NETWORKS[self._network]()

    @cached_property
    def _train(self) -> Labelled:
        return read_images(self._root, "train"), read_labels(self._root, "train")

    @cached_property
    def _splits(self) -> dict[str, Labelled]:
        images, labels = self._train
        count = self._calibration_samples
        chosen = stratified_splits(labels, {"calibration": count, "rest": len(labels) - count}, seed=0)["calibration"]
        test_images, test_labels = read_images(self._root, "t10k"), read_labels(self._root, "t10k")
        half = len(test_labels) // 2
        halves = stratified_splits(test_labels, {"selection": half, "report": len(test_labels) - half}, seed=0)
        splits = {name: (test_images[index], test_labels[index]) for name, index in halves.items()}
        return splits | {"calibration": (images[chosen], labels[chosen])}

    def load(self, split: str) -> Labelled:
        return self._train if split == "train" else self._splits[split]


def read_images(root: Path, part: str) -> Tensor:
    """Reads `{part}-images-idx3-ubyte[.gz]` as standardised float32 images, shape `(N, 1, 28, 28)`."""
    return (read_idx(root, f"{part}-images-idx3-ubyte").unsqueeze(1).float() / 255 - PIXEL_MEAN) / PIXEL_STD


def read_labels(root: Path, part: str) -> Tensor:
    """Reads `{part}-labels-idx1-ubyte[.gz]` as int64 labels, shape `(N,)`."""
    return read_idx(root, f"{part}-labels-idx1-ubyte").long()


def read_idx(root: Path, name: str) -> Tensor:
    """Reads one IDX file of unsigned bytes (format: http://yann.lecun.com/exdb/mnist), gzipped or not.

    Raises:
        DataError: If neither `name` nor `name.gz` is in `root`, or the file is not a whole IDX file of bytes.
    """
    path = next((p for p in (root / name, root / f"{name}.gz") if p.is_file()), None)
    if path is None:
        raise DataError(
            f"Fashion-MNIST is not in {root}: neither {name} nor {name}.gz is there. Install it with "
            f"`apt-get install dataset-fashion-mnist`, or download the four IDX files from "
            f"https://github.com/zalandoresearch/fashion-mnist; name the folder with task.root=DIR or ${ROOT_VARIABLE}"
        )
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged: {error}; fetch it again") from error
    zeros, kind, rank = struct.unpack(">HBB", raw[:4]) if len(raw) >= 4 else (1, 0, 0)
    header = 4 + 4 * rank
    shape = struct.unpack(f">{rank}I", raw[4:header]) if len(raw) >= header else ()
    if zeros or kind != 8 or len(raw) - header != math.prod(shape):
        raise DataError(f"{path} is not a whole IDX file of unsigned bytes ({len(raw)} bytes read); fetch it again")
    return torch.frombuffer(bytearray(raw[header:]), dtype=torch.uint8).view(shape)
