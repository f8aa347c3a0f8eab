"""Measures all policies of a network whose layers are tied into a few units.

    python experiments/regret/truth.py [--repair none|bias|batch_norm] [--network resnet20] [--shard 0/2]

ResNet-20 on Fashion-MNIST in 7 units of int2, int4 or int8 weights at uint8 inputs: 2,187 policies on the 5,000 images
of the selection split, run as a tree, so that policies share what they have in common. Every batch is kept in runs/
once it is done; an interrupted run goes on with the batch it was at. Shards take every so manieth batch, one process
each; whichever ends last writes the table.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from table import Truth, identity, path_of, policies_of
from torch import Tensor
from units import NETWORKS, Bench, make_bench

from search.errors import DataError
from search.files import replacing, write_json
from search.policy import Policy
from search.quantize.prefix import PrefixRunner

RUNS = Path(__file__).parent / "runs"
REPORTED = 30  # seconds between progress lines


def measure_batch(bench: Bench, batch: Any, policies: Sequence[Policy], memory: int, label: str) -> dict[str, Any]:
    """Measures all policies on one batch: samples lost and won against float, and the sum of divergences."""
    runner = PrefixRunner(bench.simulated, bench.task, [batch], memory)
    reference = runner.run({}, lambda outputs, index: outputs)[0].clone()
    right = bench.task.score(reference, batch)

    def read(outputs: Tensor, index: int) -> tuple[int, int, float]:
        gained = bench.task.score(outputs, batch) - right
        divergence = bench.task.divergence(reference, outputs)
        return int((gained < 0).sum()), int((gained > 0).sum()), float(divergence.sum())

    found = np.empty((len(policies), 3))
    started = reported = time.perf_counter()
    for done, (policy, (counts,)) in enumerate(runner.sweep(policies, read), 1):
        found[policy] = counts
        now = time.perf_counter()
        if now - reported > REPORTED or done == len(policies):
            print(f"{label}: {done} of {len(policies)} policies in {now - started:.0f} s", flush=True)
            reported = now
    if runner.trouble:
        print(runner.trouble)
    lost, won, divergence = found.T
    return {"lost": lost, "won": won, "divergence": divergence, "right": int(right.sum()), "samples": len(right)}


def claim(folder: Path, about: dict[str, Any]) -> None:
    """Makes sure that batches measured earlier are of the same network, data and settings."""
    path = folder / "about.json"
    if path.is_file() and json.loads(path.read_text()) != about:
        raise DataError(f"{folder} holds batches of another network, data or settings; remove it to measure anew")
    write_json(path, about)


def merge(folder: Path, batches: int, about: dict[str, Any], codes: Sequence[str], path: Path) -> None:
    """Writes the table once all batches are there."""
    files = [folder / f"batch_{index}.npz" for index in range(batches)]
    missing = sum(not file.is_file() for file in files)
    if missing:
        print(f"{missing} of {batches} batches are still to be measured")
        return
    found = [dict(np.load(file)) for file in files]
    about |= {name: [int(batch[name]) for batch in found] for name in ("samples", "right")}
    divergence = sum(batch["divergence"] for batch in found) / sum(about["samples"])
    lost, won = (np.stack([batch[name] for batch in found], 1).astype(int) for name in ("lost", "won"))
    Truth(about, pd.Series(divergence, list(codes)), lost, won).save(path)
    print(f"{path.name}: {len(codes)} policies, {path.stat().st_size / 1e3:.0f} kB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--repair", default="none", help="what applying a choice repairs: none, bias or batch_norm")
    parser.add_argument("--shard", default="0/1", help="this process's part of the batches, such as 0/2 and 1/2")
    parser.add_argument("--memory", type=float, default=2.0, help="GB that shared prefixes may take")
    options = parser.parse_args()
    shard, shards = map(int, options.shard.split("/"))
    torch.set_num_threads(1)
    bench = make_bench(options.network, options.repair)
    folder = RUNS / f"truth_{options.network}_{options.repair}"
    about = identity(bench)
    claim(folder, about)
    policies, batches = policies_of(bench), list(bench.task.batches("selection"))
    for index in range(shard, len(batches), shards):
        path = folder / f"batch_{index}.npz"
        if not path.is_file():
            label = f"batch {index} of 0..{len(batches) - 1}"
            found = measure_batch(bench, batches[index], list(policies.values()), int(options.memory * 1e9), label)
            with replacing(path) as aside, aside.open("wb") as file:
                np.savez(file, **found)
    merge(folder, len(batches), about, list(policies), path_of(options.network, options.repair))


if __name__ == "__main__":
    main()
