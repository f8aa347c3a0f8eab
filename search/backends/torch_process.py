"""Runs exported PyTorch models in a fresh process: on the recorded calls, then timed side by side on one sample."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from search.backends.verify import RUNS, THREADS, WARMUP, single
from search.errors import UnsupportedError
from search.quantize.simulate import exact_inference
from search.tasks.task import tensors_in

JOB, ANSWER = "job.pt", "answer.pt"


def run_in_fresh_process(
    load: str, models: Mapping[str, Any], calls: Sequence[Any], folder: Path
) -> tuple[list[list[Tensor]], dict[str, list[float]]]:
    """Runs the first of `models` on every call, and times all of them on one sample.

    Args:
        load: A function as `module:name`, which makes a callable of what `models` holds.
        models: Name to what `load` takes: a file, or a module and a file.
        calls: Positional and keyword arguments of every call.
        folder: A temporary folder, through which the processes talk.

    Returns:
        The tensors that every call returned, and the seconds of the timed runs by name.

    Raises:
        UnsupportedError: If a model cannot be sent to another process, or fails there.
    """
    try:
        torch.save({"load": load, "models": dict(models), "calls": list(calls)}, folder / JOB)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UnsupportedError(
            f"the model cannot be sent to a fresh process: {error}; define its classes in a module"
        ) from error
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "search.backends.torch_process", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"it ended with code {done.returncode}"])[-1]
        raise UnsupportedError(f"the exported model does not run in a fresh process: {reason}")
    answer = torch.load(folder / ANSWER, weights_only=True)
    return answer["returned"], answer["seconds"]


def main(folder: Path) -> None:
    """Does the job in a folder, in the fresh process."""
    torch.set_num_threads(THREADS)
    # The job is one this process's parent wrote, pickled modules and all.
    job = torch.load(folder / JOB, weights_only=False)
    module, _, function = job["load"].partition(":")
    load: Callable[[Any], Callable[..., Any]] = getattr(import_module(module), function)
    models = {name: load(given) for name, given in job["models"].items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    with exact_inference():
        first = next(iter(models.values()))
        returned = [[tensor.clone() for tensor in tensors_in(first(*args, **kwargs))] for args, kwargs in job["calls"]]
        args, kwargs = single(job["calls"][0])
        for turn in range(WARMUP + RUNS):
            for name, model in models.items():  # interleaved, so that all see the same state of the machine
                start = time.perf_counter()
                model(*args, **kwargs)
                if turn >= WARMUP:
                    seconds[name].append(time.perf_counter() - start)
    torch.save({"returned": returned, "seconds": seconds}, folder / ANSWER)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
