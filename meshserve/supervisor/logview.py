"""Follows the log files of the mesh and shows their lines to a person."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.text import Text

MAX_BYTES_PER_READ = 256 * 2**10
_KNOWN_FIELDS = frozenset({"time", "level", "service", "logger", "message", "exception"})
_HIDDEN_FIELDS = frozenset({"trace_id", "span_id"})
_LEVEL_STYLES = {"debug": "dim", "info": "green", "warning": "yellow", "error": "red"}


class LogFollower:
    """Reads what is appended to one file. Truncation and absence are nothing special."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._partial = b""
        self._offset = self._size()

    def new_lines(self) -> list[str]:
        """Lines completed since the last call."""
        size = self._size()
        if size < self._offset:
            self._offset, self._partial = 0, b""
        if size == self._offset:
            return []
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                data = file.read(MAX_BYTES_PER_READ)
        except OSError:
            return []
        self._offset += len(data)
        *lines, self._partial = (self._partial + data).split(b"\n")
        return [line.decode("utf-8", "replace") for line in lines]

    def _size(self) -> int:
        try:
            return self._path.stat().st_size
        except OSError:
            return 0


def format_lines(name: str, lines: Iterable[str]) -> list[Text]:
    """Log lines as a terminal shows them: JSON records in words, other lines as they are."""
    return [format_line(name, line) for line in lines if line.strip()]


def format_line(name: str, line: str) -> Text:
    """One log line of the process `name`."""
    shown = Text.assemble((f"{name:<10}", "cyan"))
    record = _parsed(line)
    if record is None:
        return shown.append(printable(line))
    level = str(record.get("level", ""))
    moment = str(record.get("time", ""))[11:19]
    shown.append(f"{moment} ", style="dim")
    shown.append(f"{level:<8}", style=_LEVEL_STYLES.get(level, "none"))
    shown.append(printable(str(record.get("message", ""))))
    for key, value in record.items():
        if key not in _KNOWN_FIELDS and key not in _HIDDEN_FIELDS:
            shown.append(f" {key}={printable(str(value))}", style="dim")
    if record.get("exception"):
        shown.append("\n" + printable(str(record["exception"])), style="dim")
    return shown


def printable(text: str) -> str:
    """Text without control characters, which could drive the terminal; newlines and tabs stay."""
    return "".join(
        character
        if character in "\n\t" or (ord(character) >= 32 and not 127 <= ord(character) < 160)
        else "\N{REPLACEMENT CHARACTER}"
        for character in text
    )


def _parsed(line: str) -> dict[str, Any] | None:
    if not line.startswith("{"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "message" in record else None
