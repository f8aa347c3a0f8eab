"""What the user may set about scoring, and the names of scores and predictors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from hwmodels import Precision
from search.errors import ConfigError, closest

FORWARD = ("kl", "loss", "drop")
BACKWARD = ("fisher", "fisher_diagonal", "gradient")
DISTORTION = ("weight_error", "sqnr_db", "output_error")
CURVATURE = ("hessian_trace", "hessian_eigenvalue")
SCORES = (*FORWARD, *BACKWARD, *DISTORTION, *CURVATURE)
"""Scores of single choices; a group for each thing that computes them."""

MEASURED = "measured"  # interactions of which some pairs were measured
INTERACTIONS = ("forward", "backward")
"""Estimators of the quadratic form over pairs of choices."""

DRAWN = ("signs", "labels")

SCALED = "_scaled"
"""Ending of an estimator's name: scaled to the measured divergence of single choices."""

SUPERPOSITION = "superposition"
PREDICTORS = (*SCORES, *INTERACTIONS, *(name + SCALED for name in INTERACTIONS), MEASURED, SUPERPOSITION)
AUTO = "auto"


@dataclass(frozen=True)
class SensitivitySettings:
    """What is scored, once, before any policy is measured.

    The forward sweep, one pass over the calibration split for every choice, gives `kl`, `loss`, `drop`, the `forward`
    interactions and the superposition together; it is left out only where none of them is asked for. The backward
    passes give `fisher`, `fisher_diagonal`, `gradient` and the `backward` interactions together.

    Attributes:
        scores: Scores of single choices, names in `SCORES`.
        interactions: Estimators of what pairs of choices do, names in `INTERACTIONS`.
        superposition: Whether the output changes of single choices are kept, to add them up.
        predictor: What the solver forecasts with: one of the scores, interactions (also ending in `_scaled`) or
            `superposition`; `auto` lets measurements decide.
        pairs: Pairs of layers or tensors, such as `[[conv1, conv2]]`, all of whose joint choices are measured: together
            with the scaled interactions of all others they make the predictor `measured`.
        base: Precision of all layers from which choices are told apart: `float`, or such as `int4/uint8`.
        drawn: What backward passes start from: `labels` drawn from the model's own softmax, or random `signs` in the
            coordinates in which the divergence is half a squared length: the same on average, with less scatter.
        draws: How many of them for every sample.
        width: Most numbers per sample that a projection of the outputs keeps for interactions.
        probes: Random vectors that the Hessian's trace is averaged over.
        seed: Of everything random.
    """

    scores: list[str] = field(default_factory=lambda: ["kl"])
    interactions: list[str] = field(default_factory=lambda: ["forward"])
    superposition: bool = True
    predictor: str = AUTO
    pairs: list[list[str]] | None = None
    base: str = "float"
    drawn: str = "signs"
    draws: int = 4
    width: int = 64
    probes: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        for key, given, allowed in (("scores", self.scores, SCORES), ("interactions", self.interactions, INTERACTIONS)):
            for name in given:
                _check(f"sensitivity.{key}", name, allowed)
        _check("sensitivity.drawn", self.drawn, DRAWN)
        _check("sensitivity.predictor", self.predictor, (AUTO, *PREDICTORS))
        for key, value in (("draws", self.draws), ("width", self.width), ("probes", self.probes)):
            if value < 1:
                raise ConfigError(f"sensitivity.{key}={value} must be at least 1")
        try:
            Precision.parse(self.base)
        except ValueError as error:
            raise ConfigError(f"sensitivity.base: {error}") from error
        for pair in self.pairs or []:
            if not isinstance(pair, list) or len(pair) != 2:
                raise ConfigError(f"sensitivity.pairs: {pair} must name two layers or tensors, such as [conv1, conv2]")
        if self.pairs and not self.interactions:
            raise ConfigError(
                "sensitivity.pairs needs the interactions of all other pairs: name sensitivity.interactions"
            )
        if not self.predictors:
            raise ConfigError("sensitivity asks for nothing: name at least one of scores, interactions, superposition")
        if self.predictor != AUTO and self.predictor not in self.predictors:
            raise ConfigError(
                f"sensitivity.predictor={self.predictor} is not scored; what is asked for gives "
                f"{', '.join(self.predictors)}"
            )

    @property
    def sweeps(self) -> bool:
        """Whether the forward sweep is needed."""
        asked = {*self.scores, *self.interactions} & {*FORWARD, "forward"}
        return bool(self.superposition or self.pairs or asked)

    @property
    def goes_backward(self) -> bool:
        """Whether backward passes are needed."""
        return "backward" in self.interactions or bool(set(self.scores) & set(BACKWARD))

    @property
    def predictors(self) -> tuple[str, ...]:
        """Names of the predictors that what is asked for gives."""
        scaled = [name + SCALED for name in self.interactions] if self.sweeps else []
        measured = [MEASURED] if self.pairs else []
        return (*self.scores, *self.interactions, *scaled, *measured, *([SUPERPOSITION] if self.superposition else []))


def _check(key: str, name: str, allowed: Sequence[str]) -> None:
    if name not in allowed:
        raise ConfigError(f"{key}: {name} is unknown{closest(name, allowed)}; allowed: {', '.join(allowed)}")
