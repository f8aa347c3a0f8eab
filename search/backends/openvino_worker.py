"""Converts ONNX files to OpenVINO and runs them, in a process that needs neither torch nor this package.

Usage: `python -P openvino_worker.py FOLDER`. `job.json` names what to do:

    convert     ONNX file to `.xml` file, each beside a `.bin`
    operations  an `.xml` file: what the runtime makes of it goes to `operations.json`
    models      name to `.xml` file: `inputs.npz` holds the tensors of every call as `call/position`, those of one
                sample as `single/position`; the first one's results go to `outputs.npz`, all seconds to `seconds.json`

A conversion numbers the nodes it makes from one for every process: in a process of its own it writes the same bytes
every time. (-P keeps this file's neighbours from being taken for the packages they are named after.)
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import openvino

EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "PERFORMANCE_HINT": "LATENCY"}
"""No bf16 where the processor has it, and no inputs rounded to 8 bits in front of quantized weights."""


def convert(source: str, target: str) -> None:
    """Writes an ONNX file as OpenVINO's IR, all values in the types they have."""
    openvino.save_model(openvino.convert_model(source), target, compress_to_fp16=False)
    file = Path(target)
    file.write_text(re.sub(r">\s+<", "><", file.read_text()))  # indentation is half of it


def compiled(path: str, threads: int) -> Any:
    """Loads a model for the CPU."""
    return openvino.Core().compile_model(path, "CPU", EXACT | {"INFERENCE_NUM_THREADS": threads})


def operations(model: Any) -> list[dict[str, str]]:
    """Lists what the runtime made of a model: every operation, the nodes it stands for, and the type it is given."""
    keys = ("layerType", "originalLayersNames", "primitiveType")
    found = []
    for operation in model.get_runtime_model().get_ordered_ops():
        about = operation.get_rt_info()
        known = {key: about[key].astype(str) for key in keys if key in about}
        types = [str(given.get_element_type().get_type_name()) for given in operation.inputs()]
        found.append(known | {"name": operation.get_friendly_name(), "multiplies": types[0] if types else ""})
    return found


def run(job: dict[str, Any], folder: Path) -> None:
    """Runs the first model on every call, and times all of them on one sample."""
    calls: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    with np.load(folder / "inputs.npz") as file:
        for key in file.files:
            call, position = key.split("/")
            calls[call][int(position)] = file[key]
    single = calls.pop("single")
    requests = {name: compiled(path, job["threads"]).create_infer_request() for name, path in job["models"].items()}

    def infer(name: str, inputs: dict[int, np.ndarray]) -> list[np.ndarray]:
        return [output.copy() for output in requests[name].infer(inputs).values()]

    first = next(iter(requests))
    outputs = {f"{call}/{i}": y for call, inputs in calls.items() for i, y in enumerate(infer(first, inputs))}
    seconds: dict[str, list[float]] = {name: [] for name in requests}
    for request in requests.values():
        request.infer(single)  # shapes are compiled for when first seen
    for turn in range(job["warmup"] + job["runs"]):
        for name, request in requests.items():  # interleaved, so that all see the same state of the machine
            start = time.perf_counter()
            request.infer(single)
            if turn >= job["warmup"]:
                seconds[name].append(time.perf_counter() - start)
    np.savez(folder / "outputs.npz", **outputs)  # type: ignore[arg-type]
    (folder / "seconds.json").write_text(json.dumps(seconds))


def main(folder: Path) -> None:
    """Does the job in a folder."""
    job = json.loads((folder / "job.json").read_text())
    for source, target in job.get("convert", {}).items():
        convert(source, target)
    if "operations" in job:
        found = operations(compiled(job["operations"], job["threads"]))
        (folder / "operations.json").write_text(json.dumps(found))
    if "models" in job:
        run(job, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
