"""A trained agent: proposes a policy for any budget in milliseconds, and can be kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from stable_baselines3.common.base_class import BaseAlgorithm

from search.errors import ConfigError, DataError, InfeasibleError
from search.files import replacing, write_json
from search.policy import Policy
from search.pricing import Pricing
from search.sensitivity.choices import starts_of
from search.sensitivity.table import SensitivityTable
from search.space import SearchSpace
from search.strategies.rl.course import FEATURES, Course, Walk, features_of, settle
from search.strategies.rl.learner import CLASSES

FOLDER, WEIGHTS, ABOUT = "agent", "agent.zip", "agent.json"
VERSION = 1


class Agent:
    """An agent and the space that it was trained on.

    Attributes:
        algorithm: Its algorithm.
        model: What Stable-Baselines3 trains.
        names: The costs whose limits it was trained to keep, in the order in which it sees them.
        about: What it was trained on, as `describe` has it.
    """

    def __init__(self, algorithm: str, model: BaseAlgorithm, about: Mapping[str, Any]) -> None:
        """Puts an agent together.

        Args:
            algorithm: Its algorithm.
            model: What Stable-Baselines3 trains.
            about: The space, its features, their scaling, its predicted losses and the limits, as `describe` has them.
        """
        self.algorithm = algorithm
        self.model = model
        self.names = tuple(about["limits"])
        self.about = dict(about)
        self._last: Course | None = None

    def propose(self, pricing: Pricing, limits: Mapping[str, float]) -> Policy:
        """What it would choose within limits, always a policy that keeps them.

        Args:
            pricing: The space it was trained on, priced on any device.
            limits: Absolute limits on exactly the costs of `names`.

        Raises:
            ConfigError: If it was trained on another space or for limits on other costs.
            InfeasibleError: If no policy keeps the limits.
        """
        reason = self.refusal(pricing, limits)
        if reason:
            raise ConfigError(reason)
        try:
            return pricing.space.decode(self.walk(self.course(pricing), limits))
        except ValueError as error:
            raise InfeasibleError(f"no policy of the agent's space keeps the budget: {error}") from error

    def along(self, pricing: Pricing, limits: Mapping[str, float], cost: str, count: int) -> list[Policy]:
        """Proposals at so many limits on one cost, evenly spaced from tight to wide; the other limits stay.

        Raises:
            ConfigError: As `propose` does.
        """
        course = self.course(pricing)
        least, most = course.least()[cost], min(course.most()[cost], limits.get(cost, np.inf))
        caps = least + (most - least) * np.arange(1, count + 1) / count
        return list(dict.fromkeys(self.propose(pricing, {**limits, cost: float(cap)}) for cap in caps))

    def refusal(self, pricing: Pricing, limits: Mapping[str, float]) -> str | None:
        """Why it cannot answer for a space and limits; None where it can."""
        if described(pricing.space) != self.about["space"]:
            return f"the agent was trained on another space: {self._difference(pricing.space)}"
        if not np.allclose(features_of(pricing), self.about["features"], rtol=0, atol=1e-5):
            return "the agent was trained on another network, whose layers have these names but other shapes"
        if set(limits) != set(self.names):
            given = ", ".join(limits) or "nothing"
            return f"the agent was trained for limits on {', '.join(self.names) or 'nothing'}, not on {given}"
        return None

    def course(self, pricing: Pricing) -> Course:
        """The walk over a priced space as the agent knows it; kept for the last space that was asked for."""
        if self._last is None or self._last.pricing is not pricing:
            self._last = course_of(pricing, self.about)
        return self._last

    def walk(self, course: Course, limits: Mapping[str, float]) -> tuple[int, ...]:
        """Walks without chance; returns the point that it ends with, within the limits.

        Raises:
            ValueError: If no point keeps them.
        """
        walk = Walk(course, limits)
        actions: list[float] = []
        while not walk.is_over:
            action, _ = self.model.predict(walk.observation(), deterministic=True)
            actions.append(float(action[0]))
            walk.take(actions[-1])
        return settle(course, limits, actions)

    def save(self, folder: Path) -> None:
        """Writes `agent.zip`, by Stable-Baselines3, and `agent.json`, what it was trained on, each in one step."""
        with replacing(folder / WEIGHTS) as aside, aside.open("wb") as file:
            self.model.save(file)
        digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
        write_json(folder / ABOUT, {"version": VERSION, "algorithm": self.algorithm, "digest": digest, **self.about})

    @classmethod
    def load(cls, path: Path) -> Agent:
        """Reads what `save` wrote. The archive holds pickled objects: load only agents you trust.

        Args:
            path: The folder, or the run directory that holds it.

        Raises:
            DataError: If there is no agent, or its files do not belong together.
        """
        folder = path / FOLDER if (path / FOLDER / ABOUT).is_file() else path
        if not (folder / ABOUT).is_file() or not (folder / WEIGHTS).is_file():
            raise DataError(
                f"{path} holds no agent: there is no {ABOUT} with {WEIGHTS}; give the directory of a finished run of "
                "strategy=rl, or the folder that an agent was saved to"
            )
        try:
            about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise DataError(f"{folder / ABOUT} is damaged ({error}); train the agent anew") from error
        if (
            not isinstance(about, dict)
            or about.pop("version", None) != VERSION
            or about.get("algorithm") not in CLASSES
        ):
            raise DataError(f"{folder / ABOUT} is not the description of an agent that this version can read")
        if hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest() != about.pop("digest", None):
            raise DataError(f"{folder / WEIGHTS} is damaged, or not the agent that {ABOUT} describes; train it anew")
        algorithm = about.pop("algorithm")
        return cls(algorithm, CLASSES[algorithm].load(folder / WEIGHTS, device="cpu"), about)

    def _difference(self, space: SearchSpace) -> str:
        """The first decision in which two spaces differ."""
        trained, given = self.about["space"], described(space)
        if len(trained) != len(given):
            return f"one of {len(trained)} decisions, not {len(given)}"
        first, second = next((a, b) for a, b in zip(trained, given, strict=True) if a != b)
        return f"it knows the {_words(first)}, here is the {_words(second)}"


def describe(pricing: Pricing, names: Sequence[str], table: SensitivityTable) -> dict[str, Any]:
    """What an agent has to know of a space to be trained on it, as JSON holds it."""
    features = features_of(pricing)
    return {
        "limits": list(names),
        "space": described(pricing.space),
        "feature_names": list(FEATURES),
        "features": features.tolist(),
        "scaling": [features.min(0).tolist(), features.max(0).tolist()],
        "losses": predicted_losses(pricing.space, table).tolist(),
    }


def course_of(pricing: Pricing, about: Mapping[str, Any]) -> Course:
    """The walk over a priced space with what an agent knows of it."""
    return Course(pricing, about["limits"], np.array(about["scaling"]), np.array(about["losses"]))


def described(space: SearchSpace) -> list[dict[str, Any]]:
    """The decisions of a space as JSON holds them."""
    return [
        {"side": d.side, "name": d.name, "layers": list(d.layers), "formats": list(map(str, d.formats))}
        for d in space.decisions
    ]


def predicted_losses(space: SearchSpace, table: SensitivityTable) -> np.ndarray:
    """What every format alone is predicted to lose above its decision's best, shape `(decisions, most formats)`.

    Square roots of shares of the largest, so in [0, 1], rounded to what single precision holds.
    """
    scores, interactions = table.parts()
    single = scores if interactions is None else scores + np.diagonal(interactions) / 2
    losses = np.zeros((len(space.decisions), max(len(decision.formats) for decision in space.decisions)))
    for row, start, decision in zip(losses, starts_of(space), space.decisions, strict=True):
        lost = single[start : start + len(decision.formats)]
        row[: len(lost)] = lost - lost.min()
    largest = float(losses.max())
    return np.round(np.sqrt(losses / largest), 6) if largest > 0 else losses


def _words(decision: Mapping[str, Any]) -> str:
    return f"{decision['side']} of {decision['name']} in {'/'.join(decision['formats'])}"
