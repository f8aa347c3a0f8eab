"""What every backend makes of every format, as the table of the README: asked of the backends, not typed.

Usage: `python -m search.backends.matrix` prints it. What it says is what the conformance tests hold the backends to.
"""

from __future__ import annotations

from collections.abc import Iterator

from hwmodels import Format, Layer, Precision
from hwmodels.precision import Side
from search.backends import BACKENDS, backend
from search.backends.base import Backend

LAYERS = {
    "linear": Layer("linear", "linear", weight_shape=(64, 128)),
    "conv": Layer("conv", "conv2d", weight_shape=(64, 32, 3, 3), kernel=(3, 3), stride=(1, 1)),
    "embedding": Layer("embedding", "embedding", weight_shape=(64, 128), quantizes_input=False),
}
WEIGHTS = (
    *("int2", "int3", "int4", "int5", "int6", "int8", "int16", "uint4", "uint8", "int8-tensor"),
    *("int2-g32", "int4-g32", "int4-asym-g32", "int8-g32", "fp8_e4m3", "mxfp4", "nvfp4", "nf4", "codebook4"),
    *("ternary", "fp16"),
)
INPUTS = (
    *("uint4", "uint6", "uint8", "uint16", "int8", "int16", "uint8-sym"),
    *("int8-token", "int8-dynamic", "fp8_e4m3", "mxfp8"),
)
NONE = "–"
MEANINGS = ("exact", "contained", "own ranges")
HEADER = "| backend | proved | layers | weights | inputs |\n|---|---|---|---|---|"


def table() -> str:
    """The table in Markdown: a row for every backend and the kinds of layers that it treats alike."""
    return "\n".join([HEADER, *(row for name in BACKENDS for row in rows(backend(name, "plan")))])


def rows(one: Backend) -> Iterator[str]:
    """The rows of one backend."""
    alike: list[tuple[str, str, list[str]]] = []
    for kind, layer in LAYERS.items():
        weights, inputs = _cell(one, layer, "weight"), _cell(one, layer, "input")
        for row in alike:
            if row[0] == weights and inputs in (row[1], NONE):
                row[2].append(kind)
                break
        else:
            alike.append((weights, inputs, [kind]))
    for position, (weights, inputs, kinds) in enumerate(alike):
        how = f"{one.proof}: {one.reason}" if one.reason else one.proof
        first = f"`{one.name}` | {how}" if position == 0 else " | "
        yield f"| {first} | {', '.join(kinds)} | {weights} | {inputs} |"


def _cell(one: Backend, layer: Layer, side: Side) -> str:
    """The formats of one side by what becomes of them, in words; those left out run as others, or in float."""
    if side == "input" and not layer.quantizes_input:
        return NONE
    names = WEIGHTS if side == "weight" else INPUTS
    found: dict[str, list[str]] = {meaning: [] for meaning in MEANINGS}
    for name in names:
        best = min((_meaning(one, layer, side, name, other) for other in _partners(side, layer)), key=_rank)
        if best in found:
            found[best].append(name)
    if len(found["contained"]) > 1 and len(found["exact"]) + len(found["contained"]) == len(names):
        found["contained"] = ["all others" if found["exact"] else "all"]
    parts = [f"{meaning}: {', '.join(formats)}" for meaning, formats in found.items() if formats]
    return "; ".join(parts) or "float"


def _partners(side: Side, layer: Layer) -> tuple[str, ...]:
    """What the other side may be, so that a format counts that only some pairs support."""
    if side == "weight":
        return ("float", *INPUTS) if layer.quantizes_input else ("float",)
    return ("float", *WEIGHTS)


def _meaning(one: Backend, layer: Layer, side: Side, name: str, other: str) -> str:
    precision = Precision.parse(f"{name}/{other}" if side == "weight" else f"{other}/{name}")
    said = one.express(layer, precision)
    runs = Precision.parse(said.runs or said.precision)
    became, running = (said.weight, runs.weight) if side == "weight" else (said.input, runs.input)
    if became == "altered" and one.ranges == "own" and running == Format.parse(name):
        return "own ranges"
    return became


def _rank(meaning: str) -> int:
    return MEANINGS.index(meaning) if meaning in MEANINGS else len(MEANINGS)


if __name__ == "__main__":
    print(table())
