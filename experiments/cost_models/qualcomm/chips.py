"""Hexagon chips as device files: what is stated here is the same for all; rates come from the fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import yaml

from hwmodels import Device
from hwmodels.device import FOLDER, parse_device

from .fit import PathRates, Rates
from .timings import PRECISIONS, RUNTIME, SOURCE

HERE = Path(__file__).parent
TEMPLATE = HERE / "hexagon.yaml.in"
PATHS = {"w8a8": "matrix_int8", "w8a16": "matrix_int16", "float": "matrix_fp16"}
"""AI Hub's precision to the path of the device files."""

COMPUTE = {"w8a8": "int8", "w8a16": "int16", "float": "fp16"}
FITTED_BYTES = 482e6
"""What the largest network of the fit takes in 16 bits, weights and the tensors of one operation: U-Net."""


@dataclass(frozen=True)
class Chip:
    """A chip that is shipped as a device file.

    Attributes:
        id: Name of the file.
        key: AI Hub chip, as in `timings.CHIPS`.
        name: What people call it.
        lpddr: Bandwidth of its main memory in bytes per second and how it was derived; None where it was not found.
        has_float: Whether its NPU runs fp16.
    """

    id: str
    key: str
    name: str
    lpddr: tuple[float, str] | None
    has_float: bool = True


SHIPPED = {
    chip.key: chip
    for chip in (
        Chip(
            *("hexagon_8gen3", "8 Gen 3", "Qualcomm Snapdragon 8 Gen 3, Hexagon NPU"),
            (76.8e9, "LPDDR5X: 64 bits at 4800 MHz, two transfers a cycle"),
        ),
        Chip(
            *("hexagon_8elite", "8 Elite", "Qualcomm Snapdragon 8 Elite, Hexagon NPU"),
            (84.8e9, "LPDDR5X: 64 bits at 5300 MHz, two transfers a cycle"),
        ),
        Chip(
            *("hexagon_qcs6490", "QCS6490", "Qualcomm QCS6490, Hexagon NPU"),
            None,
            has_float=False,
        ),
    )
}


@dataclass(frozen=True)
class Evidence:
    """What a path's rates rest on: networks fitted to, median error and log-spread on those left out."""

    samples: int
    holdout_error: float
    sigma: float


UNIT = Rates(1.0, 1.0, 1.0, 1.0, {name: PathRates(1.0, 1.0) for name in PATHS})
NO_EVIDENCE = {name: Evidence(1, 0.0, 0.0) for name in PATHS}


def device(chip: Chip, rates: Rates) -> Device:
    """The device of a chip at given rates, resting on nothing."""
    anchors = pd.DataFrame(columns=["chip", "model", "precision", "latency_s"])
    text = render(chip, rates, NO_EVIDENCE, "sha256:0", anchors)
    return parse_device(yaml.safe_load(text), TEMPLATE)


def evidence(predicted: pd.DataFrame) -> dict[str, Evidence]:
    """What the leave-one-out predictions of a chip say of each path."""
    found = {}
    for precision, rows in predicted.groupby("precision"):
        logs = np.log(rows.latency_s / rows.roofline_s)
        error = float((rows.roofline_s / rows.latency_s - 1).abs().median())
        found[str(precision)] = Evidence(len(rows), error, float(np.sqrt((logs**2).mean())))
    return found


def render(chip: Chip, rates: Rates, resting: Mapping[str, Evidence], digest: str, anchors: pd.DataFrame) -> str:
    """The device file of a chip."""
    names = [name for name in PATHS if name in rates.paths and (chip.has_float or name != "float")]
    # Shares are of the faster: the one bandwidth that a device file has for layers and what lies between them.
    fastest = max(rates.bandwidth, rates.layer_bandwidth)
    between = "fp16" if chip.has_float else "int16"
    fitted = f"fitted to whole networks, {RUNTIME} runtime, of {SOURCE}"
    whole = Evidence(
        sum(resting[name].samples for name in names),
        float(np.mean([resting[name].holdout_error for name in names])),
        max(resting[name].sigma for name in names),
    )
    calibration = [_path(between, rates.overhead_s, rates.bandwidth / fastest, whole, digest)]
    for name in names:
        share = rates.layer_bandwidth / fastest
        calibration.append(_path(PATHS[name], rates.paths[name].overhead_s, share, resting[name], digest))
    compute = "".join(
        f"  {COMPUTE[name]}:\n    peak: "
        + _leaf(rates.paths[name].operations, "op/s", "a rate reached, not a peak: no peak is published; " + fitted)
        for name in names
    )
    filled = TEMPLATE.read_text(encoding="utf-8")
    values = {
        "ID": chip.id,
        "NAME": chip.name,
        "BETWEEN": between,
        "LAUNCH": _leaf(rates.launch_s, "s", fitted).strip(),
        "BEYOND": _BEYOND if chip.lpddr else _NOTHING_BEYOND,
        "BANDWIDTH": _leaf(fastest, "byte/s", "fitted; activations stay in the NPU's own memory").strip(),
        "MAIN": _main_memory(*chip.lpddr) if chip.lpddr else "",
        "COMPUTE": compute.rstrip(),
        "CALIBRATION": "".join(calibration).rstrip(),
        "FLOATS": _FLOATS if chip.has_float else _NO_FLOATS,
        "ANCHORS": _anchors(anchors[anchors.chip == chip.key]),
    }
    for key, value in values.items():
        filled = filled.replace(f"@{key}@{'' if value else chr(10)}", value)
    return filled


def read_anchors() -> pd.DataFrame:
    """Published latencies of networks that are not in the table: columns `chip, model, precision, latency_s`."""
    rows = pd.read_csv(HERE / "anchors.csv")
    return rows.assign(latency_s=rows.latency_ms / 1e3).drop(columns="latency_ms")


def file_of(chip: Chip) -> Path:
    """Where the device file of a chip is."""
    return FOLDER / f"{chip.id}.yaml"


def _leaf(value: float, unit: str, source: str, confidence: str = "fitted") -> str:
    return f'{{value: {_number(value)}, unit: "{unit}", source: "{source}", confidence: {confidence}}}\n'


def _number(value: float) -> str:
    """Three digits, in a form that YAML reads as a number."""
    if 0.01 <= value < 1000:
        return f"{value:.3g}"
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{mantissa}e{'-' if int(exponent) < 0 else '+'}{abs(int(exponent))}"


def _path(name: str, overhead_s: float, share: float, resting: Evidence, digest: str) -> str:
    fitted = f"fitted, see experiments/cost_models/qualcomm; {SOURCE}"
    leaves = {
        "overhead": _leaf(overhead_s, "s", fitted),
        "compute": _leaf(1.0, "1", "1: the peak is itself a rate that was reached", "derived"),
        "memory": _leaf(share, "1", fitted),
        "sharpness": _leaf(1.0, "1", "assumed: times add up, so that whole networks can be fitted", "assumed"),
        "sigma": _leaf(resting.sigma, "1", "root mean square of log errors, networks left out one by one"),
        "holdout_error": _leaf(resting.holdout_error, "1", "median relative error, networks left out one by one"),
    }
    lines = [f"  {name}:\n", "    tier: calibrated\n", f'    data: "{digest}"\n', f"    samples: {resting.samples}\n"]
    return "".join([*lines, *(f"    {key}: {leaf}" for key, leaf in leaves.items())])


def _main_memory(bandwidth: float, source: str) -> str:
    """The rest of the memory levels: where the effective one ends, and the main memory."""
    capacity = _leaf(FITTED_BYTES, "byte", "assumed: the largest network that was fitted", "assumed").strip()
    rate = _leaf(bandwidth, "byte/s", source, "derived").strip()
    return f"    capacity: {capacity}\n  - name: lpddr\n    bandwidth: {rate}"


def _anchors(rows: pd.DataFrame) -> str:
    if rows.empty:
        return "anchors: []"
    lines = ["anchors:"]
    for row in rows.itertuples():
        latency = _leaf(row.latency_s, "s", f"{SOURCE}, {RUNTIME}", "primary").strip()
        lines.append(f"  - {{network: {row.model}, precision: {PRECISIONS[row.precision]}, latency: {latency}}}")
    return "\n".join(lines)


_BEYOND = """\
# larger networks are priced by the main memory, of which layers get the share that they have of the effective one: slow
# rather than fast, and not held against anything. Integers travel as integers between the layers as well."""

_NOTHING_BEYOND = """\
# the main memory's was not found, so larger networks are priced by it as well, too fast. Integers travel as integers
# between the layers as well."""

_FLOATS = """\
  - kinds: [embedding]
    weights: "*"
    inputs: "*"
    support: native
    compute: fp16
    path: matrix_fp16
    held_input_bits: 16
    note: "a table look-up: rows are read as stored"
  - kinds: "*"
    weights: [float, fp16]
    inputs: [float, fp16]
    support: native
    compute: fp16
    path: matrix_fp16
    held_weight_bits: 16
    held_input_bits: 16
    note: "fp16, which is what AI Hub's float runs in"
  - kinds: "*"
    weights: ["int[2-8]", "uint[2-8]", "int[2-8]-*", "codebook*", binary, ternary, ttq, nf4]
    inputs: "*"
    support: fallback
    compute: fp16
    path: matrix_fp16
    held_weight_bits: 16
    held_input_bits: 16
    note: "fallback: no integer kernel is known for this pair, weights are held and computed in fp16\""""

_NO_FLOATS = """\
  - kinds: "*"
    weights: "*"
    inputs: [float, fp16]
    support: refused
    note: "AI Hub publishes nothing in float on this chip's NPU, in any runtime: quantize weights and inputs\""""
