"""Runs ONNX files in a process of its own, which needs onnxruntime and numpy but neither torch nor this package.

Usage: `python -P onnxruntime_worker.py FOLDER`. In the folder, `job.json` names the models, and `inputs.npz` holds the
tensors of every call as `call/position`, those of one sample as `single/position`. The first model's results go to
`outputs.npz`, named likewise, and the seconds of every timed run of every model to `seconds.json`. (-P keeps this
file's neighbours from being taken for the packages they are named after.)
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def saturates() -> bool:
    """True where kernels for unsigned inputs and signed weights saturate: x86 processors not known to have VNNI.

    onnxruntime then computes rightly only with an option of its own, which makes it refuse weights that are read twice.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return False
    known = Path("/proc/cpuinfo")
    return not known.exists() or "vnni" not in known.read_text()


def session(path: str, threads: int) -> Any:
    """Loads a model for the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    if saturates():
        options.add_session_config_entry("session.x64quantprecision", "1")
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def main(folder: Path) -> None:
    """Does the job in a folder."""
    job = json.loads((folder / "job.json").read_text())
    calls: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    with np.load(folder / "inputs.npz") as file:
        for key in file.files:
            call, position = key.split("/")
            calls[call][int(position)] = file[key]
    single = calls.pop("single")
    sessions = {name: session(path, job["threads"]) for name, path in job["models"].items()}

    def run(name: str, inputs: dict[int, np.ndarray]) -> list[np.ndarray]:
        names = [given.name for given in sessions[name].get_inputs()]
        outputs: list[np.ndarray] = sessions[name].run(None, {names[position]: x for position, x in inputs.items()})
        return outputs

    first = next(iter(sessions))
    outputs = {f"{call}/{i}": y for call, inputs in calls.items() for i, y in enumerate(run(first, inputs))}
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(job["warmup"] + job["runs"]):
        for name in sessions:  # interleaved, so that all see the same state of the machine
            start = time.perf_counter()
            run(name, single)
            if turn >= job["warmup"]:
                seconds[name].append(time.perf_counter() - start)
    np.savez(folder / "outputs.npz", **outputs)  # type: ignore[arg-type]
    (folder / "seconds.json").write_text(json.dumps(seconds))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
