"""Bounded patterns mean what they say, and their prefixes are exactly what may still match."""

from __future__ import annotations

import itertools
import re

import pytest

from services.safety.detectors import DETECTORS
from services.safety.injection import BLOB, EVIDENCE
from services.safety.patterns import PatternError, parse_pattern
from services.safety.sources import compile_pattern

SMALL_PATTERNS = [
    "ab", "a?b", "a{2,3}b", "(?:ab|b)a", "a(?:b|ab){1,2}", "[ab]a?", r"\bab\b", r"a\Bb",
    r"(?:\ba|b)b{0,2}", "(ab?){2}", r"a(?:\b|b)a",
]  # fmt: skip


@pytest.mark.parametrize("source", SMALL_PATTERNS)
def test_a_text_may_still_match_exactly_if_some_text_completes_it(source: str) -> None:
    pattern = parse_pattern(source)
    prefixes = compile_pattern(rf"\A(?:{pattern.prefixes})\z")
    longest = pattern.max_width_chars
    texts = ["".join(t) for n in range(1, longest + 1) for t in itertools.product("ab-", repeat=n)]
    words = {text for text in texts if re.fullmatch(source, text)}
    for text in texts:
        if any(word.startswith(text) for word in words):
            assert prefixes.search(text.encode()) is not None, text
        elif "\\" not in source:  # assertions are dropped, which may let a few more live
            assert prefixes.search(text.encode()) is None, text


@pytest.mark.parametrize("source", SMALL_PATTERNS)
def test_words_are_found_where_re_finds_them(source: str) -> None:
    words = compile_pattern(parse_pattern(source).words)
    for text in ("".join(t) for n in range(1, 7) for t in itertools.product("ab-", repeat=n)):
        found, expected = words.search(text.encode()), re.search(source, text)
        assert (found and found.span()) == (expected and expected.span()), text


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("a+", "no bound"),
        ("a*", "no bound"),
        ("a{2,}", "with a bound"),
        ("a{3,2}", "m to n"),
        ("a?", "empty"),
        ("(a", r"missing `\)`"),
        ("a)", "unbalanced"),
        ("[a", r"missing `\]`"),
        ("(?=a)", "only"),
        ("(a)\\1", "unknown escape"),
        ("^a", "not known"),
        ("é", "ASCII"),
        ("?a", "nothing to repeat"),
        ("a{2}{2}", "cannot be repeated"),
        ("(?:a{500}){100}", "may match"),
        ("(" * 30 + "a" + ")" * 30, "nested"),
        ("a\\", "unknown escape"),
    ],
)
def test_what_cannot_be_bounded_is_refused_with_the_reason(source: str, problem: str) -> None:
    with pytest.raises(PatternError, match=problem):
        parse_pattern(source)


def test_case_is_ignored_on_request() -> None:
    assert compile_pattern(parse_pattern("ab", ignore_case=True).words).search(b"xAB")
    assert not compile_pattern(parse_pattern("ab").words).search(b"xAB")


@pytest.mark.parametrize(
    "made",
    [*DETECTORS.values(), BLOB, *(p for kind in EVIDENCE for p in kind.patterns)],
    ids=lambda made: made.name,
)
def test_every_shipped_pattern_compiles_both_ways(made: object) -> None:
    pattern = made.pattern  # type: ignore[attr-defined]
    compile_pattern(pattern.words)
    whole = b"nothing like it "
    found = compile_pattern(rf"(?:{pattern.prefixes})\z").search(whole)
    assert found is None or found.end() == len(whole)
