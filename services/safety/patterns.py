"""Bounded patterns: a small regular-expression language whose matches have a largest length.

Matching is left to RE2, whose time is linear in the text. What RE2 does not tell is whether the end
of a text may still grow into a match. For that a second expression is derived from each pattern:
it matches the prefixes of its words. `(?:prefixes)\\z` then finds the earliest place from which a
match may still come. Assertions are dropped from prefixes, except at the start, where what they
look at is known already; a prefix expression so accepts at least what it must.

The language: literals, escapes (`\\d \\w \\s` and capitals, `\\n \\t`, escaped signs), classes,
`.`, groups, alternation, `?`, `{n}` and `{m,n}`, and the assertions `\\b` and `\\B`. Open-ended
repetition is refused: a match without a bound could not be held back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

MAX_WIDTH_CHARS = 2400
_MAX_REPEAT = 512
# Longer repetitions are not counted where prefixes are looked for.
_MAX_COUNTED = 20


class PatternError(ValueError):
    """A pattern that cannot be used; the text says where and why."""


@dataclass(frozen=True, slots=True)
class _Chars:
    source: str


@dataclass(frozen=True, slots=True)
class _Assertion:
    source: str


@dataclass(frozen=True, slots=True)
class _Sequence:
    parts: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Alternatives:
    options: tuple[_Node, ...]


@dataclass(frozen=True, slots=True)
class _Repeat:
    node: _Node
    least: int
    most: int


_Node: TypeAlias = "_Chars | _Assertion | _Sequence | _Alternatives | _Repeat"


@dataclass(frozen=True, slots=True)
class Pattern:
    """A parsed pattern: RE2 sources of its words and of their prefixes."""

    words: str
    prefixes: str
    max_width_chars: int


def parse_pattern(source: str, *, ignore_case: bool = False) -> Pattern:
    """Parses a pattern. Raises PatternError."""
    if not source.isascii():
        raise PatternError("patterns see folded text and are ASCII; put words of other scripts "
                           "in `terms`")  # fmt: skip
    node = _Parser(source).parse()
    least, most = _width(node)
    if least == 0:
        raise PatternError("matches the empty text")
    if most > MAX_WIDTH_CHARS:
        raise PatternError(f"may match {most} characters; at most {MAX_WIDTH_CHARS} are allowed")
    flag = "(?i:" if ignore_case else "(?:"
    return Pattern(f"{flag}{_words(node)})", f"{flag}{_top_prefixes(node)})", most)


class _Parser:
    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0

    def parse(self) -> _Node:
        node = self._alternatives(depth=0)
        if self._at < len(self._source):
            raise self._error("unbalanced `)`")
        return node

    def _error(self, problem: str) -> PatternError:
        return PatternError(f"{problem} at character {self._at + 1} of the pattern")

    def _peek(self) -> str:
        return self._source[self._at : self._at + 1]

    def _alternatives(self, depth: int) -> _Node:
        if depth > 16:
            raise self._error("groups nested too deep")
        options = [self._sequence(depth)]
        while self._peek() == "|":
            self._at += 1
            options.append(self._sequence(depth))
        return options[0] if len(options) == 1 else _Alternatives(tuple(options))

    def _sequence(self, depth: int) -> _Node:
        parts: list[_Node] = []
        while self._peek() not in ("", "|", ")"):
            parts.append(self._quantified(self._atom(depth)))
        return _Sequence(tuple(parts))

    def _atom(self, depth: int) -> _Node:
        character = self._peek()
        if character == "(":
            self._at += 1
            if self._peek() == "?":
                if self._source[self._at : self._at + 2] != "?:":
                    raise self._error("only `(?:...)` groups are known")
                self._at += 2
            node = self._alternatives(depth + 1)
            if self._peek() != ")":
                raise self._error("missing `)`")
            self._at += 1
            return node
        if character == "[":
            return self._char_class()
        if character == "\\":
            escape = self._escape()
            return _Assertion(escape) if escape in ("\\b", "\\B") else _Chars(escape)
        if character in "*+?{":
            raise self._error("nothing to repeat")
        if character in "^$":
            raise self._error("`^` and `$` are not known; use \\b or \\n")
        self._at += 1
        return _Chars("\\" + character if character in "]}" else character)

    def _escape(self) -> str:
        escape = self._source[self._at : self._at + 2]
        following = escape[1:]
        if not following or (following.isalnum() and following not in "dDwWsSbBnt"):
            raise self._error("unknown escape")
        self._at += 2
        return escape

    def _char_class(self) -> _Node:
        start = self._at
        self._at += 1
        if self._peek() == "^":
            self._at += 1
        first = True
        while (character := self._peek()) != "]" or first:
            if not character:
                raise self._error("missing `]`")
            if character == "\\":
                if self._escape() in ("\\b", "\\B"):
                    raise self._error("unknown escape in a class")
            elif character == "[" and self._source[self._at + 1 : self._at + 2] == ":":
                raise self._error("named classes are not known")
            else:
                self._at += 1
            first = False
        self._at += 1
        return _Chars(self._source[start : self._at])

    def _quantified(self, node: _Node) -> _Node:
        character = self._peek()
        if character in ("*", "+"):
            raise self._error(f"`{character}` has no bound; write {{m,n}}")
        if character == "?":
            self._at += 1
            least, most = 0, 1
        elif character == "{":
            least, most = self._bounds()
        else:
            return node
        if self._peek() in ("?", "*", "+", "{") and self._peek():
            raise self._error("a repetition cannot be repeated")
        if isinstance(node, _Assertion):
            raise self._error("an assertion cannot be repeated")
        return _Repeat(node, least, most)

    def _bounds(self) -> tuple[int, int]:
        end = self._source.find("}", self._at)
        numbers = self._source[self._at + 1 : end].split(",") if end > 0 else []
        if len(numbers) not in (1, 2) or not all(n.isdigit() and len(n) < 5 for n in numbers):
            raise self._error("a repetition is `{n}` or `{m,n}`, with a bound")
        least, most = int(numbers[0]), int(numbers[-1])
        if least > most or most == 0 or most > _MAX_REPEAT:
            raise self._error(f"a repetition runs from m to n, n at most {_MAX_REPEAT}")
        self._at = end + 1
        return least, most


def _width(node: _Node) -> tuple[int, int]:
    match node:
        case _Chars():
            return 1, 1
        case _Assertion():
            return 0, 0
        case _Sequence(parts):
            widths = [_width(part) for part in parts]
            return sum(w[0] for w in widths), sum(w[1] for w in widths)
        case _Alternatives(options):
            widths = [_width(option) for option in options]
            return min(w[0] for w in widths), max(w[1] for w in widths)
        case _Repeat(inner, least, most):
            width = _width(inner)
            return width[0] * least, width[1] * most


def _words(node: _Node) -> str:
    match node:
        case _Chars(source):
            return source
        case _Assertion(source):
            return source
        case _Sequence(parts):
            return "".join(map(_words, parts))
        case _Alternatives(options):
            return f"(?:{'|'.join(map(_words, options))})"
        case _Repeat(inner, least, most):
            return f"(?:{_words(inner)}){{{least},{most}}}"


def _loose_words(node: _Node) -> str:
    """At least the words of a node, without assertions: where they are long runs, of any length.

    RE2's automaton counts every repetition that it is in, which makes a state of its own for nearly
    every text. How long a run may be is left to the search, which looks no further back than the
    longest match, and to the words themselves.
    """
    match node:
        case _Chars(source):
            return source
        case _Assertion():
            return ""
        case _Sequence(parts):
            return "".join(map(_loose_words, parts))
        case _Alternatives(options):
            return f"(?:{'|'.join(map(_loose_words, options))})"
        case _Repeat(inner, least, most):
            bounds = f"{least},{most}" if most <= _MAX_COUNTED else f"{min(least, _MAX_COUNTED)},"
            return f"(?:{_loose_words(inner)}){{{bounds}}}"


def _top_prefixes(node: _Node) -> str:
    """Prefixes of a whole pattern; its leading assertions look at what is known and stay."""
    if isinstance(node, _Alternatives):
        return f"(?:{'|'.join(_top_prefixes(option) for option in node.options)})"
    if isinstance(node, _Sequence):
        leading = 0
        while leading < len(node.parts) and isinstance(node.parts[leading], _Assertion):
            leading += 1
        asserted = "".join(_words(part) for part in node.parts[:leading])
        return asserted + _prefixes(_Sequence(node.parts[leading:]))
    return _prefixes(node)


def _prefixes(node: _Node) -> str:
    """Every prefix of every word, the empty one and the whole word among them; and some more."""
    match node:
        case _Chars(source):
            return f"(?:{source})?"
        case _Assertion():
            return ""
        case _Sequence(parts):
            prefixes = ""
            for part in reversed(parts):
                if isinstance(part, _Assertion):
                    continue
                whole = _loose_words(part)
                if isinstance(part, _Chars):
                    prefixes = f"(?:{whole}{prefixes})?"
                else:
                    prefixes = f"(?:{whole}{prefixes}|{_prefixes(part)})"
            return prefixes
        case _Alternatives(options):
            return f"(?:{'|'.join(_prefixes(option) for option in options)})"
        case _Repeat(inner, _, most):
            bounds = f"{{0,{most - 1}}}" if most <= _MAX_COUNTED else "*"
            before = f"(?:{_loose_words(inner)}){bounds}" if most > 1 else ""
            return before + _prefixes(inner)
