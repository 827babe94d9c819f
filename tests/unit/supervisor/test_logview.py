"""Logs are shown as they grow, in words, and cannot drive the terminal."""

from __future__ import annotations

import json
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from meshserve.supervisor.logview import LogFollower, format_line, printable
from meshserve.supervisor.process import last_lines


def test_a_follower_gives_whole_lines_once(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    path.write_text("old\n")
    follower = LogFollower(path)
    with path.open("a") as log:
        log.write("one\ntw")
        log.flush()
        assert follower.new_lines() == ["one"]
        log.write("o\n")
        log.flush()
        assert follower.new_lines() == ["two"]
    assert follower.new_lines() == []


def test_a_follower_survives_truncation_and_absence(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    follower = LogFollower(path)
    assert follower.new_lines() == []
    path.write_text("a long first line\n")
    assert follower.new_lines() == ["a long first line"]
    path.write_text("new\n")
    assert follower.new_lines() == ["new"]


def test_json_records_are_shown_in_words() -> None:
    record = {
        "time": "2026-01-01T12:34:56.789",
        "level": "warning",
        "service": "engine",
        "logger": "x",
        "message": "not serving: stalled",
        "trace_id": "0" * 32,
        "after_s": 5,
    }
    shown = format_line("engine", json.dumps(record)).plain
    assert shown == "engine    12:34:56 warning not serving: stalled after_s=5"


@given(st.text())
def test_any_line_can_be_shown(line: str) -> None:
    assert format_line("a", line).plain.startswith("a")


@given(st.text())
def test_printable_text_has_no_control_characters(text: str) -> None:
    for character in printable(text):
        assert character in "\n\t" or not (ord(character) < 32 or 127 <= ord(character) < 160)


def test_the_last_lines_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    assert last_lines(path, 3) == []
    path.write_text("".join(f"line {i}\n" for i in range(10_000)))
    assert last_lines(path, 2) == ["line 9998", "line 9999"]
