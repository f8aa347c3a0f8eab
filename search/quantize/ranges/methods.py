"""The names of the methods, as configurations have them."""

from __future__ import annotations

from collections.abc import Sequence

from hwmodels import Format
from search.errors import ConfigError, closest

WEIGHT_METHODS = ("mse", "minmax", "percentile", "kl", "octav")
METHODS = (*WEIGHT_METHODS, "moving_average", "cross_entropy")
PERCENTILE = 99.99  # share of the values that the method of that name keeps by default


def check_method(key: str, method: str, allowed: Sequence[str] = METHODS) -> None:
    """Raises ConfigError unless `method` is among the allowed ways to choose ranges.

    Args:
        key: The setting, for the message.
        method: Its value.
        allowed: `METHODS` for inputs, `WEIGHT_METHODS` for weights.
    """
    if method in allowed:
        return
    if method in METHODS:
        raise ConfigError(f"{key}={method} is for inputs, which are seen batch by batch; allowed: {', '.join(allowed)}")
    raise ConfigError(f"{key}={method} is unknown{closest(method, allowed)}; allowed: {', '.join(allowed)}")


def check_fits(method: str, format: Format) -> None:
    """Raises ConfigError if a method cannot place a format."""
    if method == "octav" and format.grid == "minifloat":
        raise ConfigError(f"octav reckons with steps of equal size, which {format} has not; use mse for it")
