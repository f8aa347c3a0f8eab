"""Run directories written by hand, as a search leaves them at its start, on its way and at its end."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch

from search.plan import MeasuredQuality, ModelRecord, Plan, PlannedBudget, PlannedCost, PlannedLayer, TensorFile, pack
from search.policy import Policy
from search.quantize.settings import QuantizerSettings
from search.rundir import RunDirectory
from search.trials import Trial, TrialLog

STARTED = 1_700_000_000.25
POLICIES = [
    Policy.from_dict({"conv": "int8/uint8", "fc": "int4/uint8"}),
    Policy.from_dict({"conv": "int4/uint8", "fc": "int4/uint8"}),
    Policy.from_dict({"conv": "int2/uint8", "fc": "int4/uint8"}),
]
MEASURED = [
    Trial(0, POLICIES[0], 1.0, {"quality": 0.9, "predicted": 0.1}, {"weight_bytes": 80.0}, 2.0, "complete"),
    Trial(1, POLICIES[1], 0.5, {"quality": 0.99}, {"weight_bytes": 60.0}, 1.0, "complete"),
    Trial(2, POLICIES[2], 1.0, {}, {"weight_bytes": 40.0, "latency_s": None}, 0.0, "infeasible"),
    Trial(3, POLICIES[1], 1.0, {"quality": 0.95, "drop_low": None}, {"weight_bytes": 60.0}, 2.0, "complete"),
    Trial(4, POLICIES[2], 1.0, {"quality": 0.7}, {"weight_bytes": 40.0}, 2.0, "complete"),
]

HISTORY = {
    "trial": [0, 1, 3, 4],
    "evaluations": [1.0, 1.5, 2.5, 3.5],
    "seconds": [2.0, 3.0, 5.0, 7.0],
    "best_loss": [0.1, 0.1, 0.05, 0.05],
    "hypervolume": [0.4, 0.4, 0.5, 0.6],
    "primary_hypervolume": [0.5, 0.5, 0.6, 0.7],
}


def start(path: Path, run_id: str = "a" * 32) -> RunDirectory:
    """Writes what a run directory holds when a search starts."""
    run = RunDirectory(path)
    run.update(
        run_id=run_id,
        started=STARTED,
        task="digits",
        hardware="zen5",
        strategy="solver",
        seed=0,
        metric="accuracy",
        higher_is_better=True,
        model={"name": "ResNet", "fingerprint": "f00d"},
        data_fingerprint="beef",
        budget={"size_ratio": 0.14},
        budget_reference="float",
        git_commit="0123abc",
        status="running",
        config={
            "seed": 0,
            "space": {"pins": {"layers.*": "int8"}, "weight": ["int4", "int8"]},
            "tracking": {"uri": None},
            "run_root": "runs",
        },
    )
    run.write_layers([])
    return run


def measure(run: RunDirectory, trials: list[Trial]) -> None:
    log = TrialLog(run.file("trials.jsonl"))
    for trial in trials:
        log.append(trial)


def write_front(run: RunDirectory, trials: list[tuple[str, Trial]]) -> None:
    rows = [{"role": "float", "name": "float", "trial": None, "digest": "d", "quality": 1.0, "policy": "{}"}]
    for role, trial in trials:
        row = {"role": role, "name": f"trial {trial.number}", "trial": trial.number, "digest": trial.digest}
        row |= {"quality": trial.quality, "drop_low": None, "average_weight_bits": 4.5, "verdict": "met"}
        rows.append(row | {"policy": json.dumps(trial.policy.to_dict())})
    run.write_table("front.csv", pd.DataFrame(rows).astype({"trial": "Int64"}))


def finish(run: RunDirectory) -> None:
    """Writes what a search adds at its end."""
    write_front(run, [("front", MEASURED[0]), ("winner", MEASURED[3])])
    run.write_table("history.csv", pd.DataFrame(HISTORY))
    make_plan().save(run.file("plan.json"))
    for name in ("report.html", "figures/front.png", ".hydra/config.yaml"):
        run.file(name).parent.mkdir(exist_ok=True)
        run.file(name).write_text(name)
    run.update(status="finished", finished=STARTED + 60, seconds=60.0, digest="abc", verdict="met", evaluations=4)


def make_plan() -> Plan:
    layers = tuple(
        PlannedLayer(
            name=name,
            kind="linear",
            weight=str(precision.weight),
            input=str(precision.input),
            weight_shape=(2, 3),
            channel_axis=0,
            quantizes_input=True,
            reads=(),
            compute="float32",
            latency_s=None,
            energy_j=None,
            weight_bytes=30.0,
            bit_ops=9.0,
        )
        for name, precision in POLICIES[1].items()
    )
    tensors = {f"{layer.name}/weight_scale": torch.ones(2) for layer in layers}
    tensors |= {f"{layer.name}/input_scale": torch.tensor(1.0) for layer in layers}
    tensors |= {f"{layer.name}/input_zero_point": torch.tensor(0) for layer in layers}
    selection = MeasuredQuality(
        split="selection",
        metric="accuracy",
        higher_is_better=True,
        value=0.95,
        float_value=0.96,
        samples=350,
        drop=0.01,
        drop_low=0.0,
        drop_high=0.02,
    )
    return Plan(
        schema="bitplan/1",
        digest=POLICIES[1].digest,
        task="digits",
        model=ModelRecord(name="ResNet", fingerprint="f00d", folded=()),
        data_fingerprint="beef",
        hardware="zen5",
        workload={"batch": 1},
        strategy="solver",
        seed=0,
        quantizer=asdict(QuantizerSettings()),
        recover=(),
        space={},
        budget=PlannedBudget(limits={"size_ratio": 0.14}, reference="float", verdict="met"),
        average_weight_bits=4.0,
        effective_bits=4.2,
        cost={
            "weight_bytes": PlannedCost(value=60.0, reference=480.0, tier="exact"),
            "energy_j": PlannedCost(value=None, reference=None, tier="unknown"),
        },
        cost_source="closed form",
        quality=selection.model_copy(update={"split": "report", "value": 0.94}),
        selection=selection,
        layers=layers,
        points=(),
        versions={},
        config={},
        tensors=TensorFile(file="plan.safetensors", sha256=hashlib.sha256(pack(tensors, {})).hexdigest()),
    ).with_tensors(tensors, {})
