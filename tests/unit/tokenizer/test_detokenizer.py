"""Incremental decoding adds up to one-shot decoding, and never splits a character."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from services.tokenizer.detokenizer import Detokenizer, IncrementalDecoder, TextBeginning
from services.tokenizer.errors import UnknownTokenIdError
from services.tokenizer.model_tokenizer import ModelTokenizer

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=80)
quick = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def cut_in_pieces(items: list[int], cuts: list[int]) -> list[list[int]]:
    bounds = sorted({0, len(items), *(cut % (len(items) + 1) for cut in cuts)})
    return [items[a:b] for a, b in pairwise(bounds)]


@quick
@given(text=texts, cuts=st.lists(st.integers(0, 200)))
def test_any_text_comes_back_whatever_way_its_tokens_arrive(
    tokenizer: ModelTokenizer, text: str, cuts: list[int]
) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False).token_ids
    decoder = IncrementalDecoder(tokenizer.detokenizer)
    pieces = [decoder.feed(part) for part in cut_in_pieces(token_ids, cuts)]
    assert decoder.decoded_tokens == len(token_ids)
    assert "".join(pieces) + decoder.finish() == tokenizer.detokenizer.decode(token_ids)
    assert "".join(pieces) == (
        as_sentencepiece_has_it(text) if tokenizer.kind == "sentencepiece-bpe" else text
    )


def as_sentencepiece_has_it(text: str) -> str:
    """Its mark for a space reads as a space; one at the very beginning is taken for its own."""
    return text.replace("▁", " ").removeprefix(" ")


@quick
@given(data=st.data(), keep=st.booleans())
def test_random_tokens_decode_alike_in_pieces_and_at_once(
    tokenizer: ModelTokenizer, data: st.DataObject, keep: bool
) -> None:
    token_ids = data.draw(st.lists(st.integers(0, tokenizer.vocabulary_size - 1), max_size=60))
    whole = tokenizer.detokenizer.decode(token_ids, keep_special_tokens=keep)
    decoder = IncrementalDecoder(tokenizer.detokenizer, keep_special_tokens=keep)
    sent = ""
    for token_id in token_ids:
        sent += decoder.feed([token_id])
        # What was sent stands, and it holds all text of the tokens that are said to be decoded.
        assert whole.startswith(sent)
        done = token_ids[: decoder.decoded_tokens]
        other = IncrementalDecoder(tokenizer.detokenizer, keep_special_tokens=keep)
        assert sent.startswith(other.feed(done))
    assert sent + decoder.finish() == whole


@given(raw=st.lists(st.binary(min_size=0, max_size=3), max_size=30))
def test_bytes_that_are_not_utf8_become_replacement_characters(raw: list[bytes]) -> None:
    vocabulary = sorted(set(raw))
    detokenizer = Detokenizer(vocabulary, special_ids=[])
    token_ids = [vocabulary.index(piece) for piece in raw]
    decoder = IncrementalDecoder(detokenizer)
    sent = "".join(decoder.feed([token_id]) for token_id in token_ids) + decoder.finish()
    assert sent == b"".join(raw).decode("utf-8", "replace")


def test_a_character_is_held_until_it_is_whole() -> None:
    detokenizer = Detokenizer([b"a\xf0", b"\x9f", b"\x98\x80b"], special_ids=[])
    decoder = IncrementalDecoder(detokenizer)
    assert (decoder.feed([0]), decoder.decoded_tokens) == ("a", 0)
    assert (decoder.feed([1]), decoder.decoded_tokens) == ("", 0)
    assert (decoder.feed([2]), decoder.decoded_tokens) == ("😀b", 3)
    assert decoder.feed([1, 0]) == "�a"
    assert decoder.decoded_tokens == 4
    assert decoder.finish() == "�"
    assert decoder.decoded_tokens == 5


def test_special_tokens_leave_no_text_unless_they_are_kept() -> None:
    detokenizer = Detokenizer([b"<s>", b" hi"], [0], TextBeginning({}, stripped_spaces=1))
    assert detokenizer.decode([0, 1, 1]) == "hi hi"
    assert detokenizer.decode([0, 1, 1], keep_special_tokens=True) == "<s> hi hi"


@pytest.mark.parametrize("bad", [-1, 3, 2**32 - 1])
def test_an_unknown_token_is_named_and_changes_nothing(bad: int) -> None:
    detokenizer = Detokenizer([b"a", b"b", b"\xc3"], special_ids=[])
    decoder = IncrementalDecoder(detokenizer)
    assert decoder.feed([0, 2]) == "a"
    with pytest.raises(UnknownTokenIdError) as caught:
        decoder.feed([1, bad])
    assert (caught.value.token_id, caught.value.position) == (bad, 1)
    assert decoder.decoded_tokens == 1
    assert decoder.finish() == "�"


def test_the_work_per_token_does_not_grow_with_the_text() -> None:
    """One decoder never looks at more than the tokens it is fed: its state stays small."""
    detokenizer = Detokenizer([b"word ", b"\xe2\x82"], special_ids=[])
    decoder = IncrementalDecoder(detokenizer)
    for _ in range(10_000):
        decoder.feed([0, 1])
    held = [value for value in vars(decoder).values() if isinstance(value, list)]
    assert all(len(value) <= 3 for value in held if value is not decoder._pieces)
