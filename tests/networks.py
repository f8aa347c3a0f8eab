"""Small models of the awkward kinds that users bring."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Attention(nn.Module):
    """A transformer block written by hand: one projection for all heads, views, transposes, softmax, matmuls."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (t.view(n, length, self.heads, -1).transpose(1, 2) for t in (q, k, v))
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(width // self.heads), -1)
        mixed = (weights @ v).transpose(1, 2).contiguous().view(n, length, width)
        x = x + self.dropout(self.out(mixed))
        return x + self.down(F.gelu(self.up(x)))


class Decoder(nn.Module):
    """Tokens in, logits out; the decoder's weight is the embedding's, and positions come from a constant."""

    def __init__(self, vocabulary: int = 20, width: int = 16, length: int = 8) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.block = Attention(width)
        self.decoder = nn.Linear(width, vocabulary, bias=False)
        self.decoder.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.position(torch.arange(ids.size(1), device=ids.device))
        return self.decoder(self.block(x))


class Branching(nn.Module):
    """Runs one of two layers, by the sign of what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.positive, self.negative = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.positive(x) if x.sum().item() > 0 else self.negative(x)


class Recurrent(nn.Module):
    """Calls one layer three times, the second name for it not once."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.first(x))
        return x


@dataclass
class Answer:
    """What `TwoInputs` returns."""

    logits: Tensor
    hidden: dict[str, Tensor]


class TwoInputs(nn.Module):
    """Takes an image and ids by keyword, and returns tensors inside a dataclass and a mapping."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.ids, self.head = nn.Conv2d(1, 4, 3), nn.Embedding(10, 4), nn.Linear(8, 3)

    def forward(self, image: Tensor, ids: Tensor) -> Answer:
        joined = torch.cat([self.image(image).mean((2, 3)), self.ids(ids)], dim=1)
        return Answer(self.head(joined), {"joined": joined})


class Tagger(nn.Module):
    """An LSTM of two levels in both directions, behind an embedding; packs its sequences if given their lengths."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.lstm = nn.LSTM(6, 5, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(10, 3)

    def forward(self, ids: Tensor, lengths: Tensor | None = None) -> Tensor:
        x = self.embedding(ids)
        if lengths is None:
            return self.head(self.lstm(x)[0])
        packed, _ = self.lstm(pack_padded_sequence(x, lengths, batch_first=True))
        return self.head(pad_packed_sequence(packed, batch_first=True)[0])


class InPlace(nn.Module):
    """Changes tensors under the eyes of their views."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        flat = x.view(len(x), -1)
        F.relu(x, inplace=True)
        low, high = flat.chunk(2, dim=1)
        low += 1
        out = torch.zeros(len(x), 2)
        out[:, 0] = flat.sum(1)
        out[:, 1].copy_(high.sum(1))
        return self.fc(out)
