"""An evaluator that measures nothing twice, however often a study is run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from networks import Bench
from truth import first_batches

from hwmodels import Precision
from search.files import JsonLines
from search.policy import Policy
from search.quality.evaluate import Evaluator, Quality
from search.recover import REPAIRS
from search.tasks.task import Split

FIRST = 2000  # samples of the report split that other tools were measured on


class KeptEvaluator(Evaluator):
    """Keeps every measurement in `measured.jsonl`."""

    def __init__(self, bench: Bench, folder: Path, samples: int) -> None:
        """Creates the evaluator.

        Args:
            bench: The network.
            folder: Where measurements are kept.
            samples: How many samples of the selection split are measured, the first ones.
        """
        folder.mkdir(parents=True, exist_ok=True)
        super().__init__(bench.task, bench.simulated, folder)
        self._share = len(first_batches(bench.task, samples)) / len(list(bench.task.batches("selection")))
        self._samples = samples
        self._log = JsonLines(folder / "measured.jsonl")
        self._known = {(row["digest"], row["on"]): row for row in self._log.read()}

    def measure(self, policy: Mapping[str, Precision], split: Split, fidelity: float = 1.0) -> Quality:
        """Measures a policy on the first samples of a split, if it was not measured before."""
        on, policy = f"{split} {self._samples} {fidelity:g}", Policy(policy)
        if (policy.digest, on) not in self._known:
            quality = super().measure(policy, split, fidelity * self._share)
            self._keep(policy, on, quality.to_dict())
        return Quality.from_dict(self._known[policy.digest, on])

    def report(self, policy: Policy, repair: str | None = None) -> dict[str, Any]:
        """Measures a policy on the report split: `quality, drop, drop_low, drop_high`, and on its `first` samples.

        Args:
            policy: The policy.
            repair: A repair that is applied before.
        """
        on = f"report {repair}" if repair else "report"
        if (policy.digest, on) not in self._known:
            simulated = REPAIRS[repair](self.simulated, policy, self.task) if repair else self.simulated
            evaluator = self.of(simulated)
            scores = evaluator.scores(policy, "report")
            found = self._quality(scores, self.float_scores("report")).to_dict()
            self._keep(policy, on, found | {"first": self.task.reduce(scores[:FIRST])})
        row = self._known[policy.digest, on]
        return {"quality": row["value"], **{name: row[name] for name in ("drop", "drop_low", "drop_high", "first")}}

    def _keep(self, policy: Policy, on: str, found: dict[str, Any]) -> None:
        row = {"digest": policy.digest, "on": on, **found}
        self._log.append(row | {"policy": policy.to_dict()})
        self._known[policy.digest, on] = row
