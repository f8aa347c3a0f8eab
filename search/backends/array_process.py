"""Talks to the workers that run artifacts on arrays, each in a process that needs its runtime and numpy but not torch.

In a folder, `job.json` names the models, and `inputs.npz` holds the tensors of every call as `call/position`. A worker
leaves the first model's results in `outputs.npz`, named likewise, and the seconds of every timed run of every model in
`seconds.json`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from search.backends.onnx_capture import call_arguments
from search.backends.verify import RUNS, THREADS, WARMUP, single
from search.errors import UnsupportedError
from search.tasks.task import tensors_in


def call_arrays(calls: Sequence[Any]) -> dict[str, np.ndarray]:
    """The tensors of every call, and as `single/position` those of the first call's first sample, which is timed."""
    keyed = dict(zip([*map(str, range(len(calls))), "single"], [*calls, single(calls[0])], strict=True))
    tensors = {key: tensors_in([args, call_arguments(kwargs)[1]]) for key, (args, kwargs) in keyed.items()}
    return {f"{key}/{i}": x.cpu().numpy() for key, inputs in tensors.items() for i, x in enumerate(inputs)}


def run_models(
    worker: Path,
    runtime: str,
    models: Mapping[str, Path],
    arrays: Mapping[str, np.ndarray],
    calls: int,
    folder: Path,
    **job: Any,
) -> tuple[list[list[Tensor]], dict[str, list[float]]]:
    """Runs the first of `models` on every call, and times all of them on one sample.

    Args:
        worker: The script.
        runtime: Its runtime's name, for messages.
        models: Name to file.
        arrays: Tensors of the calls.
        calls: How many calls there are.
        folder: A temporary folder, through which the processes talk.
        job: What else the worker is told.

    Returns:
        The tensors that every call returned, and the seconds of the timed runs by name of the model.

    Raises:
        UnsupportedError: If the runtime refuses a model.
    """
    np.savez(folder / "inputs.npz", **arrays)  # type: ignore[arg-type]
    paths = {name: str(path.resolve()) for name, path in models.items()}
    ask(worker, runtime, {"models": paths, "threads": THREADS, "warmup": WARMUP, "runs": RUNS} | job, folder)
    returned: list[list[Tensor]] = [[] for _ in range(calls)]
    with np.load(folder / "outputs.npz") as file:
        for key in file.files:
            returned[int(key.split("/")[0])].append(torch.from_numpy(file[key]))
    return returned, json.loads((folder / "seconds.json").read_text())


def ask(worker: Path, runtime: str, job: Mapping[str, Any], folder: Path) -> None:
    """Has a worker do a job in a folder.

    Raises:
        UnsupportedError: If it fails, with the last line of what it said.
    """
    (folder / "job.json").write_text(json.dumps(job))
    # -P keeps the worker's neighbours from being taken for the packages they are named after.
    done = subprocess.run([sys.executable, "-P", str(worker), str(folder)], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it crashed"])[-1]
        raise UnsupportedError(f"{runtime} does not run the exported model: {reason}")
