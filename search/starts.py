"""Where strategies start from: the solver's plans, an earlier run's, or a plan's policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from hwmodels import Precision
from search.errors import ConfigError, DataError
from search.objective import Objective
from search.pareto import front as non_dominated
from search.plan import Plan
from search.policy import Policy
from search.rundir import RunDirectory
from search.strategies.base import SOLVER, Strategy
from search.strategies.forecaster import forecasters
from search.strategies.projection import Projection

MOST = 8  # starting policies: what is measured first should leave evaluations to the strategy
ALONG = 5  # points of the front that the solver gives where the front is what is looked for


def starting_policies(strategy: Strategy, objective: Objective, seed: int = 0) -> list[Policy]:
    """Finds the policies that a strategy was told to start from, best first, brought within the limits.

    Args:
        strategy: Its `start_from` says where they come from.
        objective: The space, prices, limits, and sensitivities where the solver needs them.
        seed: Seed of the solver.

    Raises:
        ConfigError: If there is no run and no plan at the given path, or none of its policies lies in the space.
    """
    strategy.check_sources()
    source = strategy.start_from
    if source is None:
        return []
    if source == SOLVER:
        points = [tuple(point) for point in solver_points(objective, strategy.costs, seed).tolist()]
    else:
        points = _encoded(objective, _recorded(Path(source)), source)
    projection = Projection(objective.pricing, objective.limits)
    within = dict.fromkeys(map(projection.nearest, points))
    return [objective.space.decode(point) for point in within][:MOST]


def solver_points(objective: Objective, costs: Sequence[str] = (), seed: int = 0) -> np.ndarray:
    """The solver's plans, shape `(plans, decisions)`.

    Every predictor's optimum where the budget limits costs; points along the preferred predictor's front where it
    limits the drop of quality, or where the front against `costs` is what is looked for.
    """
    pricing, space = objective.pricing, objective.space
    limits = {name: limit - pricing.fixed.get(name, 0.0) for name, limit in objective.limits.items()}
    sources = forecasters(objective.sensitivity, pricing, seed)
    found = [] if objective.quality_drop is not None else [source.best(limits, 1) for source in sources]
    against = costs or ((objective.primary_cost,) if objective.quality_drop is not None else ())
    for cost in against:
        found.append(sources[0].front(cost, ALONG, limits)[::-1])
    return np.concatenate([np.empty((0, len(space.decisions)), dtype=np.int64), *found])


def _recorded(path: Path) -> list[Policy]:
    """The policies of a plan, or of a run: its winner, then its front by rising drop."""
    if path.is_file():
        return [Plan.load(path).policy]
    try:
        run = RunDirectory.existing(path)
    except DataError as error:
        raise ConfigError(
            f"strategy.start_from={path}: {error}; give solver, a run directory or a plan.json"
        ) from error
    plan = run.plan()
    complete = [trial for trial in run.trials() if trial.is_whole]
    cost = run.info().get("primary_cost", "weight_bytes")
    priced = [trial for trial in complete if trial.cost.get(cost) is not None]
    losses = np.array([[trial.cost[cost], trial.drop] for trial in priced], dtype=float).reshape(-1, 2)
    best = [trial for trial, kept in zip(priced, non_dominated(losses, (False, False)), strict=True) if kept]
    return ([plan.policy] if plan else []) + [trial.policy for trial in sorted(best, key=lambda trial: trial.drop)]


def _encoded(objective: Objective, policies: Iterable[Mapping[str, Precision]], source: str) -> list[tuple[int, ...]]:
    """The points of those policies that lie in the space."""
    points, reasons = [], []
    for policy in policies:
        unknown = [layer for layer in objective.pricing.network.names if layer not in policy]
        if unknown:
            raise ConfigError(f"strategy.start_from={source} is of another network: it says nothing about {unknown[0]}")
        try:
            points.append(objective.space.encode(policy))
        except ConfigError as error:
            reasons.append(str(error))
    if not points:
        why = reasons[0] if reasons else "nothing was measured there"
        raise ConfigError(f"strategy.start_from={source} has no policy of this space: {why}")
    return points
