"""How much quality do repairs win back at uniform precisions?

    python experiments/recover/measure.py resnet20       # also mobilenetv2 and text; a row at a time, resumable
    python experiments/recover/measure.py table          # recover.csv and recover.png from the rows, tables to print

Every repair starts from the float network, in the ranges of least squared error, and is applied alone. Quality is
measured on the first samples of the report split, the drop with its 95% interval; nothing is selected by it. Layers
that look up rows, as embeddings do, are quantized too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from hwmodels import Precision
from search.files import JsonLines, write_text
from search.policy import Policy
from search.quality.evaluate import Evaluator
from search.quantize.fold import fold_batch_norm
from search.quantize.simulate import QuantizedModel
from search.recover import parse_steps
from search.space import SearchSpace, build_space
from search.tasks.fashion_mnist import FashionMNIST
from search.tasks.task import Task
from search.tasks.text import Text
from search.trace import trace

HERE = Path(__file__).parent
ROWS = HERE / "rows"
IMAGE_PRECISIONS = ("int4/uint8", "int4/uint4", "int3/uint8", "int2/uint8", "int8/uint8")
IMAGE_REPAIRS: dict[str, list[Any]] = {
    "round to nearest": [],
    "bias correction": ["bias_correction"],
    "batch norm": ["batch_norm"],
    "adaround": [{"adaround": {"steps": 200, "samples": 2048}}],
    "gptq": ["gptq"],
    "fine-tuning": [{"finetune": {"steps": 80}}],
}
TEXT_PRECISIONS = ("int3-g128", "int2-g32", "int4-g128", "int8/int8-token", "int8/int4-token")
TEXT_REPAIRS: dict[str, list[Any]] = {
    "round to nearest": [],
    "gptq": ["gptq"],
    "awq": ["awq"],
    "smoothquant": ["smoothquant"],
    "adaround": [{"adaround": {"steps": 200, "samples": 2048}}],
    "fine-tuning": [{"finetune": {"steps": 80}}],
}


def make_task(network: str) -> Task:
    """The task of a network, by the name on the command line."""
    return Text() if network == "text" else FashionMNIST(network)


def cells(network: str) -> Iterator[tuple[str, str, list[Any]]]:
    """Yields precision, name of the repair, and its steps."""
    is_text = network == "text"
    for precision in TEXT_PRECISIONS if is_text else IMAGE_PRECISIONS:
        for name, steps in (TEXT_REPAIRS if is_text else IMAGE_REPAIRS).items():
            needs_inputs = name == "smoothquant"
            if not (needs_inputs and Precision.parse(precision).input.is_float):
                yield precision, name, steps


def uniform(space: SearchSpace, precision: str) -> Policy:
    """Gives every layer one precision."""
    asked = Precision.parse(precision)
    layers = [layer for unit in space.units for layer in unit.layers]
    return Policy({layer: space.precision_of(layer, asked) for layer in layers})


def measure(network: str, share: float) -> None:
    """Measures all cells of a network that have no row yet."""
    torch.set_num_threads(1)
    task, log = make_task(network), JsonLines(ROWS / f"{network}.jsonl")
    known = {(row["precision"], row["repair"]) for row in log.read()}
    folded = fold_batch_norm(task.model, task.example_input)
    traced = trace(folded.model, task.example_input)
    space = build_space(traced, ["int8"], ["uint8"])
    plain = QuantizedModel(folded.model, traced)
    plain.calibrate(task.inputs(batch) for batch in task.batches("calibration"))
    evaluator = Evaluator(task, plain)
    for precision, name, steps in cells(network):
        if (precision, name) in known:
            continue
        started, simulated, policy = time.perf_counter(), plain, uniform(space, precision)
        for step in parse_steps(steps):
            simulated = step(simulated, policy, task, plain)
        seconds = time.perf_counter() - started
        quality = evaluator.of(simulated).measure(policy, "report", share)
        row = {
            "network": network,
            "precision": precision,
            "repair": name,
            "metric": task.metric,
            "float": evaluator.of(plain).measure({}, "report", share).value,
            "quality": quality.value,
            "drop": quality.drop,
            "drop_low": quality.drop_low,
            "drop_high": quality.drop_high,
            "samples": quality.samples,
            "seconds": round(seconds, 1),
        }
        log.append(row)
        print(f"{precision:18} {name:18} {quality.value:8.4f}  drop {quality.drop:+8.4f}  {seconds:6.0f} s", flush=True)


def table() -> None:
    """Writes recover.csv and recover.png from the rows measured so far."""
    import matplotlib

    matplotlib.use("Agg")
    import pandas as pd
    from matplotlib import pyplot as plt

    rows = pd.DataFrame([row for path in sorted(ROWS.glob("*.jsonl")) for row in JsonLines(path).read()])
    write_text(HERE / "recover.csv", rows.to_csv(index=False, lineterminator="\n"))
    networks = list(dict.fromkeys(rows["network"]))
    repairs = [*IMAGE_REPAIRS, *(name for name in TEXT_REPAIRS if name not in IMAGE_REPAIRS)]
    colors = dict(zip(repairs, plt.get_cmap("tab10").colors, strict=False))
    figure, axes = plt.subplots(len(networks), 1, figsize=(9, 3.2 * len(networks)), layout="constrained", squeeze=False)
    for axis, network in zip(axes.flat, networks, strict=True):
        part = rows[rows["network"] == network]
        grid = part.pivot_table("drop", "precision", "repair", sort=False)
        grid = grid * 100 if part["metric"].iloc[0] == "accuracy" else grid
        grid.plot.bar(ax=axis, rot=0, width=0.8, color=[colors[name] for name in grid])
        unit = "points of accuracy" if part["metric"].iloc[0] == "accuracy" else part["metric"].iloc[0]
        axis.set(title=f"{network}: drop against float", ylabel=unit, xlabel="")
        axis.set_yscale("symlog", linthresh=1)
        axis.set_ylim(bottom=min(0.0, float(grid.min().min())) - 0.1)
        axis.legend(fontsize=7, ncols=2, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "recover.png", dpi=140)
    for network, part in rows.groupby("network", sort=False):
        print(f"\n{network}, {part['metric'].iloc[0]}, float {part['float'].iloc[0]:.4f}\n")
        grid = part.pivot_table("quality", "precision", "repair", sort=False).map("{:.4f}".format)
        print("| precision |" + "".join(f" {name} |" for name in grid))
        print("|---" * (len(grid.columns) + 1) + "|")
        for precision, values in grid.iterrows():
            print(f"| {precision} |" + "".join(f" {value} |" for value in values))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", choices=["resnet20", "mobilenetv2", "text", "table"])
    parser.add_argument("--share", type=float, default=0.4, help="share of the report split's batches")
    arguments = parser.parse_args()
    if arguments.network == "table":
        table()
    else:
        measure(arguments.network, arguments.share)


if __name__ == "__main__":
    main()
