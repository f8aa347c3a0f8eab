"""What policies really cost: divergence on the calibration split, drop of the metric on part of the selection split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
from networks import Bench
from torch import Tensor

from search.files import JsonLines
from search.policy import Policy
from search.quality.interval import drop
from search.quantize.prefix import PrefixRunner
from search.tasks.task import Task


def first_batches(task: Task, samples: int) -> list[Any]:
    """The first batches of the selection split with at least so many samples, or all."""
    batches = list(task.batches("selection"))
    sizes = np.cumsum([len(batch if isinstance(batch, Tensor) else batch[-1]) for batch in batches])
    return batches[: int(np.searchsorted(sizes, samples)) + 1]


def measure(bench: Bench, policies: Sequence[Policy], samples: int, log: JsonLines) -> dict[str, dict[str, float]]:
    """Measures the policies that the log does not know yet, and returns the rows of all by the policies' digests."""
    known = {row["digest"]: row for row in log.read() if row["asked"] == samples}
    missing = [policy for policy in dict.fromkeys(policies) if policy.digest not in known]
    for done, (policy, divergence, quality, lost) in enumerate(_sweep(bench, missing, samples), 1):
        row = {"digest": policy.digest, "asked": samples, "divergence": divergence, "quality": quality, "drop": lost}
        log.append(row | {"policy": policy.to_dict()})
        known[policy.digest] = row
        if done % 10 == 0 or done == len(missing):
            print(f"{bench.label}: {done} of {len(missing)} policies measured", flush=True)
    return {policy.digest: known[policy.digest] for policy in policies}


def _sweep(bench: Bench, policies: Sequence[Policy], samples: int) -> Iterator[tuple[Policy, float, float, float]]:
    """Yields every policy with its divergence, metric and drop, those that share prefixes one after the other."""
    if not policies:
        return
    task, calibration = bench.task, list(bench.task.batches("calibration"))
    batches = [*calibration, *first_batches(task, samples)]
    runner = PrefixRunner(bench.simulated, task, batches)
    reference = runner.run({}, lambda outputs, index: outputs.clone())

    def read(outputs: Tensor, index: int) -> np.ndarray:
        if index < len(calibration):
            return task.divergence(reference[index], outputs).double().cpu().numpy()
        return task.score(outputs, batches[index]).double().cpu().numpy()

    split = len(calibration)
    floats = np.concatenate([read(outputs, index) for index, outputs in islice(enumerate(reference), split, None)])
    for index, found in runner.sweep(policies, read):
        scores = np.concatenate(found[split:])
        divergence = float(np.concatenate(found[:split]).mean())
        yield policies[index], divergence, task.reduce(scores), drop(task, scores, floats)
