"""A cost table as a file, CSV or Parquet: a row for every precision of every layer, for other tools to read."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

from hwmodels.cost import COSTS, CostTable
from hwmodels.table_file import Columns, write_rows

COLUMNS: Columns = {
    **dict.fromkeys(("layer", "weight", "input"), str),
    **dict.fromkeys(COSTS, float),
    **dict.fromkeys(("compute", "bound", "path", "tier", "support"), str),
}
"""Columns of the file: the layer, its precision, and the fields of `LayerCost`."""


def write_costs(path: str | Path, table: CostTable) -> None:
    """Writes what every precision of every layer costs; what is not known is left empty.

    Boundaries and what is fixed are not in it, for they belong to no layer.

    Raises:
        ValueError: If the path ends neither in `.csv` nor in `.parquet`.
    """
    rows = []
    for layer, costs in table.layers.items():
        for precision, one in costs.items():
            run = one.compute, one.bound, one.path, one.tier, one.support
            rows.append((layer, str(precision.weight), str(precision.input), *astuple(one.cost), *run))
    write_rows(Path(path), COLUMNS, rows)
