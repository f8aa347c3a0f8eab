"""The sensitivity table: everything scoring found, and the forecasts that can be made of it without the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from search.errors import ConfigError, closest
from search.files import replacing
from search.sensitivity.choices import choices_of
from search.sensitivity.gram import scaled
from search.sensitivity.settings import AUTO, MEASURED, SCALED, SUPERPOSITION
from search.sensitivity.superposition import Superposition
from search.space import SearchSpace

if TYPE_CHECKING:
    import pandas as pd

PREFERRED = (MEASURED, "forward" + SCALED, SUPERPOSITION, "backward" + SCALED, "forward", "backward")
"""Predictors from the one that did best in `experiments/interactions` down; scores that only add up come after."""


@dataclass(frozen=True)
class SensitivityTable:
    """Scores of all choices of a space, by their flat positions (`search.sensitivity.choices`).

    Attributes:
        columns: Scores that add up, by name, each of shape `(choices,)`.
        interactions: Quadratic forms by the name of their estimator, each symmetric, of shape `(choices, choices)`:
            half the sum over all ordered pairs of what a policy chooses forecasts its loss. All are positive
            semidefinite, but for `measured`, of which some entries are what pairs truly did.
        superposition: The output changes of single choices, where they were kept.
        linear: What each choice adds to the loss to first order; zero where choices are told apart from float.
        constant: Loss of the base itself; zero for float.
        predictor: The predictor that forecasts if none is named; `auto` takes the first of `PREFERRED` there is.
    """

    columns: Mapping[str, np.ndarray]
    interactions: Mapping[str, np.ndarray] = field(default_factory=dict)
    superposition: Superposition | None = None
    linear: np.ndarray | None = None
    constant: float = 0.0
    predictor: str = AUTO

    @property
    def predictors(self) -> tuple[str, ...]:
        """Names of everything that can forecast."""
        estimated = [name for name in self.interactions if name != MEASURED]
        scaled_too = [name + SCALED for name in estimated] if "kl" in self.columns else []
        return (*self.columns, *self.interactions, *scaled_too, *([SUPERPOSITION] if self.superposition else []))

    @property
    def preferred(self) -> str:
        """The predictor that forecasts if none is named."""
        if self.predictor != AUTO:
            return self.predictor
        return next((name for name in PREFERRED if name in self.predictors), self.predictors[0])

    def parts(self, predictor: str | None = None) -> tuple[np.ndarray, np.ndarray | None]:
        """What a solver needs: a score for every choice, shape `(choices,)`, and interactions or None.

        A policy's forecast is `constant`, plus its choices' scores, plus half its interactions. The superposition's own
        forecast is no such sum; here it stands for the best interactions there are.

        Raises:
            ConfigError: If there is no such predictor.
        """
        name = predictor or self.preferred
        if name not in self.predictors:
            raise ConfigError(
                f"predictor {name} was not scored{closest(name, self.predictors)}; there are "
                f"{', '.join(self.predictors)}: add it to sensitivity.scores or sensitivity.interactions"
            )
        if name == SUPERPOSITION:
            others = [other for other in (*PREFERRED, "kl", *self.columns) if other != SUPERPOSITION]
            name = next(other for other in others if other in self.predictors)
        if name in self.columns:
            column = self.columns[name]
            return (10 ** (-column / 10) if name == "sqnr_db" else column), None
        form = self.interactions[name.removesuffix(SCALED)]
        linear = np.zeros(len(form)) if self.linear is None else self.linear
        if name.endswith(SCALED):
            form = scaled(form, np.maximum(self.columns["kl"] - linear, 0))
        return linear, form

    def predict(self, positions: np.ndarray, predictor: str | None = None) -> np.ndarray:
        """Forecasts the losses of policies, shape `(policies,)`.

        Args:
            positions: The positions of their choices, shape `(policies, decisions)`.
            predictor: Who forecasts; by default `preferred`.
        """
        if (predictor or self.preferred) == SUPERPOSITION and self.superposition is not None:
            return self.superposition.losses(positions)
        scores, interactions = self.parts(predictor)
        losses: np.ndarray = self.constant + scores[positions].sum(1)
        if interactions is None:
            return losses
        return np.array(
            [loss + interactions[np.ix_(at, at)].sum() / 2 for loss, at in zip(losses, positions, strict=True)]
        )

    def to_frame(self, space: SearchSpace) -> pd.DataFrame:
        """One row per choice: `decision, side, layers, format, score` and every column.

        `score` is the first column, or half the diagonal of the first interactions.
        """
        import pandas as pd

        score = next(iter(self.columns.values()), None)
        if score is None:
            score = np.diag(next(iter(self.interactions.values()))) / 2
        rows = [
            {
                "decision": choice.decision.name,
                "side": choice.decision.side,
                "layers": " ".join(choice.decision.layers),
                "format": str(choice.format),
            }
            for choice in choices_of(space)
        ]
        return pd.DataFrame(rows).assign(score=score, **self.columns)

    def save(self, path: Path) -> None:
        """Writes all arrays to one `.npz` file, in one step."""
        arrays: dict[str, Any] = {f"column.{name}": column for name, column in self.columns.items()}
        arrays |= {f"interactions.{name}": form for name, form in self.interactions.items()}
        if self.superposition:
            arrays |= {f"superposition.{name}": array for name, array in self.superposition.arrays().items()}
        if self.linear is not None:
            arrays["linear"] = self.linear
        with replacing(path) as aside, aside.open("wb") as file:
            np.savez(file, constant=self.constant, predictor=self.predictor, **arrays)

    @classmethod
    def load(cls, path: Path) -> SensitivityTable:
        """Reads what `save` wrote."""
        with np.load(path) as file:
            arrays = {name: file[name] for name in file.files}
        kept = _within("superposition", arrays)
        return cls(
            columns=_within("column", arrays),
            interactions=_within("interactions", arrays),
            superposition=Superposition.from_arrays(kept) if kept else None,
            linear=arrays.get("linear"),
            constant=float(arrays["constant"]),
            predictor=str(arrays["predictor"]),
        )


def _within(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays whose names begin with a prefix and a dot, by the rest of their names."""
    return {name.removeprefix(f"{prefix}."): array for name, array in arrays.items() if name.startswith(f"{prefix}.")}
