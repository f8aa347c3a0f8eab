"""Files that are never half-written, and logs that survive being killed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from search.errors import DataError


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to, and renames it over `path` when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> Path:
    """Writes `text` to `path` in one step."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Writes `value` as indented JSON in one step; NaN and infinities are refused."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


class JsonLines:
    """An append-only log of JSON objects, one a line, flushed to disk line by line.

    A line cut off by a kill is not read, and dropped before the next one is added, so every object read back is whole.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._is_whole = False

    def append(self, value: dict[str, Any]) -> None:
        """Adds one object and waits until it is on disk."""
        line = json.dumps(value, allow_nan=False) + "\n"
        if not self._is_whole:
            self._drop_torn_line()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def _drop_torn_line(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)
        self._is_whole = True

    def read(self) -> list[dict[str, Any]]:
        """Returns every whole object, in the order they were added.

        Raises:
            DataError: If a line is not a JSON object.
        """
        if not self.path.exists():
            return []
        rows = []
        for number, line in enumerate(self.path.read_text(encoding="utf-8").split("\n")[:-1], 1):
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{self.path}, line {number} is damaged ({error}); delete that line to go on"
                ) from error
        return rows
