"""Vela as an oracle: is it read rightly, do its layers add up, and what does a roofline of the same chip say?

    python -m experiments.cost_models.vela

Writes reports.csv, policies.csv, uniform.csv and vela.png next to this file, and prints the tables of the README.
"""

from __future__ import annotations

import csv
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.cost_models.vela.figure import draw
from experiments.cost_models.vela.networks import NETWORKS
from hwmodels import Network, Precision, Roofline, Workload
from hwmodels.base import sum_costs
from hwmodels.vela import Held, Vela, write_tflite
from search.files import replacing, write_text

HERE = Path(__file__).parent
ACCELERATORS = ("ethos-u55-128", "ethos-u65-256", "ethos-u85-256", "ethos-u85-1024")
BITS = (2, 3, 4, 5, 6, 7, 8)
CHOICES = tuple(Precision.parse(f"int{weight}/int{read}") for weight in (2, 4, 6, 8) for read in (8, 16))
KINDS = {"inputs at 8 bits": (8,), "inputs at 8 and 16 bits": (8, 16)}
POLICIES = 10  # of each kind
WORKLOAD = Workload()


def random_policies(network: Network, seed: int = 0) -> Iterator[tuple[str, dict[str, Precision]]]:
    """Policies of each kind, every layer drawn on its own."""
    generator = random.Random(seed)
    for kind, widths in KINDS.items():
        allowed = [choice for choice in CHOICES if choice.input.bits in widths]
        for _ in range(POLICIES):
            yield kind, {name: generator.choice(allowed) for name in network.names}


def command_report(vela: Vela, network: Network, policy: dict[str, Precision]) -> dict[str, str]:
    """What the command `vela` writes into its summary, called by itself and with nothing else asked for."""
    target = vela.target
    held = {layer.name: Held.of(layer, policy[layer.name]) for layer in network}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.tflite"
        file.write_bytes(write_tflite(network, held).data)
        command = [sys.executable, "-m", "ethosu.vela", str(file), "--output-dir", folder]
        command += ["--accelerator-config", target.accelerator, "--system-config", target.system_config]
        subprocess.run([*command, "--memory-mode", target.memory_mode], check=True, capture_output=True)
        with (Path(folder) / f"model_summary_{target.system_config}.csv").open() as lines:
            return next(csv.DictReader(lines))


def report_rows(vela: Vela, name: str, network: Network) -> Iterator[dict[str, Any]]:
    """The oracle's numbers beside the command's, at uniform precisions and one mixed policy of each kind."""
    policies = {
        text: dict.fromkeys(network.names, Precision.parse(text)) for text in ("int8/int8", "int4/int8", "int8/int16")
    }
    policies |= {f"mixed, {kind}": policy for kind, policy in random_policies(network)}
    for label, policy in policies.items():
        report, row = vela.compile(network, policy), command_report(vela, network, policy)
        operators = sum(one.cycles for one in report.operators if one)
        yield {
            "network": name,
            "accelerator": vela.target.accelerator,
            "policy": label,
            "cycles": report.cycles,
            "cycles_command": int(row["cycles_total"]),
            "cycles_operators": operators,
            "latency_s": report.latency_s,
            "latency_s_command": float(row["inference_time"]),
            "encoded_weight_bytes": report.encoded_weight_bytes,
            "encoded_weight_bytes_command": int(row["total_npu_encoded_weights"]),
            "original_weight_bytes": report.original_weight_bytes,
            "sram_bytes": report.memory_bytes.get("sram", 0),
            "sram_bytes_command": round(1024 * float(row["sram_memory_used"])),
        }


def policy_rows(vela: Vela, name: str, network: Network) -> Iterator[dict[str, Any]]:
    """Random policies: what the table adds up to, what the whole network takes, what the roofline says."""
    roofline = Roofline(vela.target.accelerator.replace("-", "_"))
    table = vela.cost_table(network, dict.fromkeys(network.names, CHOICES), WORKLOAD)
    for kind, policy in random_policies(network):
        yield {
            "network": name,
            "accelerator": vela.target.accelerator,
            "kind": kind,
            "added_s": sum_costs(table, network, policy, WORKLOAD).total.latency_s,
            "confirmed_s": vela.confirm(network, policy, WORKLOAD).total.latency_s,
            "roofline_s": roofline.network_cost(network, policy, WORKLOAD).total.latency_s,
        }


def uniform_rows(vela: Vela, name: str, network: Network) -> Iterator[dict[str, Any]]:
    """One precision throughout."""
    roofline = Roofline(vela.target.accelerator.replace("-", "_"))
    for text in (*(f"int{bits}/int8" for bits in BITS), "int8/int16"):
        policy = dict.fromkeys(network.names, Precision.parse(text))
        report = vela.compile(network, policy)
        yield {
            "network": name,
            "accelerator": vela.target.accelerator,
            "precision": text,
            "vela_s": report.latency_s,
            "roofline_s": roofline.network_cost(network, policy, WORKLOAD).total.latency_s,
            "encoded_weight_bytes": report.encoded_weight_bytes,
        }


def summary(reports: pd.DataFrame, policies: pd.DataFrame, uniform: pd.DataFrame) -> str:
    """The tables of the README."""
    pairs = [column for column in reports.columns if column.endswith("_command")]
    differing = sum((reports[column] != reports[column.removesuffix("_command")]).sum() for column in pairs)
    apart = (reports["cycles"] != reports["cycles_operators"]).sum()
    lines = [
        f"{len(reports)} reports, {differing} numbers that differ from the command's, {apart} sums that differ.",
        "",
    ]
    lines += ["| network | accelerator | policies | sum of layers, median and worst error | rank correlation |"]
    lines[-1] += " roofline, median error | rank correlation |"
    lines += ["|" + "---|" * 7]
    for (network, accelerator, kind), rows in policies.groupby(["network", "accelerator", "kind"], sort=False):
        errors = (rows["added_s"] / rows["confirmed_s"] - 1).abs()
        off = (rows["roofline_s"] / rows["confirmed_s"] - 1).median()
        ranks = [_spearman(rows[column], rows["confirmed_s"]) for column in ("added_s", "roofline_s")]
        lines.append(
            f"| {network} | {accelerator} | {kind} | {errors.median():.2%}, {errors.max():.2%} | {ranks[0]:.3f} | "
            f"{off:+.0%} | {ranks[1]:.2f} |"
        )
    lines += ["", "| network | accelerator | int8/int8, ms | int4/int8 | int2/int8 | int8/int16 |", "|" + "---|" * 6]
    for (network, accelerator), rows in uniform.groupby(["network", "accelerator"], sort=False):
        found = rows.set_index("precision")
        base = found.loc["int8/int8"]
        ratios = found[["vela_s", "roofline_s"]] / base[["vela_s", "roofline_s"]]
        shown = [
            f"{ratios.loc[text, 'vela_s']:.2f} ({ratios.loc[text, 'roofline_s']:.2f})"
            for text in ("int4/int8", "int2/int8", "int8/int16")
        ]
        times = f"{1e3 * base['vela_s']:.3g} ({1e3 * base['roofline_s']:.3g})"
        lines.append(f"| {network} | {accelerator} | {times} | {' | '.join(shown)} |")
    return "\n".join(lines)


def _spearman(left: pd.Series, right: pd.Series) -> float:
    return float(np.corrcoef(left.rank(), right.rank())[0, 1])


def main() -> None:
    rows: dict[str, list[dict[str, Any]]] = {"reports": [], "policies": [], "uniform": []}
    for name, make in NETWORKS.items():
        network = make()
        for accelerator in ACCELERATORS:
            vela = Vela(accelerator)
            rows["uniform"] += uniform_rows(vela, name, network)
            rows["policies"] += policy_rows(vela, name, network)
            rows["reports"] += report_rows(vela, name, network)
            print(name, accelerator, file=sys.stderr, flush=True)
    tables = {name: pd.DataFrame(found) for name, found in rows.items()}
    for name, table in tables.items():
        write_text(HERE / f"{name}.csv", table.to_csv(index=False, float_format="%.9g"))
    with replacing(HERE / "vela.png") as file:
        file.write_bytes(draw(tables["uniform"], tables["policies"]))
    print(summary(tables["reports"], tables["policies"], tables["uniform"]))


if __name__ == "__main__":
    main()
