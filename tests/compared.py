"""Run directories to compare, written by hand: tasks, devices, strategies, seeds, and every way to end."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import pandas as pd

from search.events import EventLog
from search.plan import Plan, PlannedBudget, PlannedCost
from search.policy import Policy
from search.rundir import RunDirectory
from tests.rundirs import HISTORY, MEASURED, make_plan, measure, start

FLOAT = 0.96
LAYERS = ("conv", "fc")
FLOAT_LAYER_BYTES, OTHER_BYTES = 240.0, 7.0


def write_run(path: Path, **about: Any) -> RunDirectory:
    """A search that was started; `about` changes what run.json says, `config` in it setting by setting."""
    run = start(path, run_id=uuid4().hex)
    config = {
        "strategy": {"evaluations": 4},
        "budget": {"size_ratio": 0.14},
        "sensitivity": {"seed": about.get("seed", 0)},
        "workload": {"batch": 1},
        "seed": about.get("seed", 0),
        "run_dir": str(path),
    }
    run.update(**about | {"config": config | about.get("config", {})})
    run.write_layers(
        [
            {
                "name": "conv",
                "kind": "conv2d",
                "groups": 1,
                "kernel": [1, 1],
                "weight_shape": [2, 3],
                "channel_axis": 0,
            },
            {"name": "fc", "kind": "linear", "groups": 1, "kernel": [], "weight_shape": [2, 3], "channel_axis": 0},
        ]
    )
    return run


def layer_bytes(weight: str) -> float:
    return FLOAT_LAYER_BYTES if weight == "float" else 10.0 * int(weight.removeprefix("int"))


def write_plan(
    run: RunDirectory,
    precisions: Sequence[str],
    value: float,
    selection_drop: float,
    verdict: str,
    latency: float = 1e-3,
) -> Plan:
    """A plan whose layers store 10 bytes a bit, and the network 7 beside them; its latency is in the layers alone."""
    about, usual = run.info(), make_plan()
    pairs = [precision.split("/") for precision in precisions]
    layers = tuple(
        layer.model_copy(
            update={"weight": weight, "input": input_, "weight_bytes": layer_bytes(weight), "latency_s": latency / 2}
        )
        for layer, (weight, input_) in zip(usual.layers, pairs, strict=True)
    )
    total = sum(layer.weight_bytes for layer in layers) + OTHER_BYTES
    drop = FLOAT - value
    quality = {"value": value, "float_value": FLOAT, "drop": drop, "drop_low": drop - 0.01, "drop_high": drop + 0.01}
    plan = usual.model_copy(
        update={
            "task": about["task"],
            "hardware": about["hardware"],
            "strategy": about["strategy"],
            "seed": about["seed"],
            "digest": Policy.from_dict(dict(zip(LAYERS, precisions, strict=True))).digest,
            "layers": layers,
            "budget": PlannedBudget(limits=about["budget"], reference="float", verdict=verdict),
            "cost": {
                "weight_bytes": PlannedCost(value=total, reference=2 * FLOAT_LAYER_BYTES + OTHER_BYTES, tier="exact"),
                "latency_s": PlannedCost(value=latency, reference=2e-3, tier="datasheet"),
                "bit_ops": PlannedCost(value=18.0, reference=2048.0, tier="exact"),
                "energy_j": PlannedCost(value=None, reference=None, tier="unknown"),
            },
            "quality": usual.quality.model_copy(update=quality),
            "selection": usual.selection.model_copy(update={"drop": selection_drop}),
        }
    )
    run.file("plan.json").write_text(json.dumps(plan.model_dump(by_alias=True, mode="json")))
    return plan


def write_front(run: RunDirectory, points: Sequence[tuple[str, str, float, float]]) -> None:
    """Writes front.csv from roles, names, bytes and qualities; every drop is known to a hundredth."""
    rows = []
    for role, name, size, value in points:
        drop = FLOAT - value
        row = {"role": role, "name": name, "trial": None, "digest": name, "quality": value, "drop": drop}
        row |= {"drop_low": drop - 0.01, "drop_high": drop + 0.01, "weight_bytes": size, "latency_s": size / 1e5}
        rows.append(row | {"energy_j": None, "average_weight_bits": size / 20, "verdict": "met", "policy": "{}"})
    run.write_table("front.csv", pd.DataFrame(rows).astype({"trial": "Int64"}))


def finished(
    path: Path,
    precisions: Sequence[str] = ("int4/uint8", "int4/uint8"),
    value: float = 0.94,
    selection_drop: float = 0.01,
    verdict: str = "met",
    history: Mapping[str, Sequence[float]] = HISTORY,
    latency: float = 1e-3,
    primary_cost: str = "weight_bytes",
    **about: Any,
) -> RunDirectory:
    """A search that found a plan."""
    run = write_run(path, **about)
    plan = write_plan(run, precisions, value, selection_drop, verdict, latency)
    size = plan.cost["weight_bytes"].value
    assert size is not None
    baselines = [("float", "float", 487.0, FLOAT), ("uniform", "uniform int8/uint8", 167.0, 0.95)]
    write_front(
        run,
        [
            *baselines,
            ("uniform", "uniform int4/uint8", 87.0, 0.5),
            ("front", "trial 0", 127.0, 0.955),
            ("winner", "trial 3", size, value),
        ],
    )
    run.write_table("history.csv", pd.DataFrame(history))
    run.file("report.html").write_text("report")
    run.update(
        status="finished",
        seconds=60.0,
        verdict=verdict,
        evaluations=4,
        limits={"weight_bytes": 100.0} if "quality_drop" not in run.info()["budget"] else {},
        primary_cost=primary_cost,
    )
    return run


def failed(path: Path, error: str = "InfeasibleError: the budget cannot be met", **about: Any) -> RunDirectory:
    run = write_run(path, status="failed", **about)
    log = EventLog(run.file("log.jsonl"))
    log.write("started", run_id="x")
    log.write("failed", error=error, kind=error.partition(":")[0])
    return run


def unfinished(path: Path, **about: Any) -> RunDirectory:
    """A search that says that it runs, and does not: as one that was killed leaves it."""
    run = write_run(path, **about)
    measure(run, MEASURED)
    return run


def many_arms(folder: Path, arms: int = 12) -> list[RunDirectory]:
    """Searches of one task that differ in long settings, over two costs, and some within an allowed drop."""
    formats = [f"int{bits}" for bits in range(2, 9)]
    runs = []
    for number in range(arms):
        config = {"space": {"weight": formats[number % 3 :]}, "strategy": {"evaluations": 4 + number}}
        budget = {"quality_drop": 0.05} if number % 4 == 0 else {"size_ratio": 0.14 + number / 100}
        runs.append(
            finished(
                folder / str(number),
                primary_cost="latency_s" if number % 4 == 1 else "weight_bytes",
                hardware="a device with a name of many words",
                strategy="random",
                metric="mAP50",
                budget=budget,
                config=config,
            )
        )
    return [*runs, finished(folder / "other", hardware="storage", metric="mAP50")]


def sweep(folder: Path) -> list[RunDirectory]:
    """Two tasks, two devices, two strategies and seeds; one run failed, and one was killed."""
    runs, number = [], 0
    for task in ("digits", "text"):
        for hardware in ("storage", "zen5"):
            for strategy in ("random", "solver"):
                for seed in (0, 1):
                    if task == "text" and (hardware, strategy) != ("zen5", "solver"):
                        continue
                    precisions = ("int3/uint8", "int4/uint8") if strategy == "solver" else ("int4/uint8", "int4/uint4")
                    about = {"task": task, "hardware": hardware, "strategy": strategy, "seed": seed}
                    value = 0.94 + 0.01 * (strategy == "solver") + 0.001 * seed
                    latency = 1e-3 if hardware == "zen5" else 5e-4
                    runs.append(
                        finished(
                            folder / str(number),
                            precisions,
                            value,
                            selection_drop=0.01 - 0.002 * seed,
                            latency=latency,
                            **about,
                        )
                    )
                    number += 1
    runs.append(failed(folder / str(number), task="digits", hardware="zen5", strategy="tpe", seed=0))
    runs.append(unfinished(folder / str(number + 1), task="digits", hardware="zen5", strategy="tpe", seed=1))
    return runs
