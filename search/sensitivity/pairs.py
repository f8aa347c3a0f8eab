"""True interactions of single pairs of choices, measured."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from search.errors import ConfigError
from search.quantize.prefix import PrefixRunner
from search.quantize.simulate import QuantizedModel
from search.sensitivity.choices import Base, Choice
from search.tasks.task import Task


def pair_divergences(
    task: Task,
    simulated: QuantizedModel,
    choices: Sequence[Choice],
    pairs: Sequence[tuple[int, int]],
    base: Base | None = None,
) -> np.ndarray:
    """Measures the true interactions of pairs of choices on the calibration split, shape `(pairs,)`.

    `KL(i, j) - KL(i) - KL(j) + KL(base)`, with the mean divergence from the float network as `KL`: what making both
    choices costs beyond making each alone. To second order it is `G_ij`.

    Args:
        task: Gives the data and the divergence.
        simulated: The network, calibrated.
        choices: The choices, in the order of their positions.
        pairs: Positions of two choices of different decisions each.
        base: The policy on which choices are made; by default the float network.

    Raises:
        ConfigError: If both choices of a pair are of one decision.
    """
    base = base or {}
    for first, second in pairs:
        if choices[first].decision == choices[second].decision:
            raise ConfigError(f"{choices[first]} and {choices[second]} exclude each other; pair different decisions")
    singles = {position: place for place, position in enumerate(sorted({p for pair in pairs for p in pair}), 1)}
    policies = [base, *(choices[position].on(base) for position in singles)]
    policies += [choices[second].on(choices[first].on(base)) for first, second in pairs]
    runner = PrefixRunner(simulated, task, list(task.batches("calibration")))
    reference = runner.run({}, lambda outputs, number: outputs.clone())
    divergences = np.empty(len(policies))
    for index, distances in runner.sweep(policies, lambda outputs, n: task.divergence(reference[n], outputs)):
        divergences[index] = float(torch.cat(distances).mean())
    both = divergences[len(singles) + 1 :]
    alone = [divergences[singles[first]] + divergences[singles[second]] for first, second in pairs]
    found: np.ndarray = both - np.array(alone) + divergences[0]
    return found
