"""Which score foretells best what a policy costs?

    python experiments/interactions/measure.py digits [resnet20] [mobilenetv2] [text] [--samples 2000]
    python experiments/interactions/measure.py resnet20_noised    # scored on noised images, held against the same truth

Draws policies over weights and inputs, adds the plans that every predictor's solver proposes, measures all of them
(divergence on the calibration split, drop on the first samples of the selection split), and writes what every predictor
foretold beside it to policies_NETWORK.csv, and what scoring took to scoring_NETWORK.csv. Everything measured or scored
is kept in runs/, so that an interrupted run goes on. correlate.py and figure.py make the rest of these files.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from networks import NETWORKS, RUNS, WIDE, Bench, make_bench
from policies import Drawn, draw, mean_bits
from predictors import MEAN_BITS, PREDICTORS, Scores, predict, propose, score
from truth import measure

from search.files import JsonLines, write_text
from search.space import SearchSpace

HERE = Path(__file__).parent
PLAN_BITS = (2.5, 3.0, 4.0, 5.0)


def proposals(bench: Bench, space: SearchSpace, scores: Scores) -> list[Drawn]:
    """The plans of every predictor's solver, each once."""
    found = [
        Drawn(propose(bench, space, scores.table, predictor, bits), "plan", bits)
        for bits in PLAN_BITS
        for predictor in PREDICTORS
    ]
    return list({drawn.policy: drawn for drawn in reversed(found)}.values())


def policies_table(name: str, samples: int, spread: int, in_slice: int) -> pd.DataFrame:
    """One row per policy: how it was drawn, its truth, and every prediction."""
    bench = make_bench(name.removesuffix("_noised"))
    space, folder = bench.space(WIDE), RUNS / bench.name
    scores = score(bench, space, folder)
    drawn = [*draw(space, bench.network, spread, in_slice), *proposals(bench, space, scores)]
    policies = [each.policy for each in drawn]
    measured = measure(bench, policies, samples, JsonLines(folder / "truth.jsonl"))
    if name != bench.name:
        scores = score(make_bench(name), space, RUNS / name)
    bits = [mean_bits(space, bench.network, policy) for policy in policies]
    rows = pd.DataFrame(
        {
            "digest": [policy.digest for policy in policies],
            "group": [each.group for each in drawn],
            "wanted_bits": [each.weight_bits for each in drawn],
            "weight_bits": [weights for weights, _ in bits],
            "input_bits": [inputs for _, inputs in bits],
            **{f"true_{key}": [measured[p.digest][key] for p in policies] for key in ("divergence", "quality", "drop")},
            MEAN_BITS: [-sum(both) for both in bits],
        }
    )
    costs = pd.DataFrame(
        {"predictor": p, "seconds": sum(scores.seconds[s] for s in PREDICTORS[p]), "passes": scores.passes(p)}
        for p in PREDICTORS
    )
    write_text(HERE / f"scoring_{name}.csv", costs.to_csv(index=False, float_format="%.4g", lineterminator="\n"))
    return rows.assign(**{name: predict(scores.table, space, policies, name) for name in PREDICTORS})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="+", choices=NETWORKS)
    parser.add_argument("--samples", type=int, default=2000, help="of the selection split")
    parser.add_argument("--spread", type=int, default=100, help="policies that spread over all bits")
    parser.add_argument("--slice", type=int, default=25, help="policies in each slice of equal average bits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.networks:
        table = policies_table(name, options.samples, options.spread, options.slice)
        text = table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        write_text(HERE / f"policies_{name}.csv", text)


if __name__ == "__main__":
    main()
