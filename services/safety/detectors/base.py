"""What a detector is: a bounded pattern, and a check that tells real hits from look-alikes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import re2

from services.safety.patterns import Pattern, parse_pattern


@dataclass(frozen=True, slots=True)
class Hit:
    """The part [start, end) of the text that is really meant, and how sure that is, in (0, 1]."""

    start: int
    end: int
    score: float = 1.0


# Called with folded ASCII text and a candidate [start, end) in it. One character before and one
# after the candidate may be looked at. None refuses the candidate.
Check = Callable[[bytes, int, int], Hit | None]

# Called with the text and the end of a match: where what the match announces really ends, or None
# when the text so far does not tell. Must tell within a bounded number of characters, and not
# before one character after the end is there.
Extend = Callable[[bytes, int], int | None]


@dataclass(frozen=True, slots=True)
class Detector:
    """One kind of thing that can be recognised by its shape."""

    name: str
    pattern: Pattern
    check: Check | None = None
    # Bytes that every match holds; text without them is not searched.
    needs: bytes = b""
    extend: Extend | None = None


def detector(
    name: str,
    source: str,
    check: Check | None = None,
    *,
    ignore_case: bool = False,
    needs: bytes = b"",
    extend: Extend | None = None,
) -> Detector:
    """A detector from the source of its pattern. Raises PatternError."""
    return Detector(name, parse_pattern(source, ignore_case=ignore_case), check, needs, extend)


def stands_alone(text: bytes, start: int, end: int, glue: bytes = b"-./_+") -> bool:
    """Whether a number is not a piece of a longer one such as a version, a date or a serial."""
    if start > 0 and text[start - 1] in glue:
        return False
    # A full stop after a number ends a sentence; what comes after it is not known yet.
    return end >= len(text) or text[end] == ord(".") or text[end] not in glue


_NOT_DIGITS = bytes(byte for byte in range(256) if not 48 <= byte <= 57)


def digits_of(candidate: bytes) -> str:
    """The decimal digits of a candidate."""
    return candidate.translate(None, _NOT_DIGITS).decode("ascii")


def run_of(characters: str, most: int) -> Extend:
    """Ends a match after at most `most` further characters of a class, in RE2's notation.

    Cheaper than a repetition in the pattern: RE2's automaton counts every repetition it is in.
    """
    outside = re2.compile(f"[^{characters}]".encode("ascii"))

    def end_of_run(text: bytes, position: int) -> int | None:
        limit = position + most
        found = outside.search(text, position, min(limit, len(text)))
        if found is not None:
            end: int = found.start()
            return end
        return limit if len(text) > limit else None

    return end_of_run
