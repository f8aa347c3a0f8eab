"""Runs .tflite models in a process of its own, which needs ai-edge-litert and numpy but neither torch nor this package.

Usage: `python -P litert_worker.py FOLDER`. In the folder, `job.json` names the models, and `inputs.npz` holds the
tensors of every call as `call/position`. Models take one sample at a time. The first model's results go to
`outputs.npz`, named likewise, and the seconds of every timed run of every model on the first sample to `seconds.json`.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.interpreter import Interpreter

Run = Callable[[list[np.ndarray[Any, Any]]], list[np.ndarray[Any, Any]]]


def runner(path: str, threads: int) -> Run:
    """Loads a model; returns a function from one sample's tensors to the model's."""
    signature = Interpreter(model_path=path, num_threads=threads).get_signature_runner()
    types = {name: details["dtype"] for name, details in signature.get_input_details().items()}

    def run(sample: list[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
        given = {f"args_{i}": x.astype(types[f"args_{i}"]) for i, x in enumerate(sample) if f"args_{i}" in types}
        returned = signature(**given)
        return [returned[f"output_{i}"] for i in range(len(returned))]

    return run


def main(folder: Path) -> None:
    """Does the job in a folder."""
    job = json.loads((folder / "job.json").read_text())
    calls: dict[str, dict[int, np.ndarray[Any, Any]]] = defaultdict(dict)
    with np.load(folder / "inputs.npz") as file:
        for key in file.files:
            call, position = key.split("/")
            calls[call][int(position)] = file[key]
    runs = {name: runner(path, job["threads"]) for name, path in job["models"].items()}
    first = next(iter(runs.values()))

    def samples(inputs: dict[int, np.ndarray[Any, Any]]) -> list[list[np.ndarray[Any, Any]]]:
        tensors = [inputs[position] for position in sorted(inputs)]
        count = next(len(x) for x in tensors if x.ndim)
        return [[x[i : i + 1] if x.ndim and len(x) == count else x for x in tensors] for i in range(count)]

    outputs: dict[str, np.ndarray[Any, Any]] = {}
    for call, inputs in calls.items():
        returned = zip(*map(first, samples(inputs)), strict=True)
        outputs |= {f"{call}/{i}": np.concatenate(parts) for i, parts in enumerate(returned)}
    single = samples(next(iter(calls.values())))[0]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(job["warmup"] + job["runs"]):
        for name, run in runs.items():  # interleaved, so that all see the same state of the machine
            start = time.perf_counter()
            run(single)
            if turn >= job["warmup"]:
                seconds[name].append(time.perf_counter() - start)
    np.savez(folder / "outputs.npz", **outputs)  # type: ignore[arg-type]
    (folder / "seconds.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
