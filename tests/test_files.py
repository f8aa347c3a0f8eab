"""Files that are whole or not there, and logs that outlive a kill."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.errors import BitplanError, DataError, closest
from search.files import JsonLines, replacing, write_json, write_text

ROWS = [{"a": 1}, {"b": [1.5, None, "ü"]}, {"c": {"d": True}}]


def test_rows_come_back(tmp_path: Path) -> None:
    log = JsonLines(tmp_path / "deep" / "log.jsonl")
    assert log.read() == []
    for row in ROWS:
        log.append(row)
    assert JsonLines(log.path).read() == log.read() == ROWS


def test_a_kill_at_any_byte_loses_at_most_the_last_row(tmp_path: Path) -> None:
    whole = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    path = tmp_path / "log.jsonl"
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        rows = JsonLines(path).read()
        assert rows == ROWS[: whole[:length].count(b"\n")]
        JsonLines(path).append({"next": 1})
        assert JsonLines(path).read() == [*rows, {"next": 1}]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"a": 1}\n{"b": \n{"c": 3}\n')
    with pytest.raises(DataError, match=r"log.jsonl, line 2 is damaged .*delete that line"):
        JsonLines(path).read()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_no_nan_in_json(tmp_path: Path, value: float) -> None:
    log = JsonLines(tmp_path / "log.jsonl")
    with pytest.raises(ValueError, match="not JSON compliant"):
        log.append({"a": value})
    assert log.read() == []
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "value.json", value)
    assert [path.name for path in tmp_path.iterdir()] in ([], ["log.jsonl"])


def test_replacing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.txt"
    write_text(path, "old")
    with suppress(RuntimeError), replacing(path) as aside:
        aside.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old"
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written aside
    assert path.read_text() == "old"
    assert [item.name for item in path.parent.iterdir()] == ["file.txt"]
    write_text(path, "new")
    assert path.read_text() == "new"


@given(name=st.text("abcde_", min_size=3, max_size=8))
def test_closest_knows_exact_names_in_any_case(name: str) -> None:
    assert repr(name) in closest(name.upper(), [name, "zzzzzzzzz"])


def test_closest() -> None:
    assert "'head'" in closest("heat", ["stem", "head"])
    assert closest("xyz", ["stem", "head"]) == ""
    assert issubclass(DataError, BitplanError)
