"""A worker for tests: `python board_worker.py WHERE NAME [HOLD]` finishes work until the board is closed.

It prints the key of what it claims, and of what it finishes. With HOLD it claims one piece of work, and sits on it.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from search.workers.board import Board, Outcome
from search.workers.opening import open_board

BEAT_S = 0.2


def board_at(where: str) -> Board:
    return open_board(Path(where) if Path(where).is_dir() else where)


def main(where: str, name: str, holds: bool) -> None:
    board = board_at(where)
    beaten = 0.0
    while not board.is_open:
        time.sleep(0.02)
    while board.is_open:
        if time.monotonic() - beaten > BEAT_S:
            board.beat(name, {"name": name})
            beaten = time.monotonic()
        work = board.claim(name)
        if work is None:
            time.sleep(0.02)
            continue
        print("claimed", work.key, flush=True)
        if holds:
            time.sleep(3600)
        board.finish(work, Outcome(name, {"squared": work.content["value"] ** 2}))
        print("finished", work.key, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:] == ["hold"])
