"""Tables as files, CSV or Parquet by their suffix, with exactly the columns that are asked for.

Both hold the same: numbers as they are, truth as `true` and `false`, and nothing where a float is not known.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hwmodels.device import closest, listed

Columns = Mapping[str, type]
"""Name to type: `str`, `int`, `float` or `bool`."""

Row = tuple[str, dict[str, Any]]
"""A row with its place in the file, for messages: `line 2` of CSV, `row 1` of Parquet."""

SUFFIXES = (".csv", ".parquet")


def read_rows(path: Path, columns: Columns) -> list[Row]:
    """Reads a table; floats that are left out become NaN.

    Raises:
        ValueError: If the file cannot be read, has other columns, or a value is not of its column's type; the message
            names file, place and column.
    """
    read = _read_csv if _suffix(path) == ".csv" else _read_parquet
    try:
        names, rows = read(path)
    except OSError as error:
        raise ValueError(f"cannot read table {path}: {error.strerror or error}") from error
    _check_names(names, columns, path)
    return [
        (place, {name: _parse(text, columns[name], f"{path}, {place}: {name}") for name, text in row.items()})
        for place, row in rows
    ]


def write_rows(path: Path, columns: Columns, rows: Iterable[Sequence[Any]]) -> None:
    """Writes rows of values in the order of `columns`.

    Raises:
        ValueError: If the path's suffix is neither of a CSV nor of a Parquet file.
    """
    suffix = _suffix(path)
    with replacing(path) as aside:
        if suffix == ".csv":
            aside.write_text(csv_text(columns, rows), encoding="utf-8", newline="")
        else:
            _write_parquet(aside, columns, list(rows))


def csv_text(columns: Columns, rows: Iterable[Sequence[Any]]) -> str:
    """A table as the text of a CSV file."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_text(value) for value in row] for row in rows)
    return buffer.getvalue()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to, and renames it over `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.urandom(8).hex()}.part")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _suffix(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path} ends in {path.suffix!r}; a table ends in {' or '.join(SUFFIXES)}")
    return path.suffix


def _check_names(given: Sequence[str], columns: Columns, path: Path) -> None:
    for name in given:
        if name not in columns:
            hint = f"{closest(name, columns)}; columns: {listed(columns)}"
            raise ValueError(f"{path}: no column is called {name!r}{hint}")
        if given.count(name) > 1:
            raise ValueError(f"{path}: column {name!r} occurs twice")
    missing = [name for name in columns if name not in given]
    if missing:
        raise ValueError(f"{path}: missing columns: {listed(missing)}")


def _text(value: Any) -> str:
    """A value as a file has it; a float by `repr`, which reads back to the very same."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return repr(float(value)) if isinstance(value, float) else str(value)


def _parse(text: str, kind: type, where: str) -> Any:
    if kind is int and not re.fullmatch(r"-?\d+", text):
        raise ValueError(f"{where}: {text!r} is no whole number")
    if kind is bool and text.lower() not in ("true", "false"):
        raise ValueError(f"{where}: {text!r} is neither true nor false")
    if kind is bool:
        return text.lower() == "true"
    if kind is float and not text:
        return math.nan
    try:
        return kind(text)
    except ValueError:
        raise ValueError(f"{where}: {text!r} is no number") from None


TextRows = list[tuple[str, dict[str, str]]]


def _read_csv(path: Path) -> tuple[list[str], TextRows]:
    reader = csv.reader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""), strict=True)
    rows = []
    try:
        names = next(reader, [])
        for values in reader:
            place = f"line {reader.line_num}"
            if len(values) != len(names):
                raise ValueError(f"{path}, {place}: {len(values)} values for {len(names)} columns")
            rows.append((place, dict(zip(names, values, strict=True))))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
    return names, rows


def _read_parquet(path: Path) -> tuple[list[str], TextRows]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path).read()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{path} is no Parquet file: {error}") from error
    values = [[_text(value) for value in column.to_pylist()] for column in table.columns]
    rows = [dict(zip(table.column_names, row, strict=True)) for row in zip(*values, strict=True)]
    return table.column_names, [(f"row {number}", row) for number, row in enumerate(rows, 1)]


def _write_parquet(path: Path, columns: Columns, rows: Sequence[Sequence[Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    types = {str: pyarrow.string(), int: pyarrow.int64(), float: pyarrow.float64(), bool: pyarrow.bool_()}
    values = zip(*rows, strict=True) if rows else ((),) * len(columns)
    arrays = {
        name: pyarrow.array(column, types[kind], from_pandas=True)  # NaN becomes null
        for (name, kind), column in zip(columns.items(), values, strict=True)
    }
    pyarrow.parquet.write_table(pyarrow.table(arrays), path)
