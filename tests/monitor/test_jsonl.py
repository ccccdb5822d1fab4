"""Rows on disk that survive a kill at any byte."""

import pytest

from detr_accel.monitor.jsonl import JsonLines, read


def write(path, *rows, **how) -> None:
    file = JsonLines(path, **how)
    for row in rows:
        file.write(row)
    file.close()


@pytest.mark.law8
@pytest.mark.parametrize("text", ["other\x85", "a\u2028b", "a\u2029b", "a\x1cb\x0b", "plain\r\nline"])
def test_what_unicode_calls_the_end_of_a_line_is_none_here(tmp_path, text):
    rows = [{"window": 1, text: 0.5}, {"window": 2, "text": text}]
    write(tmp_path / "r.jsonl", *rows)
    assert read(tmp_path / "r.jsonl") == rows
    write(tmp_path / "r.jsonl", keep_until=1)
    assert read(tmp_path / "r.jsonl") == rows[:1]


def test_a_line_that_was_cut_short_is_dropped(tmp_path):
    path = tmp_path / "r.jsonl"
    write(path, {"window": 1})
    with path.open("ab") as file:
        file.write(b'{"window": 2, "los')
    assert read(path) == [{"window": 1}]
    write(path, {"window": 2}, keep_until=5)
    assert read(path) == [{"window": 1}, {"window": 2}]


def test_what_is_owed_is_written_again(tmp_path):
    rows = [{"window": 2, "val/AP": 0.1}, {"window": 3, "loss": 1}, {"window": 3, "val/AP": 0.2}]
    rows.append({"window": 4, "loss": 2})
    write(tmp_path / "r.jsonl", *rows)
    write(tmp_path / "r.jsonl", keep_until=3, owed="val/")
    assert read(tmp_path / "r.jsonl") == rows[:2]
