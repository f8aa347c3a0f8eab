"""Times whole networks through ONNX Runtime on this machine: fp32, int8 everywhere, and mixed layer by layer.

Networks and policies are those of the project's tasks, exported as a plan would be. All variants of a network are timed
turn by turn in one process of one pinned thread, so that whatever drifts, drifts for all; where the time goes within
each is read from ONNX Runtime's own profile in further runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hwmodels import Network, Precision, Workload
from hwmodels.measure.passes import draw_nothing
from search.backends.onnx_capture import call_arguments, capture
from search.backends.onnx_quantize import quantized, save
from search.backends.verify import single
from search.config import Job, compose, make_job
from search.files import replacing
from search.policy import Policy
from search.quantize.fold import fold_batch_norm
from search.quantize.simulate import QuantizedModel
from search.tasks.task import tensors_in
from search.trace import trace

HERE = Path(__file__).parent
NETWORKS = {
    "digits": ["task=digits"],
    "resnet20": ["task=fashion_mnist"],
    "mobilenetv2": ["task=fashion_mnist", "task.model=mobilenetv2"],
    "text": ["task=text"],
}
MIXES = 6
"""Random mixes of int8 and float layers per network."""
Operation = dict[str, Any]
"""One operation of a profile, as `worker.operations` has it."""
FLOAT, INT8 = Precision.parse("float"), Precision.parse("int8/uint8")
WORKLOAD = Workload(batch=1, threads=1)
WARMUP, RUNS, PROFILED = 10, 100, 60
NOTHING = "nothing"
"""The network that hands on its input: what running one takes at all."""
PREPARING = ("QuantizeLinear", "DequantizeLinear", "Transpose", "ReorderInput", "ReorderOutput")
"""Operations that bring a layer's input or weights into the form its kernel reads: they count as the layer's."""


@dataclass(frozen=True)
class Subject:
    """A network with the policies it is timed at.

    Attributes:
        job: The task with its model, and the quantizer.
        folded: The model, batch norm folded.
        network: As traced.
        policies: By name: `float`, `int8`, `mix1`, ...
    """

    job: Job
    folded: torch.nn.Module
    network: Network
    policies: dict[str, Policy]

    def simulated(self) -> QuantizedModel:
        """The model with ranges found on a batch, ready to be exported at any policy."""
        task = self.job.task
        simulated = QuantizedModel(self.folded, self.network, self.job.quantizer)
        simulated.calibrate([task.inputs(next(iter(task.batches("calibration"))))])
        return simulated


def subject(name: str) -> Subject:
    """Loads a task's network and draws its mixes."""
    job = make_job(compose(NETWORKS[name]), Path(tempfile.gettempdir()))
    folded = fold_batch_norm(job.task.model, job.task.example_input).model
    network = trace(folded, job.task.example_input)
    rng = np.random.default_rng(0)
    policies = {"float": uniform(network, FLOAT), "int8": uniform(network, INT8)}
    for number in range(1, MIXES + 1):
        share = number / (MIXES + 1)
        chosen = {layer: INT8 if rng.random() < share else FLOAT for layer in network.names}
        policies[f"mix{number}"] = _legal(network, chosen)
    return Subject(job, folded, network, policies)


def uniform(network: Network, precision: Precision) -> Policy:
    """One precision for every layer that a runtime has integer kernels for; embeddings stay in float."""
    return _legal(network, dict.fromkeys(network.names, precision))


def _legal(network: Network, chosen: dict[str, Precision]) -> Policy:
    return Policy({name: one if network[name].quantizes_input else FLOAT for name, one in chosen.items()})


def measure(name: str, folder: Path, plan: Policy | None = None) -> Iterator[dict[str, object]]:
    """Exports, times and profiles every policy of a network; yields a row for each and for each of its layers."""
    made = subject(name)
    if plan is not None:
        made.policies["plan"] = plan
    simulated, example = made.simulated(), made.job.task.example_input
    simulated.apply({})
    captured = capture(simulated.model, made.network, example)
    paths = {}
    for policy_name, policy in made.policies.items():
        paths[policy_name] = folder / f"{name}-{policy_name}.onnx"
        save(quantized(captured, simulated, policy), paths[policy_name])
    args, kwargs = single(((example,), {}) if isinstance(example, torch.Tensor) else (example, {}))
    inputs = tensors_in([args, call_arguments(kwargs)[1]])
    np.savez(folder / "inputs.npz", **{str(i): x.numpy() for i, x in enumerate(inputs)})
    paths[NOTHING] = folder / "nothing.onnx"
    paths[NOTHING].write_bytes(draw_nothing().model)
    settings = {"models": {k: str(v) for k, v in paths.items()}, "warmup": WARMUP, "runs": RUNS, "profiled": PROFILED}
    (folder / "job.json").write_text(json.dumps(settings))
    worker = [sys.executable, "-P", str(HERE / "worker.py"), str(folder)]
    subprocess.run(worker, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = json.loads((folder / "times.json").read_text())
    launch_s = float(np.percentile(found[NOTHING]["whole"], 20))
    for policy_name, policy in made.policies.items():
        times = found[policy_name]
        p20, p50, p80 = (float(value) for value in np.percentile(times["whole"], (20, 50, 80)))
        row = {"network": name, "policy": policy_name, "layer": "", "precision": "", "operation": ""}
        yield row | {"p20_s": p20, "p50_s": p50, "p80_s": p80}
        operations = without_profiler(times["operations"], p20 - launch_s)
        for layer, (operation, seconds) in per_layer(made.network, operations).items():
            precision = str(policy[layer]) if layer in policy else ""
            yield row | {"layer": layer, "precision": precision, "operation": operation, "p20_s": seconds}


def without_profiler(operations: list[Operation], whole_s: float) -> list[Operation]:
    """Takes off what the profiler adds to each operation: as much to all, so that they add up to the whole."""
    calls = sum(one["calls"] for one in operations)
    low, high = 0.0, max(one["seconds"] / one["calls"] for one in operations)
    for _ in range(50):
        middle = (low + high) / 2
        rest = sum(max(one["seconds"] - middle * one["calls"], 0.0) for one in operations)
        low, high = (middle, high) if rest > whole_s else (low, middle)
    assert calls
    return [one | {"seconds": max(one["seconds"] - low * one["calls"], 0.0)} for one in operations]


def per_layer(network: Network, operations: list[Operation]) -> dict[str, tuple[str, float]]:
    """What ran every layer, and its seconds with what prepared its input and weights; the rest as `~Add`.

    Convolutions that the runtime renamed are told by the shapes of kernel and output, and by their order.
    """
    found: dict[str, tuple[str, float]] = {}
    named = {one["layer"] for one in operations if one["layer"]}
    waiting: list[Operation] = []
    for one in operations:
        kind, name = one["operation"], one["layer"]
        if kind in PREPARING:
            waiting.append(one)
            continue
        if not name and kind in ("Conv", "FusedConv"):
            name = next(
                layer.name
                for layer in network
                if layer.name not in named
                and layer.name not in found
                and list(layer.kernel) == one["weight"][2:]
                and _blocks(layer.output_shape[1]) == _blocks(one["writes"][1])
                and list(layer.output_shape[2:]) == one["writes"][2:]
            )
        if name:
            for prepared in [before for before in waiting if _prepares(before, one)]:
                waiting.remove(prepared)
                _add(found, name, prepared)
        _add(found, name or f"~{kind}", one)
    for one in waiting:
        _add(found, f"~{one['operation']}", one)
    return found


def _prepares(before: Operation, one: Operation) -> bool:
    """Whether an operation prepares the input or the weights of another: by the shape of what it wrote."""
    is_convolution = "Conv" in one["operation"]
    if not is_convolution:
        return before["operation"] == "QuantizeLinear" and before["writes"] == one["reads"]
    return before["writes"] == one["weight"] or sorted(before["writes"]) == sorted(one["reads"])


def _add(found: dict[str, tuple[str, float]], name: str, one: Operation) -> None:
    kinds, spent = found.get(name, ("", 0.0))
    own = {one["operation"]} - ({*PREPARING} if not name.startswith("~") else set())
    found[name] = "+".join(sorted({*kinds.split("+"), *own} - {""})), spent + one["seconds"]


def _blocks(channels: int) -> int:
    """Blocks of channels: the runtime pads them to whole ones where it lays them out so."""
    return -(-channels // 16)


COLUMNS = ("network", "policy", "layer", "precision", "operation", "p20_s", "p50_s", "p80_s")
PLAN_COLUMNS = ("network", "budget", "promised_s", "low_s", "high_s", "p20_s", "p50_s", "is_kept")


def plan_row(name: str, plan: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What a plan promised, and what it takes: kept where it is no slower than its 80% interval."""
    measured = next(row for row in rows if row["policy"] == "plan" and not row["layer"])
    latency, limits = plan["cost"]["latency_s"], plan["budget"]["limits"]
    return {
        "network": name,
        "budget": " ".join(f"{key}={value}" for key, value in limits.items()),
        "promised_s": latency["value"],
        "low_s": latency["low"],
        "high_s": latency["high"],
        "p20_s": measured["p20_s"],
        "p50_s": measured["p50_s"],
        "is_kept": measured["p20_s"] <= latency["high"],
    }


def write(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """Writes rows as CSV, four digits of every number."""
    with replacing(path) as aside, aside.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        for row in rows:
            writer.writerow({key: f"{one:.4g}" if isinstance(one, float) else one for key, one in row.items()})


def main() -> None:
    """Times the networks, and the plans of searches where given, and writes `measured.csv` and `plans.csv`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--plans", type=Path, metavar="FOLDER", help="times FOLDER/NETWORK/plan.json as well")
    parser.add_argument("--out", type=Path, default=HERE, metavar="FOLDER", help="where to write; default: the study's")
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    promises = []
    for name in given.networks:
        path = given.plans / name / "plan.json" if given.plans else None
        plan = json.loads(path.read_text()) if path and path.is_file() else None
        policy = plan and Policy(
            {one["name"]: Precision.parse(f"{one['weight']}/{one['input']}") for one in plan["layers"]}
        )
        with tempfile.TemporaryDirectory() as folder:
            mine = list(measure(name, Path(folder), policy))
        if plan:
            promises.append(plan_row(name, plan, mine))
        rows += mine
        print(f"{name}: {sum(not row['layer'] for row in mine)} policies timed", flush=True)
    write(given.out / "measured.csv", COLUMNS, rows)
    if promises:
        write(given.out / "plans.csv", PLAN_COLUMNS, promises)


if __name__ == "__main__":
    main()
