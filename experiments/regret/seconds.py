"""Measures what an evaluation of a policy and scoring of all choices really take: seconds_NETWORK_REPAIR.json.

    python experiments/regret/seconds.py [--repair none|bias|batch_norm] [--network resnet20]

Qualities come from a table in no time; the seconds that strategies are charged are these, of one thread of an otherwise
idle machine: the median over random policies for an evaluation, one run for scoring.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import torch
from study import SCORED, seconds_path
from units import NETWORKS, make_bench

from search.files import write_json
from search.quality.evaluate import Evaluator
from search.sensitivity.scoring import score_space

POLICIES = 9


def processor() -> str:
    """The class of processor this is, as the system names it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--repair", default="none", help="the table's")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = make_bench(options.network, options.repair)
    started = time.perf_counter()
    score_space(bench.task, bench.simulated, bench.space, SCORED)
    scoring_s = time.perf_counter() - started
    print(f"scoring: {scoring_s:.1f} s", flush=True)
    evaluator, rng, taken = Evaluator(bench.task, bench.simulated), np.random.default_rng(0), []
    evaluator.float_scores("selection")
    for _ in range(POLICIES):
        before = evaluator.seconds
        evaluator.measure(bench.space.sample(rng), "selection")
        taken.append(evaluator.seconds - before)
        print(f"evaluation: {taken[-1]:.2f} s", flush=True)
    found = {
        "evaluation_s": round(float(np.median(taken)), 3),
        "scoring_s": round(scoring_s, 1),
        "scored": {"scores": SCORED.scores, "interactions": SCORED.interactions, "superposition": SCORED.superposition},
        "machine": f"{processor()}, one thread",
    }
    write_json(seconds_path(options.network, options.repair), found)


if __name__ == "__main__":
    main()
