"""Repairs: what wins back quality that quantization lost.

Each is a function `(simulated network, policy, task, *, options) -> simulated network` that leaves its argument alone.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hwmodels import Precision
from search.errors import ConfigError, closest
from search.quality.evaluate import Evaluator, Quality
from search.quantize.simulate import QuantizedModel
from search.recover.adaround import adaround
from search.recover.awq import awq
from search.recover.batch_norm import batch_norm
from search.recover.bias import bias_correction
from search.recover.equalization import equalization
from search.recover.finetune import finetune
from search.recover.gptq import gptq
from search.recover.smoothquant import smoothquant
from search.tasks.task import Task

REPAIRS: dict[str, Callable[..., QuantizedModel]] = {
    repair.__name__: repair
    for repair in (bias_correction, batch_norm, equalization, smoothquant, awq, adaround, gptq, finetune)
}


PRESERVING = (equalization, smoothquant, awq)
"""Repairs that leave what the float network returns as it is; they come first, the others refer to what they leave."""


@dataclass(frozen=True)
class Step:
    """One repair with its options.

    Attributes:
        name: A key of `REPAIRS`.
        options: The repair's keyword arguments.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name

    def __call__(
        self,
        simulated: QuantizedModel,
        policy: Mapping[str, Precision],
        task: Task,
        reference: QuantizedModel,
        checkpoint: Path | None = None,
    ) -> QuantizedModel:
        """Returns a repaired copy of the simulated network.

        Args:
            simulated: The network, as earlier repairs left it.
            policy: The policy to repair.
            task: Gives the data.
            reference: The network whose layers' outputs in float are to be kept: as it was before repairs that alter
                what it computes.
            checkpoint: Where a repair that can be interrupted keeps how far it is.
        """
        known = inspect.signature(REPAIRS[self.name]).parameters
        options = dict(self.options)
        if "reference" in known:
            options["reference"] = reference
        if "checkpoint" in known:
            options["checkpoint"] = checkpoint
        return REPAIRS[self.name](simulated, policy, task, **options)


def parse_steps(given: Iterable[Any], key: str = "recover.steps") -> tuple[Step, ...]:
    """Reads steps as the configuration has them: a name, or a mapping from the name to its options.

    Raises:
        ConfigError: If a repair or an option is unknown.
    """
    return tuple(_parse_step(step, key) for step in given)


def _parse_step(given: Any, key: str) -> Step:
    name, options = next(iter(given.items())) if isinstance(given, Mapping) and len(given) == 1 else (given, {})
    if not isinstance(name, str) or name not in REPAIRS:
        raise ConfigError(f"{key}: {name!r} is unknown{closest(str(name), REPAIRS)}; allowed: {', '.join(REPAIRS)}")
    if not isinstance(options or {}, Mapping):
        raise ConfigError(f"{key}: the options of {name} must be a mapping, such as {{{name}: {{seed: 1}}}}")
    parameters = inspect.signature(REPAIRS[name]).parameters.values()
    keywords = [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
    allowed = [name for name in keywords if name not in ("on_step", "checkpoint")]
    for option in options or {}:
        if option not in allowed:
            known = ", ".join(allowed) or "none"
            raise ConfigError(f"{key}: {name} has no option {option}{closest(option, allowed)}; allowed: {known}")
    return Step(name, dict(options or {}))


@dataclass(frozen=True)
class Gain:
    """What one repair gained on the selection split, and whether it was kept for that.

    Attributes:
        repair: The step, with its options.
        before: Drop against the float network before it.
        after: Drop after it.
        kept: Whether it was kept: where the drop got no larger.
        seconds: Time it took, measuring included.
    """

    repair: str
    before: float
    after: float
    kept: bool
    seconds: float


@dataclass(frozen=True)
class Recovered:
    """What a sequence of repairs came to.

    Attributes:
        simulated: The network with the repairs that were kept; the one given where none was.
        quality: Its quality on the selection split.
        gains: One entry per repair.
    """

    simulated: QuantizedModel
    quality: Quality
    gains: tuple[Gain, ...]


def recover(
    steps: Iterable[Step],
    evaluator: Evaluator,
    policy: Mapping[str, Precision],
    on_step: Callable[[str], None] = lambda name: None,
    directory: Path | None = None,
    stage: str = "after",
) -> Recovered:
    """Applies repairs in order, each kept only where the selection split gets no worse.

    Args:
        steps: The repairs.
        evaluator: Measures, and holds the simulated network, which is left as it is.
        policy: The policy to repair.
        on_step: Called with every repair before it runs.
        directory: Where repairs that can be interrupted keep how far they are.
        stage: Whether this is `before` or `after` the search, for the names of those files.
    """
    quality, gains, reference = evaluator.measure(policy, "selection"), [], evaluator.simulated
    for number, step in enumerate(steps):
        on_step(f"repairing: {step}")
        started = time.perf_counter()
        checkpoint = directory / f"{stage}_{number}_{step.name}.pt" if directory else None
        candidate = evaluator.of(step(evaluator.simulated, policy, evaluator.task, reference, checkpoint))
        after = candidate.measure(policy, "selection")
        kept = after.drop <= quality.drop
        gains.append(Gain(str(step), quality.drop, after.drop, kept, round(time.perf_counter() - started, 3)))
        if kept:
            evaluator, quality = candidate, after
            if REPAIRS[step.name] in PRESERVING:
                reference = candidate.simulated
    return Recovered(evaluator.simulated, quality, tuple(gains))
