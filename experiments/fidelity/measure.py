"""Does a plan deliver, in the backend it was searched for, what it promised?

    python -m experiments.fidelity.measure [BACKEND ...] [--tasks TASK ...]      # default: all that are installed

For every backend and task: a uniform plan at 8 bits, and two mixed plans searched for that backend, so that the space
holds only what it stores as planned. Each is exported and run from its files in a fresh process: quality and
predictions beside the simulation's, bytes beside the plan's, latency beside float in the same process. Writes one row
a plan to fidelity.csv, which keeps the rows of other backends; runs are kept in runs/ and resumed.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console

import search
from search.backends import BACKENDS, backend
from search.backends.outcome import Verification
from search.errors import UnsupportedError
from search.plan import Plan
from search.progress import LineProgress
from search.tasks.digits import Digits
from search.tasks.fashion_mnist import FashionMNIST
from search.tasks.task import Task
from search.tasks.text import Text

HERE = Path(__file__).parent
TASKS: dict[str, Callable[[], Task]] = {
    "digits": Digits,
    "resnet20": lambda: FashionMNIST("resnet20"),
    "mobilenetv2": lambda: FashionMNIST("mobilenetv2"),
    "text": lambda: Text(calibration_samples=32, selection_samples=64),
}
EVALUATIONS = 4


@dataclass(frozen=True)
class Case:
    """What is searched for one backend.

    Attributes:
        uniform: The uniform plan's weight and input formats.
        weight: Formats of weights in the mixed plans.
        input: Formats of inputs.
        bits: Average weight bits of the mixed plans.
        tasks: Names of tasks.
        placement: Where tensors are quantized.
    """

    uniform: tuple[str, str]
    weight: list[str]
    input: list[str]
    bits: tuple[float, float]
    tasks: tuple[str, ...] = tuple(TASKS)
    placement: str = "inputs"


STATIC = Case(("int8", "uint8"), ["int2", "int3", "int4", "int8"], ["uint8"], (6, 5))
GROUPS = Case(("int8-g32", "float"), ["int2-g32", "int4-g32", "int8-g32"], ["float"], (6, 4.5), ("text",))
CASES: dict[str, Case] = {
    "onnxruntime": STATIC,
    "onnxruntime full": Case(("int8", "uint8"), ["int4", "int8"], ["uint8"], (6, 5), placement="full"),
    "matmulnbits": GROUPS,
    "openvino": Case(("int8", "uint8"), ["int4", "int8"], ["float"], (6, 5)),
    "torchao": Case(("int8", "float"), ["int4", "int8", "float"], ["float"], (12, 9)),
    "x86inductor": Case(("int8", "uint8"), ["int8", "float"], ["uint8", "float"], (12, 9)),
    "compressed-tensors": GROUPS,
    "modelopt": STATIC,
}


def plans(name: str, case: Case, task_name: str, task: Task, progress: LineProgress) -> Iterator[tuple[str, Plan]]:
    """Searches the plans of one backend and task."""
    shared: dict[str, Any] = {
        "hardware": "zen4_vm",
        "quantizer": {"placement": case.placement, "repair": "none"},
        "sensitivity": {"scores": ["fisher"], "interactions": ["backward"]},
        "backends": [name.split()[0]],
        "progress": progress,
    }
    folder = HERE / "runs" / name.replace(" ", "_") / task_name
    weight, given = case.uniform
    uniform = {"weight": [weight], "input": [given]}
    yield (
        f"uniform {weight}/{given}",
        search.find_plan(task, space=uniform, strategy={"name": "uniform"}, run_dir=folder / "uniform", **shared),
    )
    for bits in case.bits:
        yield (
            f"mixed at {bits:g} bits",
            search.find_plan(
                task,
                space={"weight": case.weight, "input": case.input},
                strategy={"name": "auto", "evaluations": EVALUATIONS},
                budget={"average_weight_bits": bits},
                run_dir=folder / f"{bits:g}_bits",
                **shared,
            ),
        )


def row(name: str, task_name: str, label: str, plan: Plan, found: Verification) -> dict[str, Any]:
    """One line of the table; ratios of latencies are against float in the same process."""
    seconds = {latency.name: latency.median_s for latency in found.latencies}
    latency = plan.cost["latency_s"]
    worse = (found.promised - found.quality) if found.higher_is_better else (found.quality - found.promised)
    return {
        "backend": name,
        "task": task_name,
        "plan": label,
        "average_weight_bits": plan.average_weight_bits,
        "float": plan.quality.float_value,
        "simulated": found.promised,
        "delivered": found.quality,
        "worse_by": worse,
        "samples": found.samples,
        "agreement": found.agreement,
        "largest_difference": found.largest_difference,
        "not_exact": sum(not {layer.weight, layer.input} <= {"exact", "float"} for layer in found.layers),
        "faults": sum(bool(layer.faults) for layer in found.layers),
        "integer_layers": sum("int" in layer.compute for layer in found.layers),
        "layers": len(found.layers),
        "planned_bytes": found.planned_bytes + found.other_bytes,
        "bytes_on_disk": found.bytes_on_disk,
        "header_bytes": found.bytes_on_disk - found.planned_bytes - found.other_bytes,
        "header_allowed": found.header_bytes,
        "latency_ratio": seconds["plan"] / seconds["float"] if "float" in seconds else None,
        "int8_ratio": seconds["int8"] / seconds["float"] if "int8" in seconds else None,
        "predicted_ratio": latency.value / latency.reference if latency.value and latency.reference else None,
        "verdict": found.verdict,
    }


def main() -> None:
    """Measures the backends named on the command line, and draws what all have delivered."""
    from experiments.fidelity.figure import draw

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("backends", nargs="*", default=list(CASES))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    arguments = parser.parse_args()
    console = Console(width=140)
    table = HERE / "fidelity.csv"
    for name in arguments.backends:
        assert name.split()[0] in BACKENDS
        try:
            runtime = backend(name.split()[0], "verify")
        except UnsupportedError as error:
            console.print(f"{name}: {error}")
            continue
        case = CASES[name]
        for task_name in (task for task in case.tasks if task in arguments.tasks):
            task, rows = TASKS[task_name](), []
            for label, plan in plans(name, case, task_name, task, LineProgress(console)):
                with tempfile.TemporaryDirectory() as folder:
                    runtime.export(plan, task, Path(folder) / "export")
                    found = runtime.verify(plan, task, Path(folder) / "export")
                assert isinstance(found, Verification)
                rows.append(row(name, task_name, label, plan, found))
                console.print(rows[-1])
            earlier = pd.read_csv(table) if table.is_file() else pd.DataFrame(columns=list(rows[0]))
            others = earlier[(earlier["backend"] != name) | (earlier["task"] != task_name)]
            pd.concat([others, pd.DataFrame(rows)]).to_csv(table, index=False, float_format="%.6g")
    draw(pd.read_csv(table), HERE / "fidelity.png")


if __name__ == "__main__":
    main()
