"""Where candidate matches come from: automata over terms, and RE2 over bounded patterns.

A source answers two questions about folded text of which more may come:

- `live(view, first)`: the earliest start, not before `first`, of a match that text to come may
  still complete or lengthen. Starts before it are decided: nothing that follows changes them.
- `find(view, first, live)`: the matches that start in [first, live).

Both cost time linear in what is new, because a start that was decided is never looked at again.
That is what makes the outcome the same however the text is cut into pieces.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import ahocorasick
import re2

from services.safety.detectors.base import Detector, Hit
from services.safety.folding import leet_view, term_view
from services.safety.normalize import fold

# What stands for a character that is not ASCII where patterns look. It matches no class of use.
SUBSTITUTE = 0x1A
_MAX_DFA_BYTES = 64 * 2**20
# Scripts written without spaces: their letters bound no words.
_UNSPACED_RANGES = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1100, 0x11FF),
    (0x1780, 0x17FF),
    (0x2E80, 0x31FF),
    (0x3400, 0x9FFF),
    (0xAC00, 0xD7FF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)


@lru_cache(maxsize=4096)
def is_word_character(character: str) -> bool:
    """Whether a character joins its neighbours to a word, so that a term may not begin inside."""
    code = ord(character)
    if not character.isalnum():
        return False
    return not any(first <= code <= last for first, last in _UNSPACED_RANGES)


class View:
    """Undecided folded text, in the forms the sources look at. All forms have equal length.

    Index 0 is a character that is decided already and serves as context.
    """

    __slots__ = ("_bytes", "_leet", "_terms", "folded", "is_final")

    def __init__(self, folded: str, is_final: bool) -> None:
        self.folded = folded
        self.is_final = is_final
        self._terms: str | None = None
        self._leet: str | None = None
        self._bytes: bytes | None = None

    @property
    def terms(self) -> str:
        """Lower case, hyphens and line ends as spaces."""
        if self._terms is None:
            self._terms = term_view(self.folded)
        return self._terms

    @property
    def leet(self) -> str:
        """As `terms`, with digits that stand for letters read as letters."""
        if self._leet is None:
            self._leet = leet_view(self.terms)
        return self._leet

    @property
    def bytes(self) -> bytes:
        """ASCII, one byte per character, SUBSTITUTE for what is not ASCII."""
        if self._bytes is None:
            folded = self.folded
            if folded.isascii():
                self._bytes = folded.encode("ascii")
            else:
                self._bytes = folded.encode("ascii", "replace") if "?" not in folded else (
                    folded.translate(_NO_QUESTION_MARK).encode("ascii", "replace")
                )  # fmt: skip
                self._bytes = self._bytes.translate(_SUBSTITUTED)
        return self._bytes


# `?` marks what the codec replaced, so a real one is put out of its way first.
_PARKED = 0x1E
_NO_QUESTION_MARK = {ord("?"): chr(_PARKED)}
_SUBSTITUTED = bytes.maketrans(bytes([ord("?"), _PARKED]), bytes([SUBSTITUTE, ord("?")]))


@dataclass(frozen=True, slots=True)
class Match:
    """A candidate in a view: [start, end), which rule made it, and how sure it is."""

    start: int
    end: int
    rule: int
    score: float


class Source(ABC):
    """Finds candidates of some rules. Holds no state of any text."""

    def __init__(self, holds_back: bool) -> None:
        # Whether text that may become a match must be kept from the reader meanwhile.
        self.holds_back = holds_back

    @abstractmethod
    def live(self, view: View, first: int) -> int:
        """The earliest start in [first, len] from which a match may still come."""

    @abstractmethod
    def find(self, view: View, first: int, live: int) -> Iterator[Match]:
        """Matches that start in [first, live), in any order."""


@dataclass(frozen=True, slots=True)
class Term:
    """A word or phrase. `*` at an end of `text` lets it begin or end inside a word."""

    text: str
    rule: int
    score: float = 1.0


@dataclass(frozen=True, slots=True)
class _Entry:
    length: int
    open_left: bool
    open_right: bool
    rule: int
    score: float


class TermSource(Source):
    """An Aho-Corasick automaton (Aho and Corasick, 1975) over terms that respects word bounds."""

    def __init__(self, terms: Iterable[Term], *, leet: bool, holds_back: bool) -> None:
        super().__init__(holds_back)
        self._leet = leet
        self._longest = 0
        self._any_open_left = False
        entries: dict[str, list[_Entry]] = {}
        for term in terms:
            open_left, open_right = term.text.startswith("*"), term.text.endswith("*")
            text = self.folded(term.text, leet=leet)
            self._longest = max(self._longest, len(text))
            self._any_open_left |= open_left or not is_word_character(text[0])
            entry = _Entry(len(text), open_left, open_right, term.rule, term.score)
            entries.setdefault(text, []).append(entry)
        self._begins = frozenset(text[0] for text in entries)
        self._automaton: Any = ahocorasick.Automaton()
        for text, found in entries.items():
            self._automaton.add_word(text, tuple(found))
        self._automaton.make_automaton()

    @staticmethod
    def folded(text: str, *, leet: bool = False) -> str:
        """A term of a policy as it is looked for; empty when nothing of it is left."""
        plain = " ".join(term_view(fold(text.strip("*"))).split())
        return leet_view(plain) if leet else plain

    def live(self, view: View, first: int) -> int:
        text = view.leet if self._leet else view.terms
        end = len(text)
        tail_start = max(first, end - self._longest)
        tail = text[tail_start:]
        begins = self._begins
        longest_prefix = self._automaton.longest_prefix
        for offset, character in enumerate(tail):
            if character not in begins:
                continue
            if not self._any_open_left and _inside_word(text, tail_start + offset):
                continue
            if longest_prefix(tail[offset:]) == len(tail) - offset:
                return tail_start + offset
        return end

    def find(self, view: View, first: int, live: int) -> Iterator[Match]:
        text = view.leet if self._leet else view.terms
        length = len(text)
        for last, entries in self._automaton.iter(text, first):
            end = last + 1
            for entry in entries:
                start = end - entry.length
                if not first <= start < live:
                    continue
                if not entry.open_left and _inside_word(text, start):
                    continue
                if not entry.open_right and end < length and _inside_word(text, end):
                    continue
                yield Match(start, end, entry.rule, entry.score)


def _inside_word(text: str, position: int) -> bool:
    """Whether a word goes on across `position`."""
    return is_word_character(text[position - 1]) and is_word_character(text[position])


@dataclass(frozen=True, slots=True)
class PatternRule:
    """A detector and the rule that its matches belong to."""

    detector: Detector
    rule: int
    # Replaces the detector's own score.
    score: float | None = None


class PatternSource(Source):
    """Detectors over bounded patterns, searched by RE2 in linear time.

    A candidate that its detector's check refuses is tried again from its next character on, so a
    number that follows another is still found.
    """

    def __init__(self, rules: Sequence[PatternRule], *, holds_back: bool) -> None:
        super().__init__(holds_back)
        self._rules = tuple(rules)
        self._words = [compile_pattern(rule.detector.pattern.words) for rule in rules]
        self._any_word = compile_pattern("|".join(rule.detector.pattern.words for rule in rules))
        prefixes = "|".join(rule.detector.pattern.prefixes for rule in rules)
        self._any_prefix = compile_pattern(rf"(?:{prefixes})\z")
        self._extended = [
            (rule, words)
            for rule, words in zip(self._rules, self._words, strict=True)
            if rule.detector.extend is not None
        ]
        self._longest = max(rule.detector.pattern.max_width_chars for rule in rules)

    def live(self, view: View, first: int) -> int:
        text = view.bytes
        found = self._any_prefix.search(text, max(first, len(text) - self._longest))
        start: int = found.start() if found is not None else len(text)
        for rule, words in self._extended:
            opened = self._first_unended(rule.detector, words, text, first, start)
            start = min(start, opened)
        return start

    @staticmethod
    def _first_unended(made: Detector, words: Any, text: bytes, first: int, live: int) -> int:
        """The first start before `live` of a match that `extend` cannot end yet, or `live`."""
        if made.extend is None or text.find(made.needs, first) < 0:
            return live
        position = first
        while (found := words.search(text, position)) is not None and found.start() < live:
            start: int = found.start()
            end: int = found.end()
            real = made.check is None or made.check(text, start, end) is not None
            if real and made.extend(text, end) is None:
                return start
            position = start + 1
        return live

    def find(self, view: View, first: int, live: int) -> Iterator[Match]:
        text = view.bytes
        if self._any_word.search(text, first) is None:
            return
        for rule, words in zip(self._rules, self._words, strict=True):
            needed = rule.detector.needs
            if needed and text.find(needed, first) < 0:
                continue
            position = first
            while (found := words.search(text, position)) is not None:
                start, end = found.span()
                if start >= live:
                    break
                check = rule.detector.check
                hit = Hit(start, end) if check is None else check(text, start, end)
                if hit is not None:
                    end = hit.end
                    if rule.detector.extend is not None:
                        end = rule.detector.extend(text, end) or len(text)
                    score = hit.score if rule.score is None else rule.score
                    yield Match(hit.start, end, rule.rule, score)
                position = start + 1


def compile_pattern(source: str) -> Any:
    """An RE2 expression over one-byte characters. Raises re2.error when it is too large."""
    options = re2.Options()
    options.encoding = re2.Options.Encoding.LATIN1
    options.max_mem = _MAX_DFA_BYTES
    options.log_errors = False
    return re2.compile(source.encode("ascii"), options)
