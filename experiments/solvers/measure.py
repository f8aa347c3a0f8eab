"""How fast and how good are the solvers?

    python experiments/solvers/measure.py            # solvers.csv, one row per case and seed
    python experiments/solvers/measure.py CASE SEED  # one case, as JSON

Every case runs in a process of its own, on one thread, so that its peak memory is its own.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from problems import additive_problem, budget, interacting_problem

from search.solve.forms import linearised
from search.solve.front import solve_front
from search.solve.linear import solve
from search.solve.problem import Problem
from search.solve.quadratic import solve_quadratic

HERE = Path(__file__).parent
SEEDS = 2
SHARE = 0.12  # of the way from 2 to 16 bits everywhere: 3.7 bits


def linear(seed: int) -> dict[str, Any]:
    """500 units x 8 choices x 3 budgets, to a gap of 2e-4."""
    problem = additive_problem(seed, 500, 3)
    limits = {name: budget(problem, name, SHARE) for name in problem.costs}
    start = time.monotonic()
    found = solve(problem, limits, gap=2e-4, seconds=5)
    assert found is not None
    return {"seconds": time.monotonic() - start, "score": found.score, "gap": 1 - found.bound / found.score}


def quadratic(seed: int, units: int, alike: float, seconds: float, rounds: int) -> dict[str, Any]:
    """Interacting scores and one budget; beside it what the optimum of the diagonal alone scores."""
    problem = interacting_problem(seed, units, alike)
    limits = {"bytes": budget(problem, "bytes", SHARE)}
    diagonal = solve(linearised(problem), limits)
    start = time.monotonic()
    found = solve_quadratic(problem, limits, restarts=10**6 if not rounds else 200, seconds=seconds, rounds=rounds)
    took = time.monotonic() - start
    assert found is not None
    assert diagonal is not None
    row = {"seconds": took, "score": found.score, "diagonal": problem.score(diagonal.choices) / found.score}
    return {**row, "gap": 1 - found.bound / found.score} if rounds else row


def front(problem: Problem) -> dict[str, Any]:
    """50 budgets on 200 units."""
    start = time.monotonic()
    found = solve_front(problem, "bytes", 50)
    return {"seconds": time.monotonic() - start, "solutions": len(found)}


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "linear, 500 units x 8, 3 budgets, gap 2e-4": linear,
    "quadratic, 12 units x 8, to the end": lambda seed: quadratic(seed, 12, 0.05, 60, 30),
    "quadratic, 20 units x 8, with bound, 20 s": lambda seed: quadratic(seed, 20, 0.05, 20, 30),
    "quadratic, 50 units x 8, with bound, 20 s": lambda seed: quadratic(seed, 50, 0.05, 20, 30),
    "quadratic, 200 units x 8, swaps, 10 s": lambda seed: quadratic(seed, 200, 0.05, 10, 0),
    "quadratic, 200 units x 8, with bound, 40 s": lambda seed: quadratic(seed, 200, 0.05, 40, 30),
    "front, 50 budgets, 200 units x 8, additive": lambda seed: front(linearised(interacting_problem(seed, 200, 0.05))),
    "front, 50 budgets, 200 units x 8, quadratic": lambda seed: front(interacting_problem(seed, 200, 0.05)),
}


def main() -> None:
    if len(sys.argv) == 3:
        row = CASES[sys.argv[1]](int(sys.argv[2]))
        row["processor_seconds"] = time.process_time()
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes on Linux
        print(json.dumps({**row, "memory_gb": memory}))
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    rows = []
    for case in CASES:
        for seed in range(SEEDS):
            command = [sys.executable, __file__, case, str(seed)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            rows.append({"case": case, "seed": seed, **json.loads(done.stdout)})
            print(
                {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in rows[-1].items()},
                flush=True,
            )
            pd.DataFrame(rows).to_csv(HERE / "solvers.csv", index=False, float_format="%.5g")


if __name__ == "__main__":
    main()
