"""Which operations a table times: a spread of sites that networks have, or those of one network."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from hwmodels.capability import Capability
from hwmodels.cost import Workload
from hwmodels.device import closest, listed
from hwmodels.network import Layer
from hwmodels.precision import Format, Precision
from hwmodels.site import Site

TIMED_KINDS = ("conv1d", "conv2d", "linear")
"""Layer kinds whose kernels are timed."""

# out, in, size of the input, stride
_CONV_3X3 = (
    *((16, 16, 32, 1), (16, 16, 56, 1), (32, 32, 16, 1), (32, 32, 28, 1), (32, 32, 56, 1), (64, 64, 8, 1)),
    *((64, 64, 14, 1), (64, 64, 28, 1), (64, 64, 56, 1), (128, 128, 14, 1), (128, 128, 28, 1), (256, 256, 7, 1)),
    *((256, 256, 14, 1), (512, 512, 7, 1), (32, 16, 32, 2), (64, 32, 16, 2), (128, 64, 56, 2), (512, 256, 14, 2)),
    *((16, 16, 10, 1), (32, 32, 5, 1), (64, 64, 4, 1), (16, 16, 3, 1)),
)
_CONV_1X1 = (
    *((16, 16, 56, 1), (96, 16, 56, 1), (24, 144, 28, 1), (192, 32, 28, 1), (32, 192, 28, 1), (384, 64, 14, 1)),
    *((64, 384, 14, 1), (576, 96, 14, 1), (160, 576, 7, 1), (512, 160, 7, 1), (320, 512, 7, 1), (256, 64, 56, 1)),
    *((64, 256, 28, 1), (512, 128, 28, 1), (512, 512, 14, 1), (32, 16, 32, 2), (128, 64, 56, 2), (512, 256, 14, 2)),
    *((64, 32, 8, 1), (32, 64, 4, 1)),
)
_DEPTHWISE = (
    *((16, 56, 1), (32, 56, 1), (32, 28, 1), (64, 28, 1), (96, 56, 1), (96, 56, 2), (144, 56, 1), (144, 28, 2)),
    *((192, 28, 1), (192, 28, 2), (384, 14, 1), (512, 14, 1), (512, 14, 2), (512, 7, 1)),
    *((32, 14, 1), (96, 16, 1), (160, 14, 1), (256, 14, 2), (64, 7, 1), (256, 7, 1), (128, 8, 2), (128, 20, 2)),
)
# out, in, kernel, size of the input, stride: the first convolution of a network
_STEM = (
    (16, 1, 3, 8, 1),
    (16, 1, 3, 28, 1),
    (16, 3, 3, 32, 1),
    (32, 3, 3, 56, 2),
    (32, 3, 3, 112, 2),
    (64, 3, 7, 112, 2),
)
# rows, features in, features out
_LINEAR = (
    *((1, 64, 64), (1, 256, 256), (1, 512, 10), (1, 512, 512), (1, 1024, 1024), (1, 1024, 4096), (1, 2048, 2048)),
    *((1, 4096, 1024), (1, 4096, 4096), (4, 256, 1024), (4, 1024, 1024), (4, 2048, 2048), (16, 64, 256)),
    *((16, 256, 64), (16, 512, 512), (16, 1024, 1024), (16, 1024, 4096), (64, 64, 64), (64, 256, 256)),
    *((64, 512, 2048), (64, 1024, 1024), (256, 128, 512), (256, 256, 256), (256, 512, 512), (256, 1024, 1024)),
)

PRECISIONS = ("float", "int8/uint8", "int4-g32", "int4-g128", "int8-g32", "int8-g128", "int2-g32", "int2-g128")
"""What is timed on a CPU, where a kind of layer has it."""

CUDA_PRECISIONS = ("bf16/bf16", "int8/int8", "fp8_e4m3/fp8_e4m3", "int8/bf16", "uint4-g128/bf16")
"""What is timed on a CUDA device."""


def conv_site(out_channels: int, in_channels: int, kernel: int, size: int, stride: int, groups: int = 1) -> Site:
    """A square convolution of one sample, padded by half its kernel."""
    out_size = (size + 2 * (kernel // 2) - kernel) // stride + 1
    square = (kernel, kernel), (stride, stride)
    return Site("conv2d", 1, in_channels, out_channels, *square, groups, (size, size), (out_size, out_size))


def default_sites() -> tuple[Site, ...]:
    """About 95 sites: convolutions 3x3, 1x1, depthwise and first, and linear layers of 1 to 256 rows."""
    return (
        *(conv_site(out, in_, 3, size, stride) for out, in_, size, stride in _CONV_3X3),
        *(conv_site(out, in_, 1, size, stride) for out, in_, size, stride in _CONV_1X1),
        *(conv_site(channels, channels, 3, size, stride, channels) for channels, size, stride in _DEPTHWISE),
        *(conv_site(*stem) for stem in _STEM),
        *(Site("linear", *sizes) for sizes in _LINEAR),
    )


def spread(sites: Sequence[Site], count: int) -> tuple[Site, ...]:
    """`count` of the sites, evenly spaced; all of them where there are no more.

    Raises:
        ValueError: If `count` is below 1.
    """
    if count < 1:
        raise ValueError(f"the number of sites must be at least 1, got {count}")
    if count >= len(sites):
        return tuple(sites)
    return tuple(sites[(2 * number + 1) * len(sites) // (2 * count)] for number in range(count))


def network_sites(layers: Iterable[Layer], workload: Workload) -> tuple[Site, ...]:
    """The different sites of a network's layers, in their order, those of `TIMED_KINDS`."""
    return tuple(dict.fromkeys(Site.of(layer, workload) for layer in layers if layer.kind in TIMED_KINDS))


def read_layers(path: str | Path) -> tuple[Layer, ...]:
    """Reads the layers of a network from `network.json` or `layers.json`.

    Raises:
        ValueError: If the file cannot be read, or holds no layers.
    """
    path = Path(path)
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        rows = content["layers"] if isinstance(content, dict) else content
        return tuple(_layer(row) for row in rows)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror or error}") from error
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} holds no layers as network.json and layers.json do ({error!r})") from error


def _layer(row: dict[str, Any]) -> Layer:
    found: dict[str, Any] = {}
    for item in fields(Layer):
        if item.name in row:
            value = row[item.name]
            found[item.name] = tuple(value) if isinstance(value, list) else value
    return Layer(**found)


def parse_precisions(names: Sequence[str], known: Sequence[str]) -> tuple[Precision, ...]:
    """Reads the names of precisions that can be timed, each once.

    Raises:
        ValueError: If one is none of `known`; the message names the closest.
    """
    by_precision = {Precision.parse(name): name for name in known}
    parsed = [_parsed(name) for name in names]
    for name, precision in zip(names, parsed, strict=True):
        if precision not in by_precision:
            raise ValueError(f"no kernel is timed for {name!r}{closest(name, known)}; known: {listed(known)}")
    return tuple(dict.fromkeys(precision for precision in parsed if precision is not None))


def _parsed(name: str) -> Precision | None:
    """The precision of a name; None where it is none at all."""
    try:
        return Precision.parse(name)
    except ValueError:
        return None


def layer_of(site: Site) -> Layer:
    """A layer whose one call is the site, without bias: what cost models count operations and bytes of."""
    shape = (site.out_channels, site.in_channels // site.groups, *site.kernel)
    return Layer(
        name=site.kind,
        kind=site.kind,
        weight_shape=shape,
        macs=site.macs,
        input_shape=(site.batch, site.in_channels, *site.in_size),
        output_shape=(site.batch, site.out_channels, *site.out_size),
        groups=site.groups,
        kernel=site.kernel,
        stride=site.stride,
    )


def weight_bytes(site: Site, weight: Format, run: Capability | None = None) -> float:
    """Bytes of the site's weights in memory while running: packed with their scales, unless the device widens them."""
    if run is not None and run.held_weight_bits is not None:
        return site.weight_values * run.held_weight_bits / 8
    return layer_of(site).weight_bits(weight) / 8
