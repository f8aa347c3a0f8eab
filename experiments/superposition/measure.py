"""How many policies a second does the search on summed-up outputs read?

    python experiments/superposition/measure.py

Every policy that is counted is read from all of its predicted outputs, 500 rows of 10, in the search's own loop:
repairs, limits, the choice of promising pairs and what it remembers are in the seconds. Random output changes stand in
for those of a network; a budget allows 40% of what the largest choices cost.

Writes speed.csv: per reading and number of threads the policies per second of wall-clock time and of processor time; on
a busy machine only the latter says anything about the program. `--quick` runs one problem and one reading.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path
from typing import Any

import numpy as np

from search.solve.descent import Ground
from search.solve.linear import solve
from search.solve.predictor import Predictor
from search.solve.problem import Problem
from search.solve.readings import NAMES, Name, reading
from search.solve.superposition import Evolution

HERE = Path(__file__).parent
ROWS, OUTPUTS = 500, 10
CHOICES = 6  # per unit
SMALL, LARGE = 22, 100  # units
RUNS: tuple[tuple[int, Name], ...] = (*((SMALL, name) for name in NAMES), (LARGE, "margin_error"))
REPEATS = 5  # of which the fastest counts: others share the machine
EFFORT = {SMALL: (7, 2), LARGE: (1, 0)}  # restarts and generations


def random_problem(units: int) -> tuple[Problem, np.ndarray, np.ndarray, np.ndarray]:
    """Choices that hurt less the more they cost; base outputs, their changes, and targets mostly met."""
    rng = np.random.default_rng(0)
    sizes = rng.lognormal(0, 1, units)
    harm = 2.0 ** -np.arange(CHOICES) * rng.lognormal(0, 0.5, (units, 1)) / np.sqrt(units)
    base = rng.normal(size=(ROWS, OUTPUTS)).astype(np.float32)
    targets = rng.integers(0, OUTPUTS, ROWS)
    base[np.arange(ROWS), targets] += 4
    changes = rng.normal(size=(units, CHOICES, ROWS, OUTPUTS)).astype(np.float32) * harm[..., None, None].astype(
        np.float32
    )
    costs = tuple(size * np.arange(1.0, CHOICES + 1) for size in sizes)
    return Problem(tuple(harm**2), {"bytes": costs}), base, changes.reshape(-1, ROWS, OUTPUTS), targets


def measure(units: int, name: Name, threads: int) -> dict[str, Any]:
    """Runs one search and counts."""
    problem, base, changes, targets = random_problem(units)
    limits = {"bytes": 0.4 * sum(float(numbers.max()) for numbers in problem.costs["bytes"])}
    compared = base if name in ("divergence_to", "squared") else targets
    start = solve(problem, limits)
    assert start is not None
    best: dict[str, Any] = {}
    for _ in range(REPEATS):
        ground = Ground(problem, limits, Predictor(reading(name, compared), base, changes))
        evolution = Evolution(ground, keep=20, threads=threads)
        wall, processor = time.perf_counter(), time.process_time()
        evolution.search([start.choices], *EFFORT[units], np.random.default_rng(0))
        wall, processor = time.perf_counter() - wall, time.process_time() - processor
        if not best or wall < best["seconds"]:
            best = {
                "units": units,
                "choices": CHOICES,
                "reading": name,
                "threads": threads,
                "policies": evolution.read,
                "seconds": round(wall, 3),
                "policies_per_s": round(evolution.read / wall, -3),
                "policies_per_processor_s": round(evolution.read / processor, -3),
                "load": round(os.getloadavg()[0], 1),
            }
    return best


def main() -> None:
    """Measures, prints and writes the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one problem, one reading; nothing is written")
    is_quick = parser.parse_args().quick
    rows = []
    for units, name in RUNS[: 1 if is_quick else None]:
        for threads in (1, 2):
            rows.append(measure(units, name, threads))
            print(rows[-1], flush=True)
    if not is_quick:
        with (HERE / "speed.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
