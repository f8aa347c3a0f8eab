"""Networks that are neither residual towers nor mobile: classifiers, a transformer, and those that return images."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import Branches, ConvNorm, Residual, classifier


def squeezenet1_1() -> nn.Module:
    """Iandola et al., 2016 (arXiv 1602.07360), version 1.1: no batch norms."""

    def fire(inputs: int, squeezed: int, expanded: int) -> nn.Module:
        one = nn.Sequential(nn.Conv2d(squeezed, expanded, 1), nn.ReLU())
        three = nn.Sequential(nn.Conv2d(squeezed, expanded, 3, padding=1), nn.ReLU())
        return nn.Sequential(nn.Conv2d(inputs, squeezed, 1), nn.ReLU(), Branches(one, three))

    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 3, 2), nn.ReLU(), pool, fire(64, 16, 64), fire(128, 16, 64), pool),
        *(fire(128, 32, 128), fire(256, 32, 128), pool, fire(256, 48, 192), fire(384, 48, 192)),
        *(fire(384, 64, 256), fire(512, 64, 256), nn.Dropout(), nn.Conv2d(512, 1000, 1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def googlenet() -> nn.Module:
    """Szegedy et al., 2015 (arXiv 1409.4842), as torchvision has it: batch norms, 3 x 3 in place of 5 x 5."""

    def inception(inputs: int, one: int, to3: int, three: int, to5: int, five: int, pooled: int) -> nn.Module:
        return Branches(
            ConvNorm(inputs, one),
            nn.Sequential(ConvNorm(inputs, to3), ConvNorm(to3, three, 3)),
            nn.Sequential(ConvNorm(inputs, to5), ConvNorm(to5, five, 3)),
            nn.Sequential(nn.MaxPool2d(3, 1, 1), ConvNorm(inputs, pooled)),
        )

    pool = nn.MaxPool2d(3, 2, ceil_mode=True)
    return nn.Sequential(
        *(ConvNorm(3, 64, 7, 2), pool, ConvNorm(64, 64), ConvNorm(64, 192, 3), pool),
        *(inception(192, 64, 96, 128, 16, 32, 32), inception(256, 128, 128, 192, 32, 96, 64), pool),
        *(inception(480, 192, 96, 208, 16, 48, 64), inception(512, 160, 112, 224, 24, 64, 64)),
        *(inception(512, 128, 128, 256, 24, 64, 64), inception(512, 112, 144, 288, 32, 64, 64)),
        *(inception(528, 256, 160, 320, 32, 128, 128), nn.MaxPool2d(2, 2, ceil_mode=True)),
        *(inception(832, 256, 160, 320, 32, 128, 128), inception(832, 384, 192, 384, 48, 128, 128)),
        classifier(1024),
    )


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of an image."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNextBlock(nn.Module):
    """7 x 7 depthwise, layer norm, two linear layers at every position, a scale per channel."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.filter, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.empty(width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.filter(x).permute(0, 2, 3, 1))
        y = self.scale * self.down(F.gelu(self.up(y)))
        return x + y.permute(0, 3, 1, 2)


def convnext(blocks: tuple[int, ...], widths: tuple[int, ...]) -> nn.Module:
    """Liu et al., 2022 (arXiv 2201.03545)."""
    modules: list[nn.Module] = [nn.Conv2d(3, widths[0], 4, 4), ChannelNorm(widths[0])]
    for number, (count, width) in enumerate(zip(blocks, widths, strict=True)):
        if number:
            modules += [ChannelNorm(widths[number - 1]), nn.Conv2d(widths[number - 1], width, 2, 2)]
        modules += [ConvNextBlock(width) for _ in range(count)]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), ChannelNorm(widths[-1]), nn.Flatten(), nn.Linear(widths[-1], 1000))
    return nn.Sequential(*modules, head)


class TransformerBlock(nn.Module):
    """Attention and a perceptron of two layers, each behind a layer norm and added to what it read."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        parts = self.qkv(self.first(x)).chunk(3, dim=-1)
        q, k, v = (part.view(n, length, self.heads, -1).transpose(1, 2) for part in parts)
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(width // self.heads), -1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, length, width))
        return x + self.down(F.gelu(self.up(self.second(x))))


class VisionTransformer(nn.Module):
    """Dosovitskiy et al., 2021 (arXiv 2010.11929), base, patches of 16 x 16."""

    def __init__(self, width: int = 768, heads: int = 12, blocks: int = 12, patches: int = 196) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 16, 16)
        self.token, self.position = (
            nn.Parameter(torch.empty(1, 1, width)),
            nn.Parameter(torch.empty(1, patches + 1, width)),
        )
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patch(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), tokens], 1) + self.position
        return self.head(self.norm(self.blocks(tokens))[:, 0])


def pair(inputs: int, outputs: int) -> nn.Sequential:
    """Two 3 x 3 convolutions."""
    return nn.Sequential(ConvNorm(inputs, outputs, 3), ConvNorm(outputs, outputs, 3))


class UNet(nn.Module):
    """Ronneberger et al., 2015 (arXiv 1505.04597), as github.com/milesial/Pytorch-UNet has it, for two classes."""

    def __init__(self) -> None:
        super().__init__()
        widths = (64, 128, 256, 512, 1024)
        self.first, self.pool = pair(3, 64), nn.MaxPool2d(2)
        self.down = nn.ModuleList(pair(width, 2 * width) for width in widths[:-1])
        self.grow = nn.ModuleList(nn.ConvTranspose2d(width, width // 2, 2, 2) for width in widths[:0:-1])
        self.up = nn.ModuleList(pair(width, width // 2) for width in widths[:0:-1])
        self.last = nn.Conv2d(64, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept = [self.first(x)]
        for down in self.down:
            kept.append(down(self.pool(kept[-1])))
        x = kept.pop()
        for grow, up in zip(self.grow, self.up, strict=True):
            x = up(torch.cat([kept.pop(), grow(x)], 1))
        return self.last(x)


def quicksrnet(middle: int, width: int = 32, scale: int = 4) -> nn.Module:
    """Berger et al., 2023 (arXiv 2303.04336): plain convolutions, then channels laid out as pixels."""
    modules: list[nn.Module] = []
    for inputs in (3, *[width] * middle):
        modules += [nn.Conv2d(inputs, width, 3, padding=1), nn.Hardtanh(0, 1)]
    return nn.Sequential(
        *modules, nn.Conv2d(width, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale), nn.Hardtanh(0, 1)
    )


class CompactUpscaler(nn.Module):
    """Real-ESRGAN's SRVGGNetCompact (github.com/xinntao/Real-ESRGAN): plain convolutions added to the resized input."""

    def __init__(self, width: int = 64, middle: int = 32, scale: int = 4) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for inputs in (3, *[width] * middle):
            modules += [nn.Conv2d(inputs, width, 3, padding=1), nn.PReLU(width)]
        self.body = nn.Sequential(*modules, nn.Conv2d(width, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + F.interpolate(x, scale_factor=self.scale, mode="nearest")


class DenseBlock(nn.Module):
    """Five convolutions, each reading all that came before it in the block."""

    def __init__(self, width: int = 64, growth: int = 32) -> None:
        super().__init__()
        outputs = (growth, growth, growth, growth, width)
        self.convs = nn.ModuleList(
            nn.Conv2d(width + number * growth, out, 3, padding=1) for number, out in enumerate(outputs)
        )

    def forward(self, x: Tensor) -> Tensor:
        found = [x]
        for conv in self.convs[:-1]:
            found.append(F.leaky_relu(conv(torch.cat(found, 1)), 0.2))
        return x + 0.2 * self.convs[-1](torch.cat(found, 1))


class Scaled(nn.Module):
    """A fifth of what three dense blocks make of their input."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(DenseBlock() for _ in range(3)))

    def forward(self, x: Tensor) -> Tensor:
        return 0.2 * self.blocks(x)


def real_esrgan_x4plus() -> nn.Module:
    """RRDBNet (Wang et al., 2018, arXiv 1809.00219): 23 blocks of three dense blocks, enlarged twice by two."""

    def conv(inputs: int, outputs: int) -> nn.Module:
        return nn.Conv2d(inputs, outputs, 3, padding=1)

    trunk = Residual(nn.Sequential(*(Residual(Scaled()) for _ in range(23)), conv(64, 64)))
    larger = [(nn.Upsample(scale_factor=2), conv(64, 64), nn.LeakyReLU(0.2)) for _ in range(2)]
    last = (conv(64, 64), nn.LeakyReLU(0.2), conv(64, 3))
    return nn.Sequential(conv(3, 64), trunk, *larger[0], *larger[1], *last)
