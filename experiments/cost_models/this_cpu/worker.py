"""Times ONNX files turn by turn on one pinned thread, in a process that holds nothing else.

Usage: `python -P worker.py FOLDER`; `job.json` names the models, `inputs.npz` holds a sample, `times.json` is written.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime


def session(path: str, profile: Path | None = None) -> Any:
    """Loads a model for one thread of the CPU."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def operations(profile: str, runs: int) -> list[dict[str, Any]]:
    """Every operation of a profile in the order they run: its layer, kind, shapes and the seconds of it in a run.

    The layer is empty where the runtime gave the node a name of its own.
    """
    seconds: dict[str, list[float]] = defaultdict(list)
    about: dict[str, Any] = {}
    for event in json.loads(Path(profile).read_text()):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            seconds[event["name"]].append(event["dur"] / 1e6)
            about[event["name"]] = event["args"]
    found = []
    for node, spent in seconds.items():
        args = about[node]
        read, written = (
            [next(iter(shape.values())) for shape in args[f"{side}_type_shape"]] for side in ("input", "output")
        )
        named = re.findall(r"<([^<>]+)>", node)
        calls = max(len(spent) // runs, 1)
        found.append(
            {
                "layer": named[0] if named else "",
                "operation": args["op_name"],
                "reads": read[0] if read else [],
                "weight": read[1] if len(read) > 1 else [],
                "writes": written[0] if written else [],
                "calls": calls,
                "seconds": trimmed(spent) * calls,
            }
        )
    return found


def trimmed(seconds: list[float]) -> float:
    """The mean of all but the slowest fifth: the profile counts in whole microseconds, so that medians are coarse."""
    return float(np.sort(seconds)[: max(len(seconds) * 4 // 5, 1)].mean())


def be_first() -> None:
    """Puts this process before all others on its core, where the system lets it: then nothing else is timed with it."""
    with contextlib.suppress(PermissionError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))


def main(folder: Path) -> None:
    """Does the job in a folder."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})
    job = json.loads((folder / "job.json").read_text())
    with np.load(folder / "inputs.npz") as file:
        arrays = [file[key] for key in sorted(file.files, key=int)]
    sessions = {name: session(path) for name, path in job["models"].items()}
    feeds = {
        name: {given.name: array for given, array in zip(one.get_inputs(), arrays, strict=name != "nothing")}
        for name, one in sessions.items()
    }
    feeds["nothing"] = dict.fromkeys(feeds["nothing"], np.zeros((1, 1), np.float32))
    be_first()
    times: dict[str, Any] = {name: {"whole": []} for name in sessions}
    for turn in range(job["warmup"] + job["runs"]):
        for name, one in sessions.items():
            one.run(None, feeds[name])  # warm, as in a service that answers one question after the other
            start = time.perf_counter()
            one.run(None, feeds[name])
            if turn >= job["warmup"]:
                times[name]["whole"].append(time.perf_counter() - start)
    del sessions
    for name, path in job["models"].items():
        profiled = session(path, folder / name)
        for _ in range(job["profiled"]):
            profiled.run(None, feeds[name])
        times[name]["operations"] = operations(profiled.end_profiling(), job["profiled"])
    (folder / "times.json").write_text(json.dumps(times))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
