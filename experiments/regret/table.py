"""The ground truth: what every policy of a small space is worth on the selection split, as one committed table.

`truth_NETWORK_REPAIR.csv.gz` has one row per policy: the bits of every unit's weights, the mean divergence from the
float network, and for each batch how many samples the float network has right and the policy wrong (`lost_0`, `lost_1`,
...) and the other way round (`won_0`, ...). With `truth_NETWORK_REPAIR.json`, which says what was measured, these give
the accuracy on any number of batches, and the paired drop with its interval, exactly as an evaluation does.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from units import INPUT, WEIGHTS, Bench

from hwmodels import Precision
from search.errors import UnsupportedError
from search.files import replacing, write_json
from search.plan import fingerprint
from search.policy import Policy
from search.pricing import Pricing
from search.quality.evaluate import Evaluator, Quality
from search.tasks.task import Split

HERE = Path(__file__).parent


def identity(bench: Bench) -> dict[str, Any]:
    """What a table is a table of."""
    return {
        "task": bench.task.name,
        "model_fingerprint": fingerprint(bench.task.model),
        "data_fingerprint": bench.task.fingerprint,
        "quantizer": asdict(bench.simulated.settings),
        "weight": list(WEIGHTS),
        "input": INPUT,
        "units": [list(unit.layers) for unit in bench.space.units],
    }


def code(policy: Mapping[str, Precision], units: list[list[str]]) -> str:
    """The weight bits of every unit, one digit each, as in `2448248`."""
    return "".join(str(policy[layers[0]].weight.bits) for layers in units)


@dataclass(frozen=True)
class Truth:
    """What every policy is worth.

    Attributes:
        about: What was measured, and of every batch its `samples` and how many of them the float network has `right`.
        divergence: Mean divergence from the float network in nats, by the policy's code.
        lost: Samples that only the float network has right, shape `(policies, batches)`.
        won: Samples that only the policy has right, likewise.
    """

    about: Mapping[str, Any]
    divergence: pd.Series
    lost: np.ndarray
    won: np.ndarray

    @cached_property
    def accuracy(self) -> pd.Series:
        """Share of the whole split that a policy has right, by its code."""
        right = sum(self.about["right"]) + (self.won - self.lost).sum(1)
        return pd.Series(right / sum(self.about["samples"]), self.divergence.index)

    def batches(self, fidelity: float = 1.0) -> int:
        """How many batches are measured for a share of the split."""
        return math.ceil(fidelity * len(self.about["samples"]))

    def scores(self, policy: Mapping[str, Precision], fidelity: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Scores of a policy and of the float network on the first `fidelity` of the batches, paired, in any order."""
        row = self.divergence.index.get_loc(code(policy, self.about["units"]))
        batches = self.batches(fidelity)
        lost, won = (int(counts[row, :batches].sum()) for counts in (self.lost, self.won))
        samples, right = (sum(self.about[name][:batches]) for name in ("samples", "right"))
        reference = np.repeat([1.0, 0.0], [right, samples - right])
        return np.repeat([0.0, 1.0, 0.0], [lost, right - lost + won, samples - right - won]), reference

    def save(self, path: Path) -> None:
        """Writes `path`, a `.csv.gz`, and what was measured beside it."""
        columns = {f"{name}_{b}": c for name in ("lost", "won") for b, c in enumerate(getattr(self, name).T)}
        frame = pd.DataFrame({"divergence": self.divergence.map("{:.5g}".format), **columns})
        with replacing(path) as aside:
            frame.to_csv(aside, index_label="bits", lineterminator="\n", compression={"method": "gzip", "mtime": 0})
        write_json(beside(path), dict(self.about))

    @classmethod
    def load(cls, path: Path) -> Truth:
        """Reads what `save` wrote."""
        frame = pd.read_csv(path, dtype={"bits": str}, index_col="bits")
        lost, won = (frame.filter(like=f"{name}_").to_numpy() for name in ("lost", "won"))
        return cls(json.loads(beside(path).read_text()), frame["divergence"], lost, won)


def path_of(network: str, repair: str) -> Path:
    """Where the table of a network is."""
    return HERE / f"truth_{network}_{repair}.csv.gz"


def beside(path: Path) -> Path:
    """Where it says what a table is of."""
    return path.with_name(path.name.replace(".csv.gz", ".json"))


class TableEvaluator(Evaluator):
    """Looks up in the table what an evaluation on the selection split would find, and charges what one would take.

    Args:
        bench: The network.
        truth: Its table.
        evaluation_s: Seconds that an evaluation of a policy on the whole split takes.
    """

    def __init__(self, bench: Bench, truth: Truth, evaluation_s: float = 0.0) -> None:
        super().__init__(bench.task, bench.simulated)
        self._truth = truth
        self._evaluation_s = evaluation_s

    def measure(self, policy: Mapping[str, Precision], split: Split, fidelity: float = 1.0) -> Quality:
        if split != "selection":
            raise UnsupportedError(f"the table holds the selection split, not {split}")
        self.seconds += self._evaluation_s * self._truth.batches(fidelity) / self._truth.batches()
        return self._quality(*self._truth.scores(policy, fidelity))

    def scores(self, policy: Mapping[str, Precision], split: Split, fidelity: float = 1.0) -> NoReturn:
        raise UnsupportedError("the table holds no scores per sample; use strategies that do not race")


class TablePricing(Pricing):
    """Prices every policy once for all runs: most of what strategies do here would else be pricing the same few."""

    def costs(self, policy: Policy) -> dict[str, float]:
        known = self._known.get(policy.digest)
        if known is None:
            known = self._known[policy.digest] = super().costs(policy)
        return dict(known)

    @cached_property
    def _known(self) -> dict[str, dict[str, float]]:
        return {}


def policies_of(bench: Bench) -> dict[str, Policy]:
    """Every policy of the space by its code, in the order of the table."""
    units = [list(unit.layers) for unit in bench.space.units]
    return {code(policy, units): policy for policy in bench.space}
