"""How fine-tuning trains: its options, checked, and the course of its learning rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from search.errors import ConfigError, closest

SCHEDULES: dict[str, Callable[[float], float]] = {
    "cosine": lambda done: 0.5 + 0.5 * math.cos(math.pi * done),
    "constant": lambda done: 1.0,
}
"""Share of the steps done to share of the peak rate."""


@dataclass(frozen=True)
class Recipe:
    """The options of a run, as `finetune` describes them."""

    steps: int
    rate: float
    range_rate: float
    learn_ranges: bool
    distill: float
    weight_decay: float
    clip: float
    schedule: str
    warmup: float
    check_steps: int
    seed: int

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            known = ", ".join(SCHEDULES)
            raise ConfigError(
                f"finetune.schedule={self.schedule} is unknown{closest(self.schedule, SCHEDULES)}; allowed: {known}"
            )
        for key, low, high in (
            ("steps", 0, math.inf),
            ("rate", 0, math.inf),
            ("range_rate", 0, math.inf),
            ("distill", 0, 1),
            ("weight_decay", 0, math.inf),
            ("warmup", 0, 1),
            ("check_steps", 1, math.inf),
            ("seed", 0, math.inf),
        ):
            if not low <= (value := getattr(self, key)) <= high:
                raise ConfigError(f"finetune.{key}={value} must be from {low} to {high}")
        if not self.clip > 0:
            raise ConfigError(f"finetune.clip={self.clip} must be positive; .inf clips nothing")

    def factor(self, step: int) -> float:
        """Share of the peak rates at a step, counted from 0."""
        rising = (step + 1) / (self.warmup * self.steps + 1)
        return min(rising, 1.0) * SCHEDULES[self.schedule](step / self.steps)
