"""Fine-tuning: the network learns to give the float model's answers with its quantizers in place.

Quantization-aware training by straight-through estimation, with learned ranges (LSQ, Esser et al., 2020, arXiv
1902.08153) and the float model as teacher (Mishra and Marr, 2018, arXiv 1711.05852), so that any task can do it without
labels. A weight moves by about `rate` steps of its grid at a time, so that one rate serves two bits and eight, and
layers of any scale.
"""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hwmodels import Precision
from hwmodels.precision import FLOAT_PRECISION
from search.errors import DataError, UnsupportedError
from search.quantize.simulate import QuantizedModel, exact_inference
from search.recover.checkpoint import Checkpoint, Progress, identity
from search.recover.learner import Learner
from search.recover.recipe import Recipe
from search.recover.watch import watch
from search.tasks.task import Task, tensors_in

BETAS = (0.9, 0.99)  # of Adam; a short run needs a short memory
EPOCHS_OF_A_SEED = 1_000  # numbers of epochs that one seed may use before those of the next begin


def finetune(
    simulated: QuantizedModel,
    policy: Mapping[str, Precision],
    task: Task,
    reference: QuantizedModel | None = None,
    *,
    steps: int = 300,
    epochs: int | None = None,
    rate: float = 0.02,
    range_rate: float = 0.002,
    learn_ranges: bool = True,
    distill: float = 1.0,
    weight_decay: float = 0.0,
    clip: float = 1.0,
    schedule: str = "cosine",
    warmup: float = 0.05,
    check_steps: int = 50,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> QuantizedModel:
    """Returns a copy whose quantized weights, their biases and all ranges have been trained under `policy`.

    The network stays in evaluation mode: batch norm is folded, dropout is off. Every `check_steps` steps the divergence
    from the float model is measured on the calibration split, and the best state is what comes back: the network as it
    was where none is better. Where a task trains on the calibration split itself, this guards against divergence, not
    against overfitting.

    Args:
        simulated: The network; left as it is.
        policy: What is quantized. Weights that it leaves in float are not trained.
        task: Gives the data, and the divergence that is made small.
        reference: Has the float network that is the teacher, and is left in float; by default a copy of `simulated`.
            Needed where an earlier repair altered the weights of `simulated`.
        steps: Batches to train on.
        epochs: Passes over the training batches, in place of `steps`.
        rate: Peak learning rate of Adam for weights and biases, in steps of the format, of which `2**bits` cover four
            standard deviations.
        range_rate: Peak learning rate of scales, relative to them.
        learn_ranges: Whether ranges are learned.
        distill: Share of the divergence in the loss, from 0 to 1; the rest is `task.loss`.
        weight_decay: Pull of weights and biases back to where they started: a step takes this share of the way, times
            its rate.
        clip: Largest norm of a gradient.
        schedule: `cosine` or `constant`, after the warm-up.
        warmup: Share of the steps in which the rate rises.
        check_steps: Steps between two checks, and between two checkpoints.
        seed: Of the order of the batches.
        checkpoint: File from which a killed run goes on, to end as an undisturbed one: bit for bit on a CPU, and on a
            GPU under `torch.use_deterministic_algorithms`.
        on_step: Called after each step with its number, the number of steps, and the loss.

    Raises:
        ConfigError: If an option is out of range.
        DataError: If there is nothing to train on, a loss is not finite, or the checkpoint is another run's.
        UnsupportedError: If the model cannot be differentiated.
    """
    if epochs is not None:
        steps = epochs * sum(1 for _ in task.training_batches(seed * EPOCHS_OF_A_SEED))
    recipe = Recipe(
        steps=steps,
        rate=rate,
        range_rate=range_rate,
        learn_ranges=learn_ranges,
        distill=distill,
        weight_decay=weight_decay,
        clip=clip,
        schedule=schedule,
        warmup=warmup,
        check_steps=check_steps,
        seed=seed,
    )
    fork = simulated.fork()
    learner = Learner(fork, policy, _spreads(fork, policy, task), learn_ranges)
    if not (steps and learner.leaves):
        return fork
    teacher = (reference or simulated.fork()).apply({})
    before = _divergence(fork.apply(policy), teacher, task)
    saved = Checkpoint(Path(checkpoint), identity(fork.apply({}), policy, recipe)) if checkpoint else None
    with learner.running() as model:
        best = _train(model, teacher, task, learner, recipe, before, saved, on_step)
    if best is None:
        return simulated.fork()
    learner.load(best)
    learner.keep()
    return fork


def _train(
    model: nn.Module,
    teacher: nn.Module,
    task: Task,
    learner: Learner,
    recipe: Recipe,
    before: float,
    saved: Checkpoint | None,
    on_step: Callable[[int, int, float], None],
) -> list[Tensor] | None:
    """Returns the best state of the learner at any check; None where it was best before."""
    peaks = (recipe.rate, recipe.range_rate)
    optimizer = torch.optim.AdamW(
        [
            {"params": learner.tensors, "weight_decay": recipe.weight_decay},
            {"params": learner.ranges, "weight_decay": 0.0},
        ],
        betas=BETAS,
    )
    progress = saved.load(learner, optimizer) if saved else None
    progress = progress or Progress(0, before, None)
    batches = _training_batches(task, recipe.seed)
    for step, batch in enumerate(itertools.islice(batches, progress.step, recipe.steps), progress.step):
        learner.place()
        try:
            loss = _loss(model, teacher, task, batch, recipe.distill)
            torch.autograd.backward(loss)
        except RuntimeError as error:  # such as a view that is written in place
            raise UnsupportedError(f"{type(model).__name__} cannot be trained: {error}") from error
        learner.pass_gradients()
        torch.nn.utils.clip_grad_norm_(learner.leaves, recipe.clip)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * recipe.factor(step)
        optimizer.step()
        optimizer.zero_grad()
        on_step(step + 1, recipe.steps, loss.item())
        if (step + 1) % recipe.check_steps == 0 or step + 1 == recipe.steps:
            learner.place()
            divergence = _divergence(model, teacher, task)
            if divergence < progress.least:
                progress = Progress(step + 1, divergence, learner.state())
            else:
                progress = Progress(step + 1, progress.least, progress.best)
            if saved:
                saved.save(progress, learner, optimizer)
    return progress.best


def _loss(model: nn.Module, teacher: nn.Module, task: Task, batch: Any, distill: float) -> Tensor:
    """The mean loss of a batch, with gradients."""
    outputs = task.outputs(model, batch)
    if not outputs.requires_grad:
        raise DataError(
            f"{type(task).__name__}.outputs returns values without a gradient; fine-tuning needs one, so compute them "
            "without no_grad, inference_mode, detach or argmax"
        )
    loss = outputs.new_zeros((), dtype=torch.float64)
    if distill > 0:
        with torch.no_grad():
            wanted = task.outputs(teacher, batch)
        loss = loss + distill * task.divergence(wanted, outputs).double().mean()
    if distill < 1:
        loss = loss + (1 - distill) * task.loss(outputs, batch).double().mean()
    if not loss.isfinite():
        raise DataError(f"the loss of fine-tuning is {loss.item()}; try a smaller finetune.rate")
    return loss


def _training_batches(task: Task, seed: int) -> Iterator[Any]:
    for epoch in itertools.count(seed * EPOCHS_OF_A_SEED):
        batch = None
        for batch in task.training_batches(epoch):
            yield _outside_inference(batch)
        if batch is None:
            raise DataError(f"task {task.name} has no batches to fine-tune on; see `Task.training_batches`")


def _outside_inference(batch: Any) -> Any:
    """A batch that may take part in training, also where its tensors were first made while a model was evaluated."""
    return copy.deepcopy(batch) if any(tensor.is_inference() for tensor in tensors_in(batch)) else batch


def _divergence(model: nn.Module, teacher: nn.Module, task: Task) -> float:
    """The mean divergence from the float model on the calibration split."""
    with exact_inference():
        found = [
            task.divergence(task.outputs(teacher, batch), task.outputs(model, batch))
            for batch in task.batches("calibration")
        ]
        return float(torch.cat(found).double().mean())


def _spreads(simulated: QuantizedModel, policy: Mapping[str, Precision], task: Task) -> dict[str, float]:
    """The standard deviation of the outputs of every layer with quantized weight and a bias; leaves float applied."""
    variances: defaultdict[str, list[Tensor]] = defaultdict(list)

    def look(name: str) -> Callable[[Tensor], None]:
        return lambda output: variances[name].append(output.float().var(correction=0))

    looks = {
        name: look(name)
        for name in simulated.network.names
        if simulated.bias_name(name) and not policy.get(name, FLOAT_PRECISION).weight.is_float
    }
    watch(simulated, policy, task, outputs=looks)
    simulated.apply({})
    return {name: float(torch.stack(found).mean()) ** 0.5 for name, found in variances.items()}
