"""Predicts what `measured.csv` holds: by the device's calibrated roofline, and by the lookup table it was fitted to.

Nothing is timed here, so that a change of a cost model can be judged at once on any machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from hwmodels import CostModel, CostReport, Lookup, Network, Precision, Roofline
from hwmodels.device import Tile, load_device
from hwmodels.interpolate import Interpolator
from hwmodels.lookup import LookupTable
from hwmodels.lookup_sites import FOLDS, point
from hwmodels.measure.fit import Counted, count
from search.policy import Policy

from .measure import HERE, WORKLOAD, subject

DEVICE = "zen4_vm"
TABLE, FLOATS = HERE / "zen4_vm.csv", HERE / "zen4_vm_floats.csv"
DIFFERENT = 0.05
"""Relative difference from which on it matters which of two is faster."""


def models() -> dict[str, CostModel]:
    """The cost models that are held against the measurements."""
    return {"roofline": Roofline(DEVICE), "lookup": Lookup(TABLE, DEVICE, FLOATS)}


def predict(measured: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Predicted beside measured: a row for each network and policy, and one for each of their layers."""
    whole, layers = [], []
    for name in measured["network"].unique():
        made = subject(name)
        mine = measured[measured["network"] == name]
        policies = made.policies | plan_of(mine)
        for model_name, model in models().items():
            for policy_name, policy in policies.items():
                rows = mine[mine["policy"] == policy_name].fillna({"layer": ""}).set_index("layer")
                if rows.empty:
                    continue
                report = model.network_cost(made.network, policy, WORKLOAD)
                whole.append(_whole(name, policy_name, model_name, rows.loc[""], report))
                more = between(model, made.network, policy)
                layers += _layers(name, policy_name, model_name, rows, report, made.network, more)
    return pd.DataFrame(whole), pd.DataFrame(layers)


def between(model: CostModel, network: Network, policy: Policy) -> dict[str, float]:
    """Seconds at boundaries by layer: of the one before a float layer, else of the one that reads."""
    found: dict[str, float] = {}
    choices = {name: (precision,) for name, precision in policy.items()}
    for one in model.cost_table(network, choices, WORKLOAD).boundaries:
        cost = one.cost(policy[one.producer], policy[one.consumer])
        charged = one.producer if policy[one.consumer].input.is_float else one.consumer
        found[charged] = found.get(charged, 0.0) + cost.latency_s
    return found


def plan_of(rows: pd.DataFrame) -> dict[str, Policy]:
    """The plan of a search that was timed with a network, as `plan`; nothing where there was none."""
    chosen = rows[(rows["policy"] == "plan") & rows["precision"].notna()]
    found = {layer: Precision.parse(one) for layer, one in zip(chosen["layer"], chosen["precision"], strict=True)}
    return {"plan": Policy(found)} if found else {}


def _whole(network: str, policy: str, model: str, row: Any, report: CostReport) -> dict[str, Any]:
    low, high = report.interval
    return {
        "network": network,
        "policy": policy,
        "model": model,
        "measured_s": row["p20_s"],
        "median_s": row["p50_s"],
        "predicted_s": report.total.latency_s,
        "low_s": low,
        "high_s": high,
    }


def _layers(
    network: str,
    policy: str,
    model: str,
    rows: pd.DataFrame,
    report: CostReport,
    layers: Network,
    more: dict[str, float],
) -> Iterator[dict[str, Any]]:
    for layer in layers:
        if layer.name in rows.index:
            row = rows.loc[layer.name]
            yield {
                "network": network,
                "policy": policy,
                "model": model,
                "layer": layer.name,
                "kind": "depthwise" if layer.is_depthwise else layer.kind,
                "precision": row["precision"],
                "operation": row["operation"],
                "tier": report.layers[layer.name].tier,
                "measured_s": row["p20_s"],
                "predicted_s": report.layers[layer.name].cost.latency_s + more.get(layer.name, 0.0),
            }


def summary(whole: pd.DataFrame, layers: pd.DataFrame) -> pd.DataFrame:
    """Errors of whole networks, signs of differences over 5% between a network's policies, and errors per layer."""
    rows = []
    for (model, network), mine in whole.groupby(["model", "network"]):
        error = np.abs(mine["predicted_s"] / mine["measured_s"] - 1)
        pairs = list(itertools.combinations(mine[["measured_s", "predicted_s"]].to_numpy(), 2))
        apart = [(a, b) for a, b in pairs if abs(np.log(a[0] / b[0])) > np.log1p(DIFFERENT)]
        right = [(a[0] < b[0]) == (a[1] < b[1]) for a, b in apart]
        inside = (mine["low_s"] <= mine["measured_s"]) & (mine["measured_s"] <= mine["high_s"])
        single = layers[(layers["model"] == model) & (layers["network"] == network)]
        layer_error = np.abs(single["predicted_s"] / single["measured_s"] - 1)
        rows.append(
            {
                "model": model,
                "network": network,
                "policies": len(mine),
                "whole_median_error": error.median(),
                "whole_largest_error": error.max(),
                "within_interval": inside.mean(),
                "pairs_apart": len(apart),
                "sign_right": float(np.mean(right)) if right else float("nan"),
                "layer_median_error": layer_error.median(),
            }
        )
    return pd.DataFrame(rows)


def path_errors() -> pd.DataFrame:
    """Median error of each path's fit, and of interpolation between its timings, at sites that were held out."""
    device, rows = load_device(DEVICE), []
    for path in (TABLE, FLOATS):
        for name, counted in count(LookupTable.read(path), device).items():
            if path == FLOATS and not name.endswith("dequantized"):
                continue  # products of matrices keep their kernels: fitted to the other table
            known = device.calibration[name]
            timings = [row.timing for row in counted]
            points, seconds = np.stack([point(one.site) for one in timings]), np.array([one.p50_s for one in timings])
            limits = np.array([_limit(row) for row in counted])
            predicted = Interpolator(points, limits, seconds).held_out(np.arange(len(timings)), FOLDS)
            rows.append(
                {
                    "path": name,
                    "timings": len(timings),
                    "fit_median_error": known.holdout_error.number if known.holdout_error else float("nan"),
                    "lookup_median_error": float(np.median(np.abs(predicted / seconds - 1))),
                    "sigma": known.sigma.number,
                }
            )
    return pd.DataFrame(rows)


def _limit(row: Counted) -> float:
    """Seconds of the raw roofline: what interpolation is of shares of."""
    return max(row.operations(Tile()) / row.peak, row.traffic / row.bandwidth)
