"""The budget: limits on what a plan may cost, or on how much quality it may lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from search.errors import ConfigError
from search.units import COST_NAMES, quantity

RATIOS = {
    "latency_ratio": "latency_s",
    "energy_ratio": "energy_j",
    "size_ratio": "weight_bytes",
    "bit_ops_ratio": "bit_ops",
}
"""Limits given as a share of the reference's cost, and the cost they limit."""

REFERENCES = ("float", "int8")

ROUNDING = 1e-12
"""Share by which limits are widened, as costs added up in another order differ in their last digits."""


@dataclass(frozen=True)
class Budget:
    """Limits that hold together; None is no limit.

    Attributes:
        latency_s: Seconds per forward pass.
        latency_ratio: Latency as a share of the reference's.
        energy_j: Joules per forward pass.
        energy_ratio: Energy as a share of the reference's.
        weight_bytes: Stored parameters, scales and zero points counted.
        size_ratio: Stored parameters as a share of the reference's.
        activation_bytes: Peak bytes of live activations.
        average_weight_bits: Mean nominal bits per weight.
        effective_bits: Mean bits per weight, scales counted.
        bit_ops_ratio: Bit operations as a share of the reference's.
        quality_drop: How much quality may be lost, in the metric's units, at least 0: the upper end of the drop's 95%
            interval is held against it. Then cost is minimised.
        reference: What ratios refer to, on the same device and workload: `float` or `int8` (int8/uint8 throughout).
    """

    latency_s: float | None = None
    latency_ratio: float | None = None
    energy_j: float | None = None
    energy_ratio: float | None = None
    weight_bytes: float | None = None
    size_ratio: float | None = None
    activation_bytes: float | None = None
    average_weight_bits: float | None = None
    effective_bits: float | None = None
    bit_ops_ratio: float | None = None
    quality_drop: float | None = None
    reference: str = "float"

    def __post_init__(self) -> None:
        if self.reference not in REFERENCES:
            raise ConfigError(f"budget.reference={self.reference} is unknown; allowed: {', '.join(REFERENCES)}")
        for name, limit in self.given().items():
            if limit < 0 or (limit == 0 and name != "quality_drop") or limit != limit:
                raise ConfigError(
                    f"budget.{name}={limit} must be {'at least' if name == 'quality_drop' else 'above'} 0"
                )

    def given(self) -> dict[str, float]:
        """The limits that are set, by their config name."""
        names = [item.name for item in fields(self) if item.name != "reference"]
        return {name: float(getattr(self, name)) for name in names if getattr(self, name) is not None}

    def limits(self, reference: Mapping[str, float]) -> dict[str, float]:
        """Turns the cost limits into absolute ones, by the cost they limit; the tighter one where two meet.

        Args:
            reference: Costs of the reference policy.

        Raises:
            ConfigError: If a limit is on a cost the hardware model does not know.
        """
        limits: dict[str, float] = {}
        for name, limit in self.given().items():
            if name == "quality_drop":
                continue
            cost = RATIOS.get(name, name)
            if reference[cost] != reference[cost]:
                raise ConfigError(
                    f"budget.{name} needs a hardware model that knows {cost}; this one does not: choose hardware=zen5, "
                    "or budget.reference=int8 where it is float that the hardware cannot run"
                )
            limit = limit * reference[cost] if name in RATIOS else limit
            limits[cost] = min(limit, limits.get(cost, limit))
        return {cost: limit * (1 + ROUNDING) for cost, limit in limits.items()}

    def wording(self, cost: str, limit: float, value: float) -> tuple[str, str]:
        """Says a limit on a cost, and a value of that cost, in the words of the config.

        Args:
            cost: The cost.
            limit: Its absolute limit.
            value: A value to be put beside it.

        Returns:
            For a ratio `("budget.size_ratio=0.14", "0.163")`, else the config key with its limit, and the value.
        """
        name = next((name for name in self.given() if RATIOS.get(name, name) == cost), cost)
        given = self.given().get(name, limit)
        return f"budget.{name}={given:g}", f"{value / limit * given:.4g}"


def budget_words(limits: Mapping[str, float], reference: str = "float") -> str:
    """A budget in a few words, such as `size ≤ 0.14 × float, drop ≤ 0.01`.

    Args:
        limits: The limits by their config names, as `Budget.given` returns them.
        reference: What ratios refer to.
    """

    def limit(name: str, value: float) -> str:
        if name in RATIOS:
            return f"{name.removesuffix('_ratio').replace('_', ' ')} ≤ {value:g} × {reference}"
        return f"{COST_NAMES[name]} ≤ {quantity(name, value)}" if name in COST_NAMES else f"drop ≤ {value:g}"

    return ", ".join(limit(name, value) for name, value in limits.items()) or "no limit"
