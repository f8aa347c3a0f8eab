"""Repairs: what wins back quality that quantization lost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from search.errors import ConfigError, closest
from search.policy import Policy
from search.quality.evaluate import Evaluator, Quality
from search.recover.bias import bias_correction

Repair = Callable[[Evaluator, Policy], dict[str, Tensor]]
"""Changes the simulated network in place and returns the parameters it altered, by name."""

REPAIRS: dict[str, Repair] = {"bias_correction": bias_correction}


def check_repairs(names: Sequence[str]) -> None:
    """Raises ConfigError unless every name is a repair."""
    for name in names:
        if name not in REPAIRS:
            raise ConfigError(f"recover: {name!r} is unknown{closest(name, REPAIRS)}; allowed: {', '.join(REPAIRS)}")


def repair(
    names: Sequence[str], evaluator: Evaluator, policy: Policy, before: Quality
) -> tuple[dict[str, Tensor], Quality]:
    """Applies repairs in order, each kept only where the selection split gets no worse.

    Args:
        names: Keys of `REPAIRS`.
        evaluator: Holds the simulated network, which is altered in place.
        policy: The policy to repair.
        before: Its quality on the selection split.

    Returns:
        The altered parameters by name, empty where no repair helped, and the quality afterwards.
    """
    altered: dict[str, Tensor] = {}
    for name in names:
        changed = REPAIRS[name](evaluator, policy)
        parameters = dict(evaluator.simulated.apply({}).named_parameters())
        original = {key: parameters[key].detach().clone() for key in changed}
        evaluator.simulated.alter(changed)
        after = evaluator.measure(policy, "selection")
        if after.drop <= before.drop:
            altered, before = altered | changed, after
        else:
            evaluator.simulated.alter(original)
    return altered, before
