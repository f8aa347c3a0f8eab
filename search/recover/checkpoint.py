"""Checkpoints of fine-tuning: a killed run goes on from its last one and ends as if nothing had happened."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hwmodels import Precision
from search.errors import DataError
from search.files import replacing
from search.recover.learner import Learner


@dataclass(frozen=True)
class Progress:
    """How far a run has come.

    Attributes:
        step: Steps done.
        least: The least divergence at any check.
        best: What had been learned then; None where it was before the first step.
    """

    step: int
    least: float
    best: list[Tensor] | None


@dataclass(frozen=True)
class Checkpoint:
    """The file of a run.

    Attributes:
        path: Where it is.
        run: What tells this run from others, as `identity` returns it.
    """

    path: Path
    run: str

    def save(self, progress: Progress, learner: Learner, optimizer: torch.optim.Optimizer) -> None:
        """Writes everything down in one step."""
        with replacing(self.path) as aside:
            torch.save(
                vars(progress) | {"run": self.run, "learned": learner.state(), "optimizer": optimizer.state_dict()},
                aside,
            )

    def load(self, learner: Learner, optimizer: torch.optim.Optimizer) -> Progress | None:
        """Puts everything back to how it was saved; None where there is no file yet.

        Raises:
            DataError: If the file cannot be read, or was written by another run.
        """
        if not self.path.is_file():
            return None
        try:
            saved = torch.load(self.path, map_location=learner.leaves[0].device)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise DataError(f"the checkpoint {self.path} cannot be read: {error}; delete it to start again") from error
        if not isinstance(saved, dict) or saved.get("run") != self.run:
            raise DataError(
                f"the checkpoint {self.path} is that of another network, policy or recipe; delete it to start again, "
                "or name another file with finetune.checkpoint"
            )
        learner.load(saved["learned"])
        optimizer.load_state_dict(saved["optimizer"])
        return Progress(saved["step"], saved["least"], saved["best"])


def identity(model: nn.Module, policy: Mapping[str, Precision], recipe: object) -> str:
    """Returns a digest of a model's parameters and buffers, a policy and a recipe."""
    digest = hashlib.sha256(f"{recipe} { {layer: str(precision) for layer, precision in policy.items()} }".encode())
    for name, value in model.state_dict().items():
        if isinstance(value, Tensor):
            digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
