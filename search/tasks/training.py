"""Trains the built-in networks: reproducible from a seed, resumable from the last whole epoch.

The shipped checkpoints come from

    python -m search.tasks.training digits
    python -m search.tasks.training fashion_mnist_resnet20
    python -m search.tasks.training fashion_mnist_mobilenetv2
    python -m search.tasks.training text
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from search.errors import BitplanError
from search.files import replacing
from search.tasks.classification import CHECKPOINTS, Classification
from search.tasks.digits import Digits
from search.tasks.fashion_mnist import FashionMNIST


@dataclass(frozen=True)
class Recipe:
    """Stochastic gradient descent with Nesterov momentum under a one-cycle schedule (Smith, arXiv 1708.07120)."""

    epochs: int
    batch_size: int
    peak_rate: float
    mirror: bool  # left-right mirroring: clothes yes, digits no
    shift: int = 1  # random translation by up to this many pixels
    weight_decay: float = 5e-4
    momentum: float = 0.9


RECIPES: dict[str, tuple[Callable[[], Classification], Recipe]] = {
    "digits": (Digits, Recipe(epochs=60, batch_size=64, peak_rate=0.1, mirror=False)),
    "fashion_mnist_resnet20": (
        lambda: FashionMNIST("resnet20"),
        Recipe(epochs=15, batch_size=128, peak_rate=0.2, mirror=True, shift=2),
    ),
    "fashion_mnist_mobilenetv2": (
        lambda: FashionMNIST("mobilenetv2"),
        Recipe(epochs=12, batch_size=128, peak_rate=0.2, mirror=True, shift=2),
    ),
}


def train(
    task: Classification, recipe: Recipe, out: Path, seed: int = 0, log: Callable[[str], None] = print
) -> nn.Module:
    """Trains `task`'s network and writes it to `out`; a killed run goes on from its last whole epoch.

    Every epoch's shuffling and augmentation depend on the seed and the epoch alone, so an interrupted run ends with the
    same weights as an undisturbed one.
    """
    torch.manual_seed(seed)
    images, labels = task.load("train")
    model = task.network()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    steps = round(
        len(images) / recipe.batch_size
    )  # batches of nearly equal size: a last batch of one would upset batch norm
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.peak_rate, recipe.momentum, weight_decay=recipe.weight_decay, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.peak_rate, recipe.epochs * steps)
    state = out.with_suffix(".training.pt")
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if first := load_state(state, parts):
        log(f"resuming {task.name} after epoch {first}")
    for epoch in range(first, recipe.epochs):
        started = time.perf_counter()
        generator = torch.Generator().manual_seed(seed * 1_000 + epoch)
        model.train()
        for index in torch.randperm(len(images), generator=generator).tensor_split(steps):
            x = augment(images[index], recipe, generator).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(model(x), labels[index])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
        save_state(state, parts, epoch + 1)
        accuracy = top1(model.eval(), task)
        log(
            f"{task.name} epoch {epoch + 1}/{recipe.epochs} loss {loss.item():.3f} "
            f"selection accuracy {accuracy:.4f} {time.perf_counter() - started:.0f} s"
        )
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    with replacing(out) as aside:
        save_file(weights, aside)
    state.unlink(missing_ok=True)
    model.eval()
    return model


def save_state(path: Path, parts: Mapping[str, Any], epoch: int) -> None:
    """Writes the state of `parts` (model, optimizer, ...) after `epoch` epochs, in one step."""
    with replacing(path) as aside:
        torch.save({name: part.state_dict() for name, part in parts.items()} | {"epoch": epoch}, aside)


def load_state(path: Path, parts: Mapping[str, Any]) -> int:
    """Puts `parts` into the state `path` holds, and returns after how many epochs it was written; 0 without a file."""
    if not path.is_file():
        return 0
    saved = torch.load(path)
    for name, part in parts.items():
        part.load_state_dict(saved[name])
    return int(saved["epoch"])


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """Mirrors half of the images where the recipe says so, and shifts the batch by a few pixels, edges repeated."""
    if recipe.mirror:
        mirrored = torch.rand(len(images), 1, 1, 1, generator=generator) < 0.5
        images = torch.where(mirrored, images.flip(-1), images)
    height, width = images.shape[-2:]
    padded = F.pad(images, [recipe.shift] * 4, mode="replicate")
    top, left = torch.randint(2 * recipe.shift + 1, (2, len(images)), generator=generator)
    rows = top.view(-1, 1, 1) + torch.arange(height).view(1, -1, 1)
    columns = left.view(-1, 1, 1) + torch.arange(width).view(1, 1, -1)
    return padded[torch.arange(len(images)).view(-1, 1, 1), :, rows, columns].permute(0, 3, 1, 2)


@torch.no_grad()
def top1(model: nn.Module, task: Classification) -> float:
    """Returns the share of selection images whose largest logit is the label's."""
    scores = [task.score(model(batch[0]), batch) for batch in task.batches("selection")]
    return float(torch.cat(scores).mean())


def main() -> int:
    """Trains one built-in network: `python -m search.tasks.training NAME [--out FILE] [--seed N]`."""
    parser = argparse.ArgumentParser(prog="python -m search.tasks.training", description=main.__doc__)
    parser.add_argument("name", choices=sorted([*RECIPES, "text"]))
    parser.add_argument("--out", type=Path, help="file, for `text` folder; default: the package's own checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    try:
        run(arguments.name, arguments.out, arguments.seed)
    except BitplanError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(name: str, out: Path | None, seed: int) -> None:
    """Trains one built-in network and prints a line per epoch."""

    def log(line: str) -> None:
        print(line, flush=True)

    if name == "text":
        from search.tasks.text_training import TextRecipe, train_text
        from search.tasks.topics import topic_texts

        train_text(topic_texts(), TextRecipe(), out or CHECKPOINTS / "text", seed, log)
    else:
        make_task, recipe = RECIPES[name]
        train(make_task(), recipe, out or CHECKPOINTS / f"{name}.safetensors", seed, log)


if __name__ == "__main__":
    sys.exit(main())
