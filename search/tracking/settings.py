"""How searches are mirrored."""

from __future__ import annotations

from dataclasses import dataclass

from search.errors import ConfigError


@dataclass(frozen=True)
class TrackingSettings:
    """Where runs are mirrored.

    Attributes:
        enabled: Whether to mirror them to MLflow at all.
        uri: MLflow's tracking URI; None means `$MLFLOW_TRACKING_URI`, else SQLite in the run root.
        experiment: Name of the experiment; None means `bitplan/TASK`.
        interval_s: Seconds between two updates while a search runs; more where the store is slow.
        patience_s: Seconds that the end of a search waits for a store that gives no sign of life.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str | None = None
    interval_s: float = 5.0
    patience_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("interval_s", "patience_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"tracking.{name}={getattr(self, name)} must be above 0")
