"""What is quantized, on which data, judged how."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from search.errors import UnsupportedError

Split = Literal["calibration", "selection", "report"]
SPLITS: tuple[Split, ...] = get_args(Split)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class Task(ABC):
    """A trained model, its data in three disjoint splits, and the metric that judges it.

    Ranges and sensitivities come from `calibration`, plans are compared on `selection`, and the quality that is
    promised comes from `report`. Subclasses set `model` and `example_input` and implement `batches` and `score`.

    Attributes:
        name: What run directories, tags and file names call the task.
        metric: Name of the metric, as tables and plots print it.
        higher_is_better: False for errors and losses.
    """

    name: str = "task"
    metric: str = "accuracy"
    higher_is_better: bool = True
    per_sample: ClassVar[bool] = True

    model: nn.Module
    example_input: Any

    @abstractmethod
    def batches(self, split: Split) -> Iterable[Any]:
        """Yields the batches of `split`, always the same ones in the same order."""

    @abstractmethod
    def score(self, outputs: Tensor, batch: Any) -> Tensor:
        """Returns one value per sample, shape `(samples,)`; `reduce` makes the metric of them."""

    def reduce(self, scores: np.ndarray) -> float:
        """Returns the metric of samples with these scores, shape `(samples,)`; by default their mean.

        Override it for other metrics, such as perplexity, the exponential of the mean. It must be an increasing
        function of the mean: then `higher_is_better` holds for a score as for the metric, and the ends of an interval
        of the mean are those of an interval of the metric.
        """
        return float(scores.mean())

    def outputs(self, model: nn.Module, batch: Any) -> Tensor:
        """Returns what the metric reads, samples along the first axis; by default the model's main output."""
        return main_output(call(model, self.inputs(batch)))

    def inputs(self, batch: Any) -> Any:
        """Returns the model inputs of `batch`. Default: all but the last element of a `(inputs..., target)` tuple."""
        if isinstance(batch, (tuple, list)) and len(batch) > 1:
            return batch[0] if len(batch) == 2 else tuple(batch[:-1])
        return batch

    def divergence(self, reference: Tensor, outputs: Tensor) -> Tensor:
        """Returns how far `outputs` are from the float model's, one value per sample, shape `(samples,)`, at least 0.

        Default: the Kullback-Leibler divergence KL(reference || outputs) in nats of the softmax over the last axis,
        averaged over the axes between. Override it for outputs that are not logits.
        """
        p, q = F.log_softmax(reference.double(), -1), F.log_softmax(outputs.double(), -1)
        return (p.exp() * (p - q)).sum(-1).reshape(len(p), -1).mean(1).clamp_min(0)

    def tangent(self, reference: Tensor, change: Tensor) -> Tensor:
        """Returns a small change of the outputs in coordinates in which squared length is twice the divergence.

        A row's squared length approximates `2 divergence(reference, reference + change)`, and the product of two
        changes' rows is what they add to each other's divergence.

        Default: of the default divergence, `sqrt(p) (change - E_p change)` with `p` the softmax of the reference, over
        the square root of the number of rows between: products are those of the Fisher metric `diag p - p p'`. A task
        that overrides `divergence` need not override this: its second derivative is then used instead.

        Args:
            reference: Outputs, shape `(samples, ..., classes)`.
            change: What is added to them, same shape.

        Returns:
            Shape `(samples, coordinates)`.
        """
        dtype = torch.promote_types(reference.dtype, torch.float32)
        p, change = reference.to(dtype).softmax(-1), change.to(dtype)
        rows = math.prod(p.shape[1:-1])
        return (p.sqrt() * (change - (p * change).sum(-1, keepdim=True)) / math.sqrt(rows)).flatten(1)

    def targets(self, batch: Any, outputs: Tensor) -> Tensor | None:
        """Returns the class that every row of logits should score highest; None where outputs are no logits.

        Forecasts of a policy's outputs are judged by it. Default: the last element of a `(inputs..., target)` batch if
        it holds one integer per row, else the classes that the float model itself scores highest.

        Args:
            batch: The batch.
            outputs: What the float model returns for it, shape `(samples, ..., classes)`.

        Returns:
            Shape `(samples, ...)`; a number that is no class leaves the row out.
        """
        labels = batch[-1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
        if isinstance(labels, Tensor) and labels.shape == outputs.shape[:-1] and labels.dtype in INTEGERS:
            return labels.to(outputs.device)
        return outputs.argmax(-1)

    def training_batches(self, epoch: int) -> Iterable[Any]:
        """Yields batches to fine-tune on, in an order that depends on `epoch` alone.

        Default: the calibration split's. Override it where there are training data; they need no labels.
        """
        batches = list(self.batches("calibration"))
        order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(epoch))
        return [batches[index] for index in order.tolist()]

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Returns the loss that the labels of a training batch give, one value per sample; only where there are labels.

        Raises:
            UnsupportedError: Unless a subclass overrides it.
        """
        raise UnsupportedError(f"task {self.name} has no loss of its own; leave finetune.distill at 1")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over every tensor of the three splits, in order."""
        digest = hashlib.sha256()
        for split in SPLITS:
            digest.update(split.encode())
            for batch in self.batches(split):
                for tensor in tensors_in(batch):
                    digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
                    digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @cached_property
    def judgement(self) -> str | None:
        """A digest of how scores are made of a model and its data; None where that cannot be told.

        Scores that were measured are kept for later searches (`search.quality.store`), whose task must have the same
        judgement. Default: SHA-256 over the source of the task's classes below `Task`, and its attributes that are
        numbers, texts and paths, lists and mappings of them. It is None where a class has no source, as when typed at
        a prompt, and where an attribute other than the model can be called: what it does cannot be seen.

        Functions that a class calls are not seen either. Override it where they may change, or where the default is
        None, with any text that is changed whenever scores do: `judgement = "top 5, version 2"`; or with None, which
        keeps scores from being kept.
        """
        kinds = type(self).__mro__
        try:
            sources = [inspect.getsource(kind) for kind in kinds[: kinds.index(Task)]]
        except (OSError, TypeError):
            return None
        given = {
            name: value
            for name, value in vars(self).items()
            if name != "model" and not isinstance(getattr(type(self), name, None), cached_property)
        }
        if any(map(callable, leaves_in(given))):
            return None
        plain = json.dumps([sources, plain_values(given)], sort_keys=True)
        return hashlib.sha256(plain.encode()).hexdigest()


def plain_values(value: Any) -> Any:
    """The numbers, texts and paths in nested lists and mappings, as JSON holds them; what is none of these is None."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain_values(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value if isinstance(value, (str, int, float)) else None


def leaves_in(value: Any) -> list[Any]:
    """What nested lists and mappings hold."""
    if isinstance(value, Mapping):
        value = list(value.values())
    return [leaf for item in value for leaf in leaves_in(item)] if isinstance(value, (tuple, list)) else [value]


def call(model: nn.Module, inputs: Any) -> Any:
    """Calls `model` with one tensor, a tuple of positional inputs, or a mapping of keyword inputs."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, (tuple, list)):
        return model(*inputs)
    return model(inputs)


def main_output(output: Any) -> Tensor:
    """Returns the tensor a metric reads from whatever a model returns: the tensor, `.logits`, or the only candidate.

    Raises:
        TypeError: If several tensors come back and none is called `logits`.
    """
    if isinstance(output, Tensor):
        return output
    named = output if isinstance(output, Mapping) else getattr(output, "__dict__", {})
    logits = named.get("logits")
    if isinstance(logits, Tensor):
        return logits
    found = [tensor for tensor in tensors_in(output) if tensor.is_floating_point()]
    if len(found) == 1:
        return found[0]
    keys = f" with keys {sorted(map(str, named))}" if named else ""
    raise TypeError(
        f"the model returns {type(output).__name__}{keys} holding {len(found)} floating-point tensors; "
        "override `Task.outputs` to say which of them the metric reads"
    )


def tensors_in(value: Any) -> list[Tensor]:
    """Lists the tensors in nested tuples, lists, mappings and dataclass-like outputs, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif hasattr(value, "__dict__") and not isinstance(value, (type, tuple, list)):
        value = list(vars(value).values())
    if isinstance(value, (tuple, list)):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []
