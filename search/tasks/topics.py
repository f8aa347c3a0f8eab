"""Text for language models: the language reference every Python brings along, or a file of the user's.

The reference is `pydoc_data.topics` of the standard library: 79 topics that repeat one another (`compound` contains
`if`, `for` and `try`; `else` is `if` once more), so that disjoint sets of topics alone would share text. Therefore a
paragraph belongs to one split only, the first in `PRECEDENCE` that has it, and stands there once.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path

from search.errors import DataError

PRECEDENCE = ("report", "selection", "calibration", "train")
HANDS = 9
HELD_OUT = {0: "selection", 1: "report", 2: "calibration"}  # hands of topics that are not for training
FILE_ENDS = {"calibration": 0.25, "selection": 0.5, "report": 1.0}  # shares of a file's characters


def split_of(topic: str) -> str:
    """Returns the split of a topic, by a hash of its name alone, so that it is the same in every Python."""
    return HELD_OUT.get(zlib.crc32(topic.encode()) % HANDS, "train")


def topic_texts() -> dict[str, str]:
    """Returns the text of the three splits and of `train`, from the running Python's own documentation.

    Names of topics are the same from Python 3.11 to 3.13, so the splits are too; what the topics say differs a little
    (they grow from 465 to 511 thousand characters). Perplexities are comparable within one minor version.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    texts = {}
    for split in PRECEDENCE:
        kept = []
        for topic, text in topics.items():
            for paragraph in paragraphs(text) if split_of(topic) == split else ():
                words = " ".join(paragraph.split())  # what is nested is indented
                if words not in seen:
                    seen.add(words)
                    kept.append(paragraph)
        texts[split] = "\n\n".join(kept)
    return texts


def paragraphs(text: str) -> list[str]:
    """Cuts a text at its blank lines."""
    return [paragraph for paragraph in re.split(r"\n\s*\n", text.strip("\n")) if paragraph.strip()]


def file_texts(path: Path) -> dict[str, str]:
    """Cuts a UTF-8 file at line ends: first quarter calibration, second quarter selection, second half report.

    Raises:
        DataError: If there is no such file, or it is not UTF-8.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"task.text={path} cannot be read as UTF-8 text: {error}") from error
    total, begun = sum(map(len, lines)), 0
    texts = dict.fromkeys(FILE_ENDS, "")
    for line in lines:
        split = next(split for split, end in FILE_ENDS.items() if begun < end * total)
        texts[split] += line
        begun += len(line)
    return texts
