"""Writes typed results as JSON."""

from __future__ import annotations

import dataclasses
import json
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO


def write_json(value: Any, stream: TextIO) -> None:
    """One JSON document and a line end."""
    json.dump(value, stream, ensure_ascii=False, indent=2, default=_plain)
    stream.write("\n")


def _plain(value: object) -> object:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, bytes):  # text of a token, which may be part of a character
        return value.decode("utf-8", "replace")
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")
