"""Text for language models: splits that share nothing, the same in every Python."""

from __future__ import annotations

from pathlib import Path
from pydoc_data.topics import topics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.errors import DataError
from search.tasks.topics import file_texts, paragraphs, split_of, topic_texts

REPORT = {
    *(
        "attribute-references",
        "await",
        "bltin-code-objects",
        "comparisons",
        "continue",
        "del",
        "else",
        "floating",
        "for",
    ),
    *("id-classes", "identifiers", "naming", "return", "strings", "typesmodules", "while", "yield"),
}
SELECTION = {"augassign", "conversions", "customization", "dict", "dynamic-features", "global"}
CALIBRATION = {"context-managers", "formatstrings", "if", "numeric-types", "pass"}


def words(text: str) -> list[str]:
    return [" ".join(paragraph.split()) for paragraph in paragraphs(text)]


def test_topics_of_each_split_are_the_same_in_every_python() -> None:
    expected = dict.fromkeys(REPORT, "report") | dict.fromkeys(SELECTION, "selection")
    expected |= dict.fromkeys(CALIBRATION, "calibration")
    assert set(expected) <= set(topics)
    assert {topic: split_of(topic) for topic in topics} == {topic: expected.get(topic, "train") for topic in topics}


def test_every_paragraph_stands_in_one_split_once() -> None:
    found = {split: words(text) for split, text in topic_texts().items()}
    everywhere = [paragraph for split in found.values() for paragraph in split]
    assert len(everywhere) == len(set(everywhere))
    assert set(everywhere) == {paragraph for text in topics.values() for paragraph in words(text)}
    assert set(found["report"]) == {paragraph for topic in REPORT for paragraph in words(topics[topic])}
    assert set(words(topics["compound"])) & set(found["report"]), "what `compound` repeats of `for` is not for training"


def test_sizes_of_the_splits() -> None:
    sizes = {split: len(text) for split, text in topic_texts().items()}
    assert sizes["train"] > 250_000
    assert min(sizes.values()) > 18_000


def test_paragraphs() -> None:
    assert paragraphs("\n\n one\n  two\n\n  \n\nthree\n\n") == [" one\n  two", "three"]
    assert paragraphs("\n \n") == []


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r"), max_size=30), max_size=40))
def test_files_are_cut_at_line_ends(tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> None:
    path, whole = tmp_path_factory.mktemp("text") / "text.txt", "\n".join(lines)
    path.write_text(whole, encoding="utf-8")
    texts = file_texts(path)
    assert list(texts) == ["calibration", "selection", "report"]
    assert "".join(texts.values()) == whole
    position, longest = 0, max(map(len, whole.splitlines(keepends=True)), default=0)
    for split, end in (("calibration", 0.25), ("selection", 0.5)):
        position += len(texts[split])
        assert end * len(whole) <= position < end * len(whole) + longest or not whole


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"task\.text=.*none.txt cannot be read as UTF-8 text"):
        file_texts(tmp_path / "none.txt")
    (tmp_path / "latin.txt").write_bytes("über".encode("latin-1"))
    with pytest.raises(DataError, match="cannot be read as UTF-8 text: 'utf-8' codec"):
        file_texts(tmp_path / "latin.txt")
