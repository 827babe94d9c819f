"""What the doctor finds: how it is, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class State(StrEnum):
    """How bad a finding is. A mesh runs in spite of warnings; a problem keeps it from its work."""

    OK = "ok"
    WARNING = "warning"
    PROBLEM = "problem"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at. `remedy` says what to do; empty where nothing is to be done."""

    state: State
    text: str
    remedy: str = ""


def ok(text: str) -> Finding:
    """It is as it should be."""
    return Finding(State.OK, text)


def warning(text: str, remedy: str) -> Finding:
    """It works, but not as well or as safely as it could."""
    return Finding(State.WARNING, text, remedy)


def problem(text: str, remedy: str) -> Finding:
    """It does not work."""
    return Finding(State.PROBLEM, text, remedy)
