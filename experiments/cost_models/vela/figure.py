"""What fewer bits save on each accelerator, and how far sums of layers are from whole networks."""

from __future__ import annotations

import pandas as pd

from search.figures import style

COLOURS = ("#0072b2", "#009e73", "#d55e00", "#aa4499")
MARKS = {"inputs at 8 bits": "o", "inputs at 8 and 16 bits": "x"}
COLUMN = "int8/int16"


def draw(uniform: pd.DataFrame, policies: pd.DataFrame) -> bytes:
    """Draws a column for each network: above, latency against weight bits; below, errors of sums. Returns a PNG."""
    from matplotlib.lines import Line2D

    networks = list(dict.fromkeys(uniform["network"]))
    accelerators = list(dict.fromkeys(uniform["accelerator"]))
    palette = dict(zip(accelerators, COLOURS, strict=False))
    figure, axes = style.panels(10.0, [2.4, 1.9], columns=len(networks), room=0.5)
    for column, network in enumerate(networks):
        above, below = axes[column], axes[len(networks) + column]
        for number, accelerator in enumerate(accelerators):
            chosen = {"network": network, "accelerator": accelerator}
            _draw_uniform(above, _only(uniform, chosen), palette[accelerator])
            _draw_errors(below, _only(policies, chosen), number, palette[accelerator])
        above.set_title(network, loc="left", fontsize=style.NORMAL, color=style.INK)
        above.set_xticks([2, 3, 4, 5, 6, 7, 8, 9.5], ["2", "3", "4", "5", "6", "7", "8", "8, wide\ninputs"])
        above.axhline(1, color=style.TRIAL, linewidth=0.8)
        above.set_ylim(bottom=0)
        above.set_xlabel("weight bits", fontsize=style.NORMAL, color=style.INK)
        below.axhline(0, color=style.TRIAL, linewidth=0.8)
        below.set_xticks(range(len(accelerators)), [name.removeprefix("ethos-") for name in accelerators])
        below.set_xlim(-0.5, len(accelerators) - 0.5)
        below.set_ylim(-13, 13)
    axes[0].set_ylabel("latency over int8/int8", fontsize=style.NORMAL, color=style.INK)
    axes[len(networks)].set_ylabel("sum of layers over\nwhole network, %", fontsize=style.NORMAL, color=style.INK)
    entries = {name: Line2D([], [], color=colour, marker="o", markersize=3.5) for name, colour in palette.items()}
    entries["roofline"] = Line2D([], [], color=style.TRIAL, linestyle=":")
    for kind, mark in MARKS.items():
        entries[f"random policies, {kind}"] = Line2D([], [], color=style.INK, marker=mark, linestyle="", markersize=4)
    style.legend(figure, entries, columns=5)
    return style.png(figure)


def _only(rows: pd.DataFrame, chosen: dict[str, str]) -> pd.DataFrame:
    return rows[(rows[list(chosen)] == pd.Series(chosen)).all(axis=1)]


def _draw_uniform(axis, rows: pd.DataFrame, colour: str) -> None:
    found = rows.set_index("precision")
    ratios = found[["vela_s", "roofline_s"]] / found.loc["int8/int8", ["vela_s", "roofline_s"]]
    narrow = ratios.drop(index=COLUMN)
    bits = [int(name[3]) for name in narrow.index]
    axis.plot(bits, narrow["roofline_s"], color=colour, linestyle=":", linewidth=1.1)
    axis.plot(bits, narrow["vela_s"], color=colour, marker="o", markersize=3.5, linewidth=1.3)
    axis.plot([9.5], [ratios.loc[COLUMN, "vela_s"]], color=colour, marker="o", markersize=3.5)
    axis.plot([9.3, 9.7], [ratios.loc[COLUMN, "roofline_s"]] * 2, color=colour, linestyle=":", linewidth=1.1)


def _draw_errors(axis, rows: pd.DataFrame, number: int, colour: str) -> None:
    for side, (kind, mark) in zip((-1, 1), MARKS.items(), strict=True):
        found = rows[rows["kind"] == kind]
        errors = 100 * (found["added_s"] / found["confirmed_s"] - 1)
        places = [number + side * 0.18 + 0.02 * (index - len(errors) / 2) for index in range(len(errors))]
        axis.scatter(places, errors, s=12, marker=mark, color=colour, linewidths=0.9)
