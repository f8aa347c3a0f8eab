"""Networks that are hard to run in parts: they write in place, remember, share, and pass on more than tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence


class Bottleneck(nn.Module):
    """A residual block as torchvision has it: activations in place, the shortcut added in place."""

    def __init__(self, width: int, downsample: bool) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.downsample = nn.Sequential(nn.Conv2d(width, width, 1)) if downsample else None

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.relu(self.bn1(self.conv1(x))))
        shortcut = x if self.downsample is None else self.downsample(x)
        out += shortcut
        return self.relu(out)


class InPlaceNet(nn.Module):
    """Blocks in a row whose activations overwrite what was returned to others; the first one changes its own input."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(nn.ReLU(inplace=True), Bottleneck(4, True), Bottleneck(4, False))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        deep = self.blocks(stem)  # overwrites `stem`
        return self.head(torch.cat([stem, deep], 1).mean((2, 3)))


class Dense(nn.Module):
    """Every layer reads all earlier results; a dictionary that modules pass on and fill is what is returned."""

    class Step(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.fc = nn.Linear(width, 4)

        def forward(self, found: dict[str, Tensor]) -> dict[str, Tensor]:
            found[f"step{len(found)}"] = self.fc(torch.cat(list(found.values()), 1)).tanh()
            return found

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleList(self.Step(width) for width in (4, 8, 12))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        found = {"x": x}
        for step in self.steps:
            found = step(found)
        return {"logits": found["step3"], **found}


@dataclass
class Pair:
    """What `Pairs` passes on."""

    low: Tensor
    high: Tensor | None = None
    label: str = "pair"


class Pairs(nn.Module):
    """Dataclasses with views of one memory between modules, written to by others."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 8)

        def forward(self, x: Tensor) -> Pair:
            return Pair(*self.fc(x).chunk(2, 1))

    def __init__(self) -> None:
        super().__init__()
        self.split, self.low, self.high = self.Split(), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        pair = self.split(x)
        low = self.low(pair.low)
        pair.low.relu_()
        pair.label = "used"
        return self.high(pair.low + pair.high) + low


class FunctionalTie(nn.Module):
    """The first layer's weight is used again by a function, and read for its type before anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(10, 6), nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh())

    def forward(self, ids: Tensor) -> Tensor:
        dtype = self.middle.weight.dtype
        x = self.block(self.middle(self.embedding(ids).to(dtype)))
        return F.linear(x, self.embedding.weight) + F.linear(x, self.middle.weight).sum()


class Attending(nn.Module):
    """Attention, whose output projection is a layer that is never called, behind and before other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 3)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        mixed, weights = self.attention(x, x, x)
        return self.after(mixed) + weights.mean()


class Packing(nn.Module):
    """A module that returns a packed sequence, and a GRU after it."""

    class Pack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 6)

        def forward(self, ids: Tensor) -> Any:
            return pack_padded_sequence(self.embedding(ids), torch.tensor([3, 5]), True, enforce_sorted=False)

    def __init__(self) -> None:
        super().__init__()
        self.pack, self.gru, self.head = self.Pack(), nn.GRU(6, 4, batch_first=True), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(pad_packed_sequence(self.gru(self.pack(ids))[0], batch_first=True)[0])


class LateWrite(nn.Module):
    """Overwrites what an earlier layer returned, but only where a later one returns little: on some policies' paths."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x), self.second(x)
        if b.abs().sum() < x.abs().sum():
            a.mul_(b)
        else:
            b = self.head(b).repeat(1, 2)[:, :4]
        return self.head(a + b)


class Note:
    """An object that a module holds, with something in it."""

    value: Any = None


class Writer(nn.Module):
    """Leaves something behind: in an attribute, a list, a buffer, or an object that nothing tells about."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.fc, self.where, self.mark, self.marks, self.note = nn.Linear(4, 4), where, None, [], Note()
        self.register_buffer("kept", torch.zeros(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x)
        if self.where == "attribute":
            self.mark = y.tanh()
        elif self.where == "list":
            self.marks.append(y.tanh())
        elif self.where == "buffer":
            self.kept.copy_(y.tanh())
        else:
            self.note.value = y.tanh()
        return y

    def find(self) -> Tensor:
        if self.where == "attribute":
            return self.mark
        if self.where == "list":
            return self.marks.pop()
        return self.kept if self.where == "buffer" else self.note.value


class Remembering(nn.Module):
    """Reads what an earlier module left behind."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Sequential(Writer(where)), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        middle = self.middle(self.first(x))
        return self.last(middle + self.first[0].find())


class SharedObject(nn.Module):
    """A module returns an object that it keeps; what others put into it, it sees."""

    class Opener(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.note = nn.Linear(4, 4), Note()

        def forward(self, x: Tensor) -> Note:
            self.note.value = self.fc(x)
            return self.note

    def __init__(self) -> None:
        super().__init__()
        self.opener, self.middle, self.last = self.Opener(), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        note = self.opener(x)
        note.value = self.middle(note.value)
        return self.last(self.opener.note.value)


class SameMemory(nn.Module):
    """A module returns what it is given, which was computed outside of modules and is written to afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.same = nn.Linear(4, 4), nn.Sequential(nn.Identity())
        self.middle, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        same = self.same(x)
        y = self.middle(x)
        x.add_(1)
        return self.last(same + y)


class Twice(nn.Module):
    """A residual block that runs twice, with another layer between."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return F.max_pool2d(self.conv(x) + x, 2)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.middle = nn.Conv2d(1, 4, 3, padding=1), self.Block(), nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block(self.stem(x))
        x = self.block(torch.tanh(self.middle(x)))
        return self.head(x.flatten(1))


class Chain(nn.Module):
    """Blocks one after the other, as language models have them: only the last result is of use."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.Tanh()) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Random(nn.Module):
    """Returns something else every time."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x) + torch.rand(4))


class Counting(nn.Module):
    """Insists that its first layer runs."""

    class Counted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.note.value = (self.note.value or 0) + 1
            return super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = self.Counted(4, 4), nn.Linear(4, 3)
        self.first.note = Note()

    def forward(self, x: Tensor) -> Tensor:
        before = self.first.note.value or 0
        x = self.first(x)
        if self.first.note.value != before + 1:
            raise RuntimeError("the first layer did not run")
        return self.last(x)


class Unsteady(nn.Module):
    """Goes another way every time from when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.note = Note()

    def forward(self, x: Tensor) -> Tensor:
        if self.note.value is not None:
            self.note.value = not self.note.value
        x = self.right(x) if self.note.value else self.left(x)
        return self.last(x)
