"""Folds a text as it comes and remembers where every folded character came from.

On top of folding (folding.py), runs of whitespace become the first of them: a space or a line end.
A run of more than MAX_DROPPED characters that fold to nothing becomes a BREAK, which matches
nothing: this bounds how much original text one folded match can span.
"""

from __future__ import annotations

import re
from bisect import bisect_right

from services.safety.folding import FOLD

BREAK = "\x1d"
MAX_DROPPED = 64
# What must be looked at character by character. Both branches repeat one class, so that finding
# them takes linear time.
_IRREGULAR = re.compile(r"[^\x20-\x7e\n]+|[ \n]{2,}")


class Normalizer:
    """Folded text with an exact map back to the original.

    Positions are absolute from the first character fed. Position -1 is a virtual line end before
    the text. Invariant: `original_start` never decreases with its argument.
    """

    def __init__(self) -> None:
        self.folded_length = 0
        self.original_length = 0
        # Segments: where each begins in the folded text, and (where its first character is in the
        # original, offsets per folded character or None for text that folds to itself).
        self._starts: list[int] = []
        self._segments: list[tuple[int, list[int] | None]] = []
        self._after_space = True  # the virtual line end
        self._dropped = 0

    def feed(self, text: str) -> str:
        """The folded form of text that follows."""
        out: list[str] = []
        position = 0
        for irregular in _IRREGULAR.finditer(text):
            start, end = irregular.span()
            if start > position:
                self._feed_plain(text, position, start, out)
            self._feed_folded(text, start, end, out)
            position = end
        if position < len(text):
            self._feed_plain(text, position, len(text), out)
        self.original_length += len(text)
        return "".join(out)

    def original_start(self, position: int) -> int:
        """Where the character behind a folded position begins in the original."""
        if position >= self.folded_length:
            return self.original_length
        if position < 0:
            return 0
        segment = bisect_right(self._starts, position) - 1
        base, offsets = self._segments[segment]
        offset = position - self._starts[segment]
        return base + offset if offsets is None else base + offsets[offset]

    def original_span(self, start: int, end: int) -> tuple[int, int]:
        """The original characters behind folded [start, end), with the marks that hang on them."""
        first = self.original_start(start)
        # One character may fold to several, of which the match has but the first.
        return first, max(self.original_start(end), self.original_start(end - 1) + 1)

    def forget(self, position: int) -> None:
        """Drops the map of folded positions before `position`."""
        stale = bisect_right(self._starts, position) - 1
        if stale > 0:
            del self._starts[:stale]
            del self._segments[:stale]

    def _feed_plain(self, text: str, start: int, end: int, out: list[str]) -> None:
        if self._after_space and text[start] in " \n":
            self._feed_folded(text, start, start + 1, out)
            start += 1
            if start == end:
                return
        self._add_segment(start, None, end - start)
        out.append(text[start:end])
        self._after_space = text[end - 1] in " \n"
        self._dropped = 0

    def _feed_folded(self, text: str, start: int, end: int, out: list[str]) -> None:
        characters: list[str] = []
        offsets: list[int] = []
        for index in range(start, end):
            emitted = len(characters)
            for piece in FOLD[text[index]]:
                is_space = piece in " \n"
                if not (is_space and self._after_space):
                    characters.append(piece)
                    offsets.append(index - start)
                self._after_space = is_space
            if len(characters) > emitted:
                self._dropped = 0
                continue
            self._dropped += 1
            if self._dropped > MAX_DROPPED:
                characters.append(BREAK)
                offsets.append(index - start)
                self._dropped = 0
        if characters:
            self._add_segment(start, offsets, len(characters))
            out.append("".join(characters))

    def _add_segment(self, start: int, offsets: list[int] | None, length: int) -> None:
        self._starts.append(self.folded_length)
        self._segments.append((self.original_length + start, offsets))
        self.folded_length += length


def fold(text: str) -> str:
    """A whole short text folded, trimmed of space at both ends: what a term of a policy becomes."""
    return Normalizer().feed(text).strip()
