"""Finds the board that a path or a URL names."""

from __future__ import annotations

from pathlib import Path

from search.errors import ConfigError
from search.workers.board import Board

JOURNALS = (".log", ".journal", ".jsonl")
"""How the names of journal files end that are not there yet."""


def study_of(study: str, run_id: str) -> str:
    """Where the board of one search is, with the study's name, so that those who read it find no other search's.

    Args:
        study: Path of a journal file, or URL of a database, with `#NAME` or without.
        run_id: That of the run, by which the study is called if it has no name.
    """
    place, _, name = study.partition("#")
    where = place if "://" in place else str(Path(place).resolve())
    return f"{where}#{name or f'search {run_id[:8]}'}"


def open_board(where: Path | str) -> Board:
    """Returns the board at a place; no study or folder is made before the board itself is opened.

    Args:
        where: A run directory, as a `Path`; or the path of a journal file or the URL of a database, as text, with
            `#NAME` where several searches use it at once.

    Raises:
        ConfigError: If it is neither.
    """
    if isinstance(where, Path):
        from search.workers.folder import FolderBoard

        return FolderBoard(where / "workers" / "board")
    path = Path(where.partition("#")[0])
    if "://" not in where and not path.is_file() and path.suffix not in JOURNALS:
        raise ConfigError(
            f"study={where} is no URL and no journal file; give a URL such as postgresql://user@host/name, or the path "
            f"of a file that is there, or whose name ends in {', '.join(JOURNALS)}"
        )
    from search.workers.study import StudyBoard

    return StudyBoard(where)
