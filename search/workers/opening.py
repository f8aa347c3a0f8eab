"""Finds the board that a path or a URL names."""

from __future__ import annotations

from pathlib import Path

from search.workers.board import Board

JOURNALS = (".log", ".journal", ".jsonl")
"""How the names of journal files end that are not there yet; any other path that is not there is a run directory."""


def open_board(where: Path | str) -> Board:
    """Returns the board at a place; no study or folder is made before the board itself is opened.

    Args:
        where: A run directory; or the path of a journal file or the URL of a database, with `#NAME` where several
            searches use it at once.

    Raises:
        ConfigError: If it is neither.
    """
    path = Path(str(where).partition("#")[0])
    is_folder = path.is_dir() or not (path.is_file() or path.suffix in JOURNALS)
    if "://" not in str(where) and (Path(where).is_dir() or is_folder):
        from search.workers.folder import FolderBoard

        return FolderBoard(Path(where) / "workers" / "board")
    from search.workers.study import StudyBoard

    return StudyBoard(str(where))
