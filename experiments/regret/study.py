"""A study's parts: the network, what all its policies are worth, what its choices score, and what that takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pandas as pd
from table import TableEvaluator, TablePricing, Truth, code, identity, path_of, policies_of
from units import Bench, make_bench

from search.errors import DataError
from search.policy import Policy
from search.sensitivity.scoring import score_space
from search.sensitivity.settings import SensitivitySettings
from search.sensitivity.table import SensitivityTable

HERE = Path(__file__).parent
RUNS = HERE / "runs"
SCORED = SensitivitySettings(scores=["kl", "fisher_diagonal"], interactions=["forward", "backward"])


@dataclass(frozen=True)
class Study:
    """What strategies are compared on.

    Attributes:
        bench: The network and its space.
        truth: What every policy is worth.
        evaluation_s: Seconds that one evaluation of this network takes.
        scoring_s: Seconds that scoring its choices takes.
    """

    bench: Bench
    truth: Truth
    evaluation_s: float
    scoring_s: float

    @classmethod
    def load(cls, network: str, repair: str) -> Study:
        """Calibrates a network and reads what truth.py and seconds.py measured on it.

        Raises:
            DataError: If that was another network, data or settings.
        """
        bench, truth = make_bench(network, repair), Truth.load(path_of(network, repair))
        about = identity(bench)
        if about != {name: truth.about[name] for name in about}:
            raise DataError(f"{path_of(network, repair)} is of another network, data or settings; measure it anew")
        seconds = json.loads(seconds_path(network, repair).read_text())
        return cls(bench, truth, seconds["evaluation_s"], seconds["scoring_s"])

    @property
    def repair(self) -> str:
        """What applying a choice repairs."""
        return self.bench.simulated.settings.repair

    @cached_property
    def evaluator(self) -> TableEvaluator:
        """Answers from the table."""
        return TableEvaluator(self.bench, self.truth, self.evaluation_s)

    @cached_property
    def pricing(self) -> TablePricing:
        """Remembers what policies cost."""
        known = self.bench.pricing
        return TablePricing(known.network, known.space, known.cost_model, known.workload)

    @cached_property
    def scores(self) -> SensitivityTable:
        """What every choice scores; computed once and kept in runs/."""
        bench = self.bench
        return score_space(
            bench.task, bench.simulated, bench.space, SCORED, made_from=identity(bench), store=RUNS / "scores"
        )

    @cached_property
    def policies(self) -> pd.DataFrame:
        """What every policy costs and is worth, by its code: average weight `bits`, `drop` and `certain_drop`."""
        known = policies_of(self.bench)
        qualities = [self.evaluator.measure(policy, "selection") for policy in known.values()]
        return pd.DataFrame(
            {
                "bits": [policy.average_weight_bits(self.bench.network) for policy in known.values()],
                "drop": [quality.drop for quality in qualities],
                "certain_drop": [quality.drop_high for quality in qualities],
            },
            index=pd.Index(known, name="code"),
        )

    def code(self, policy: Policy) -> str:
        """A policy's key in the table."""
        return code(policy, self.truth.about["units"])


def seconds_path(network: str, repair: str) -> Path:
    """Where it says how long an evaluation and scoring take."""
    return HERE / f"seconds_{network}_{repair}.json"
