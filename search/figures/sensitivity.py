"""The sensitivities: what each single choice does to the network's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from hwmodels import Format
from search.figures import style

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from search.plan import Plan

DECADES = 6  # colours below the largest score


@dataclass(frozen=True)
class Panel:
    """The scores of one side.

    Attributes:
        side: `weight` or `input`.
        decisions: Names of layers or tensors.
        formats: Names of formats, from few bits to many.
        scores: Shape `(formats, decisions)`; NaN where a decision cannot take a format.
        chosen: For each decision, the index of the winner's format.
    """

    side: str
    decisions: tuple[str, ...]
    formats: tuple[str, ...]
    scores: np.ndarray
    chosen: tuple[int, ...]


@dataclass(frozen=True)
class SensitivityInfo:
    """What the heat map shows: a panel per side that has something to decide."""

    panels: tuple[Panel, ...]

    @property
    def limits(self) -> tuple[float, float]:
        """Smallest and largest score that colours tell apart, both above 0."""
        scores = np.concatenate([panel.scores.ravel() for panel in self.panels])
        positive = scores[scores > 0]
        if not len(positive):
            return 1e-6, 1.0
        largest = float(positive.max())
        return max(float(positive.min()), largest / 10**DECADES), largest * 1.001


def sensitivity_info(table: pd.DataFrame, plan: Plan) -> SensitivityInfo | None:
    """Gathers the scores of the table sensitivity.parquet, and what the winner chose; None where all is float."""
    sides = (_panel(side, table[table["side"] == side], plan) for side in ("weight", "input"))
    panels = tuple(panel for panel in sides if panel)
    return SensitivityInfo(panels) if panels else None


def _panel(side: str, rows: pd.DataFrame, plan: Plan) -> Panel | None:
    formats = sorted((Format.parse(name) for name in set(rows["format"])), key=lambda f: (f.is_float, f.bits, f.signed))
    names = [str(format) for format in formats]
    if set(names) <= {"float"}:
        return None
    quantized = set(rows.loc[rows["format"] != "float", "decision"])
    rows = rows[rows["decision"].isin(quantized)]
    first_layers = dict(zip(rows["decision"], (layers.split()[0] for layers in rows["layers"]), strict=True))
    scores = np.full((len(names), len(first_layers)), np.nan)
    column = {decision: index for index, decision in enumerate(first_layers)}
    for decision, format, score in zip(rows["decision"], rows["format"], rows["score"], strict=True):
        scores[names.index(format), column[decision]] = score
    chosen = {layer.name: layer.weight if side == "weight" else layer.input for layer in plan.layers}
    return Panel(
        side=side,
        decisions=tuple(first_layers),
        formats=tuple(names),
        scores=scores,
        chosen=tuple(names.index(chosen[layer]) for layer in first_layers.values()),
    )


def draw_sensitivity(info: SensitivityInfo) -> Figure:
    """Draws decisions across and formats up, in logarithmic colours, with the winner's choices outlined."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm
    from matplotlib.patches import Rectangle

    count = max(len(panel.decisions) for panel in info.panels)
    room = 0.4 + sum(style.names_room(panel.decisions) for panel in info.panels)
    figure, axes = style.panels(
        style.layers_width(count), [0.26 * len(panel.formats) for panel in info.panels], room=room
    )
    low, high = info.limits
    norm = LogNorm(low / 4, high)  # so that the least score is no white, which is left to what there is no score of
    image: Any = None
    for axis, panel in zip(axes, info.panels, strict=True):
        known = np.where(np.isnan(panel.scores), np.nan, np.clip(panel.scores, low, high))
        image = axis.imshow(known, aspect="auto", norm=norm, cmap=colormaps["Purples"], interpolation="nearest")
        for x, y in enumerate(panel.chosen):
            axis.add_patch(
                Rectangle((x - 0.46, y - 0.46), 0.92, 0.92, fill=False, edgecolor=style.WINNER, linewidth=1.6)
            )
        axis.set_yticks(range(len(panel.formats)), list(panel.formats), fontsize=style.SMALL)
        axis.tick_params(axis="y", length=0)
        axis.grid(visible=False)
        axis.spines[:].set_visible(False)
        axis.set_ylabel(f"{panel.side} format", fontsize=style.NORMAL, color=style.INK)
        style.name_columns(axis, panel.decisions)
        axis.set_xlim(-0.5, len(panel.decisions) - 0.5)
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.01, aspect=30)
    bar.set_label("divergence from float outputs", fontsize=style.NORMAL, color=style.INK)
    bar.ax.tick_params(labelsize=style.SMALL, color=style.TRIAL, labelcolor=style.INK, which="both")
    bar.outline.set_visible(False)
    chosen = Rectangle((0, 0), 1, 1, fill=False, edgecolor=style.WINNER, linewidth=1.6)
    style.legend(figure, {"the winner's choice": chosen})
    return figure
