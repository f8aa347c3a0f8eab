"""Files that are never half-written, and logs that survive being killed.

Nearly everything is written here, so that what the operating system refuses is explained here, too: a full disk, a
read-only file system or a missing permission become a `FileError` that names the file and what helps.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

from search.errors import BitplanError, DataError, FileError, file_error, file_errors

Read = TypeVar("Read")


PACKAGES = str(Path(__file__).resolve().parent.parent)
"""Where this package is, installed or a checkout: for processes that are to find it, and no search.py elsewhere."""


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to, and renames it over `path` when the block ends without an error.

    Raises:
        FileError: If the operating system does not let it be written.
    """
    path = Path(path)
    aside = path.with_name(f".{path.name}.{uuid4().hex}.part")
    try:
        with file_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield aside
        os.replace(aside, path)
    except OSError as error:
        others = error.filename not in (None, str(aside))  # the block read something else
        explained = None if _is_forgotten(error, aside) else file_error(error, error.filename if others else path)
        if explained is None:
            raise
        raise explained from error
    finally:
        with suppress(OSError):  # of a folder that is gone or read-only: told above
            aside.unlink(missing_ok=True)


def _is_forgotten(error: OSError, aside: Path) -> bool:
    """Whether the block wrote nothing, which is nothing that a user could put right."""
    return isinstance(error, FileNotFoundError) and error.filename == str(aside) and aside.parent.is_dir()


def write_text(path: str | Path, text: str) -> Path:
    """Writes `text` to `path` in one step."""
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")
    return Path(path)


def write_json(path: str | Path, value: Any) -> Path:
    """Writes `value` as indented JSON in one step; NaN and infinities are refused."""
    return write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def copy_file(source: str | Path, target: str | Path) -> int:
    """Copies a file with its times, in one step; returns its bytes."""
    with replacing(target) as aside:
        shutil.copy2(source, aside)
        return aside.stat().st_size


def read_json(path: str | Path, remedy: str) -> Any:
    """Reads a JSON file.

    Args:
        path: The file.
        remedy: What the user may do where it is damaged.

    Raises:
        DataError: If it is damaged; the message names the line.
        FileError: If it cannot be read.
    """
    with file_errors(path):
        content = Path(path).read_bytes()
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno} is damaged ({error.msg}); {remedy}") from error
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise DataError(f"{path}, line {line} is damaged ({error.reason}); {remedy}") from error


class JsonLines:
    """An append-only log of JSON objects, one a line, flushed to disk line by line.

    A line cut off by a kill or a full disk is not read, and dropped before the next one is added, so every object read
    back is whole.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._is_whole = False

    def append(self, value: dict[str, Any]) -> None:
        """Adds one object and waits until it is on disk.

        Raises:
            FileError: If the operating system does not let it be added.
        """
        line = json.dumps(value, allow_nan=False) + "\n"
        with file_errors(self.path):
            if not self._is_whole:
                self._drop_torn_line()
            self._is_whole = False
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
            self._is_whole = True

    def _drop_torn_line(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def read(self) -> list[dict[str, Any]]:
        """Returns every whole object, in the order they were added.

        Raises:
            DataError: If a line is not a JSON object.
        """
        return self.read_as(dict)

    def read_as(self, make: Callable[[dict[str, Any]], Read]) -> list[Read]:
        """Returns what `make` makes of every whole object, in the order they were added.

        Raises:
            DataError: If a line is not a JSON object, or not one that `make` can use.
        """
        if not self.path.exists():
            return []
        made = []
        with file_errors(self.path):
            lines = self.path.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"it holds a {type(row).__name__}")
                made.append(make(row))
            except (ValueError, KeyError, TypeError, AttributeError, BitplanError) as error:
                if isinstance(error, FileError):
                    raise
                why = f"it has no {error}" if isinstance(error, KeyError) else str(error)
                raise DataError(
                    f"{self.path}, line {number} is damaged ({why}); delete that line to go on: what it said is found "
                    "out again"
                ) from error
        return made
