"""Stop strings are found where a search of the whole text would find them, however it is split."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from services.gateway.stop_strings import StopMatch, StopStringMatcher

# Few letters, so that stop strings overlap, contain each other and nearly match.
TEXT = st.text(alphabet="abñ", max_size=40)
STOPS = st.lists(st.text(alphabet="abñ", min_size=1, max_size=5), max_size=6)


@st.composite
def pieces(draw: st.DrawFn) -> list[str]:
    text = draw(TEXT)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]


def first_match(text: str, stops: list[str], may_end: list[bool]) -> tuple[int, str] | None:
    """The earliest end of a stop string, the longest of those; `may_end[i]` allows ends after i."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found and may_end[end - 1]:
            return end, max(found, key=len)
    return None


def run(
    parts: list[str], allowed: list[bool], matcher: StopStringMatcher
) -> tuple[str, str | None, list[str]]:
    """What was sent before the end, the stop string, and each release."""
    released: list[str] = []
    for part, may_stop in zip(parts, allowed, strict=True):
        found = matcher.feed(part, may_stop=may_stop)
        if isinstance(found, StopMatch):
            return "".join(released) + found.text, found.stop, [*released, found.text]
        released.append(found)
    rest = matcher.flush()
    return "".join(released) + rest, None, [*released, rest]


@given(parts=pieces(), stops=STOPS, include=st.booleans(), data=st.data())
def test_it_finds_what_a_search_of_the_whole_text_finds(
    parts: list[str], stops: list[str], include: bool, data: st.DataObject
) -> None:
    allowed = data.draw(st.lists(st.booleans(), min_size=len(parts), max_size=len(parts)))
    text = "".join(parts)
    may_end = [may for part, may in zip(parts, allowed, strict=True) for _ in part]
    expected = first_match(text, stops, may_end)
    sent, stop, _ = run(parts, allowed, StopStringMatcher(stops, include_stop=include))
    if expected is None:
        assert (sent, stop) == (text, None)
    else:
        end, longest = expected
        assert stop == longest
        assert sent == text[: end if include else end - len(longest)]


@given(parts=pieces(), stops=STOPS)
def test_it_holds_back_only_what_may_still_become_a_stop_string(
    parts: list[str], stops: list[str]
) -> None:
    matcher = StopStringMatcher(stops)
    seen = sent = ""
    for part in parts:
        found = matcher.feed(part)
        if isinstance(found, StopMatch):
            return
        seen, sent = seen + part, sent + found
        held = seen[len(sent) :]
        longest = max(
            (n for n in range(len(seen) + 1) for s in stops if n and s[:n] == seen[-n:]), default=0
        )
        assert len(held) == longest


def test_without_stop_strings_everything_passes_at_once() -> None:
    matcher = StopStringMatcher([])
    assert matcher.feed("anything") == "anything"
    assert matcher.flush() == ""


def test_a_match_that_was_passed_over_is_sent_and_not_found_again() -> None:
    matcher = StopStringMatcher(["END"])
    assert matcher.feed("xEND", may_stop=False) == "x"
    assert matcher.feed("ing") == "ENDing"
    assert matcher.feed("END") == StopMatch("END", "")
