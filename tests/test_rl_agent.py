"""A trained agent: kept, found again, and asked about budgets it was not trained for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from synthetic import Synthetic, make_synthetic
from tiny import make_bench

from search.errors import ConfigError, DataError, InfeasibleError
from search.strategies.rl.agent import Agent
from search.strategies.rl.strategy import ALGORITHMS, Rl

QUICK = {"episodes": 4, "warmup": 4, "updates": 1, "batch": 16, "hidden": (8,)}


@pytest.fixture(scope="module")
def synthetic() -> Synthetic:
    return make_synthetic()


def trained(synthetic: Synthetic, folder: Path, algorithm: str = "DDPG", evaluations: int = 4, **settings) -> Rl:
    strategy = Rl(evaluations, algorithm=algorithm, **QUICK | settings)
    synthetic.search(strategy, folder / f"{algorithm}_{evaluations}.jsonl")
    return strategy


def budgets(synthetic: Synthetic) -> list[dict[str, float]]:
    costs = synthetic.bench.costs("weight_bytes")
    return [{"weight_bytes": float(np.quantile(costs, share))} for share in (0, 0.05, 0.3, 0.6, 1)]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_a_loaded_agent_proposes_what_the_saved_one_did(algorithm: str, synthetic: Synthetic, tmp_path: Path) -> None:
    strategy, pricing = trained(synthetic, tmp_path, algorithm), synthetic.bench.pricing
    strategy.keep(tmp_path / "run", None, [])
    assert sorted(path.name for path in (tmp_path / "run" / "agent").iterdir()) == ["agent.json", "agent.zip"]
    for path in (tmp_path / "run", tmp_path / "run" / "agent"):
        loaded = Agent.load(path)
        assert (loaded.algorithm, loaded.names) == (algorithm, ("weight_bytes",))
        for limits in budgets(synthetic):
            policy = loaded.propose(pricing, limits)
            assert policy == strategy.trained.propose(pricing, limits)
            assert pricing.costs(policy)["weight_bytes"] <= limits["weight_bytes"]


def test_proposals_along_a_cost(synthetic: Synthetic, tmp_path: Path) -> None:
    agent, pricing = trained(synthetic, tmp_path).trained, synthetic.bench.pricing
    limit = float(np.median(synthetic.bench.costs("weight_bytes")))
    found = agent.along(pricing, {"weight_bytes": limit}, "weight_bytes", 5)
    assert 1 < len(set(found)) == len(found) <= 5
    assert all(pricing.costs(policy)["weight_bytes"] <= limit for policy in found)


def test_an_agent_goes_on_where_it_was_left(synthetic: Synthetic, tmp_path: Path) -> None:
    first = trained(synthetic, tmp_path)
    first.keep(tmp_path / "run", None, [])
    walked = first.trained.model.num_timesteps
    second = trained(synthetic, tmp_path, evaluations=3, agent=str(tmp_path / "run"), demonstrations=False)
    assert second.trained.model.num_timesteps == walked + 3 * QUICK["episodes"] * len(synthetic.bench.space.free)
    with pytest.raises(ConfigError, match=r"was trained with DDPG, not SAC; set strategy.algorithm=DDPG"):
        trained(synthetic, tmp_path, "SAC", agent=str(tmp_path / "run"))
    with pytest.raises(DataError, match="holds no agent"):
        trained(synthetic, tmp_path, evaluations=2, agent=str(tmp_path / "nowhere"))


def test_it_refuses_what_it_was_not_trained_on(synthetic: Synthetic, tmp_path: Path) -> None:
    agent = trained(synthetic, tmp_path).trained
    pricing, (limits, *_) = synthetic.bench.pricing, budgets(synthetic)
    assert agent.refusal(pricing, limits) is None
    other = make_bench(weight=("int2", "int4", "int6")).pricing
    with pytest.raises(ConfigError, match=r"another space: it knows the weight of stem in int2/int4/int8"):
        agent.propose(other, limits)
    tied = make_bench(ties=[["left", "right"]]).pricing
    with pytest.raises(ConfigError, match="another space: one of 7 decisions, not"):
        agent.propose(tied, limits)
    layers = tuple(replace(layer, macs=2 * layer.macs) for layer in pricing.network.layers)
    with pytest.raises(ConfigError, match="another network, whose layers have these names but other shapes"):
        agent.propose(replace(pricing, network=replace(pricing.network, layers=layers)), limits)
    with pytest.raises(ConfigError, match="trained for limits on weight_bytes, not on bit_ops"):
        agent.propose(pricing, {"bit_ops": 1.0})
    with pytest.raises(InfeasibleError, match="no policy of the agent's space keeps the budget"):
        agent.propose(pricing, {"weight_bytes": 1.0})


def test_damaged_files(synthetic: Synthetic, tmp_path: Path) -> None:
    trained(synthetic, tmp_path).keep(tmp_path, None, [])
    about, weights = tmp_path / "agent" / "agent.json", tmp_path / "agent" / "agent.zip"
    text, archive = about.read_text(), weights.read_bytes()
    weights.write_bytes(archive[:-1])
    with pytest.raises(DataError, match="is damaged, or not the agent"):
        Agent.load(tmp_path)
    weights.write_bytes(archive)
    about.write_text(text[:100])
    with pytest.raises(DataError, match="is damaged"):
        Agent.load(tmp_path)
    about.write_text(json.dumps(json.loads(text) | {"version": 99}))
    with pytest.raises(DataError, match="not the description of an agent that this version can read"):
        Agent.load(tmp_path)
    weights.unlink()
    with pytest.raises(DataError, match="holds no agent"):
        Agent.load(tmp_path)
