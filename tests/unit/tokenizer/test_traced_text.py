"""TracedText behaves as the string it is, and never claims more for the template than it wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.tokenizer.traced_text import TracedText, concatenate, runs_of, trusted_text

# Whoever wrote a character can be told by its case: templates shout.
part = st.tuples(st.booleans(), st.text("ab \n|x", max_size=6)).map(
    lambda drawn: trusted_text(drawn[1].upper()) if drawn[0] else TracedText(drawn[1])
)
mixed = st.lists(part, max_size=6).map(concatenate)


def check(value: str) -> None:
    """No lower-case letter, which only the conversation writes, lies in a trusted range."""
    ends = -1
    for start, end in runs_of(value):
        assert ends < start < end <= len(value)
        ends = end
        assert not any(character.islower() for character in str(value)[start:end])


OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "slice": lambda s, t: s[1:-1],
    "slice from end": lambda s, t: s[-3:],
    "step": lambda s, t: s[::-1],
    "add": lambda s, t: s + t,
    "multiply": lambda s, t: s * 3,
    "strip": lambda s, t: s.strip(),
    "strip characters": lambda s, t: s.strip("aA|"),
    "left": lambda s, t: s.lstrip(),
    "right": lambda s, t: s.rstrip("\n"),
    "prefix": lambda s, t: s.removeprefix(t),
    "suffix": lambda s, t: s.removesuffix(t),
    "split": lambda s, t: s.split(),
    "split at": lambda s, t: s.split("|", 2),
    "rsplit": lambda s, t: s.rsplit(None, 1),
    "rsplit at": lambda s, t: s.rsplit("|", 1),
    "lines": lambda s, t: s.splitlines(),
    "lines kept": lambda s, t: s.splitlines(True),
    "partition": lambda s, t: s.partition("|"),
    "rpartition": lambda s, t: s.rpartition("|"),
    "join": lambda s, t: s.join([t, t, s]),
    "replace": lambda s, t: s.replace("|", t),
    "replace one": lambda s, t: s.replace(" ", t, 1),
    "replace nothing": lambda s, t: s.replace("", t),
    "upper": lambda s, t: s.upper(),
    "title": lambda s, t: s.title(),
    "pad": lambda s, t: s.ljust(9, "z"),
    "percent": lambda s, t: (s + "%s%%%s") % (t, 3),
    "iterate": lambda s, t: list(s),
}


@pytest.mark.parametrize("name", OPERATIONS)
@given(text=mixed, other=mixed)
def test_every_operation_gives_what_a_string_gives(
    name: str, text: TracedText, other: TracedText
) -> None:
    operation = OPERATIONS[name]
    result, expected = operation(text, other), operation(str(text), str(other))
    assert result == expected
    assert hash(text) == hash(str(text))
    for value in result if isinstance(result, (list, tuple)) else [result]:
        check(value)


@given(text=mixed, start=st.integers(-9, 9), end=st.integers(-9, 9))
def test_cutting_and_joining_keeps_who_wrote_what(text: TracedText, start: int, end: int) -> None:
    start, end = sorted(index % (len(text) + 1) for index in (start, end))
    whole = text[:start] + text[start:end] + text[end:]
    assert whole == text
    assert runs_of(whole) == runs_of(text)
    assert runs_of(concatenate(list(text))) == runs_of(text)
    assert runs_of(TracedText("|").join(text.split("|"))) == runs_of(
        text.replace("|", TracedText("|"))
    )


def test_what_is_not_known_to_keep_authors_forgets_them() -> None:
    assert runs_of(trusted_text("<|a|>").upper()) == ()
    assert runs_of(trusted_text("<|a|>")[::-1]) == ()
