"""Bits of several plans layer by layer, one above the other, in the manner of figure 3 of HAQ's paper."""

from __future__ import annotations

from collections.abc import Mapping

from hwmodels import Network
from search.figures import style

TICKS = (-8, -4, 0, 4, 8)


def draw(network: Network, plans: Mapping[str, tuple[str, str]]) -> bytes:
    """Draws weight bits upward and input bits downward, coloured by the kind of layer; returns a PNG.

    Args:
        network: The network.
        plans: For each plan the weight bits and the input bits of every layer, one digit each.
    """
    names, kinds = network.names, [style.layer_kind(row) for row in network.to_rows()]
    palette = style.colours(kinds, style.KIND_COLOURS)
    room = 0.3 + style.names_room(names)
    figure, axes = style.panels(style.layers_width(len(names)), [1.5] * len(plans), room=room)
    for axis, (title, (weights, inputs)) in zip(axes, plans.items(), strict=True):
        for bits, direction, strength in ((weights, 1, 1.0), (inputs, -1, 0.55)):
            heights = [direction * int(digit) for digit in bits]
            axis.bar(range(len(heights)), heights, 0.8, color=[palette[kind] for kind in kinds], alpha=strength)
        axis.axhline(0, color=style.INK, linewidth=0.8)
        axis.set_yticks(TICKS, [str(abs(bits)) for bits in TICKS])
        axis.set_ylim(-8.6, 8.6)
        axis.set_xlim(-0.6, len(names) - 0.4)
        axis.set_xticks([])
        axis.set_title(title, loc="left", fontsize=style.NORMAL, color=style.INK)
        axis.set_ylabel("← input   weight →", fontsize=style.SMALL, color=style.INK)
    style.name_columns(axes[-1], names)
    style.legend(figure, style.swatches(palette))
    return style.png(figure)
