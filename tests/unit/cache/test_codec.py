"""A stored answer comes back as it was, or is recognised as unusable; never anything between."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshserve.v1 import cache_pb2
from services.cache.codec import STAMP_BYTES, CorruptAnswerError, decode, encode, stamp_of

STAMP = bytes(range(STAMP_BYTES))
ENTRY = "ab" * 20

answers = st.builds(
    cache_pb2.CachedAnswer,
    chunks=st.lists(
        st.builds(
            cache_pb2.CachedChunk,
            index=st.integers(0, 3),
            text=st.text(st.characters(exclude_categories=["Cs"]), max_size=200),
            token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=20),
        ),
        max_size=8,
    ),
    model_revision=st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
)


def stored(answer: cache_pb2.CachedAnswer, compress_over_bytes: int = 64) -> bytes:
    return encode(
        answer.SerializeToString(),
        stamp=STAMP,
        entry_digest=ENTRY,
        compress_over_bytes=compress_over_bytes,
    )


@given(answers, st.integers(1, 1000))
def test_an_answer_comes_back_as_it_was(answer, compress_over_bytes):
    value = stored(answer, compress_over_bytes)
    assert decode(value, entry_digest=ENTRY) == answer
    assert stamp_of(value) == STAMP


@given(answers, st.data())
def test_one_changed_bit_anywhere_makes_it_unusable(answer, data):
    value = bytearray(stored(answer))
    value[data.draw(st.integers(0, len(value) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(CorruptAnswerError):
        decode(bytes(value), entry_digest=ENTRY)


@given(answers, st.data())
def test_a_truncated_answer_is_unusable(answer, data):
    value = stored(answer)
    with pytest.raises(CorruptAnswerError):
        decode(value[: data.draw(st.integers(0, len(value) - 1))], entry_digest=ENTRY)


@given(st.binary(max_size=300))
def test_arbitrary_bytes_are_unusable(value):
    with pytest.raises(CorruptAnswerError):
        decode(value, entry_digest=ENTRY)


def test_an_answer_moved_to_another_key_is_unusable():
    value = stored(cache_pb2.CachedAnswer(model_revision="r1"))
    with pytest.raises(CorruptAnswerError):
        decode(value, entry_digest="cd" * 20)


def test_long_text_is_compressed_and_short_text_is_not():
    def answer(text: str) -> cache_pb2.CachedAnswer:
        return cache_pb2.CachedAnswer(chunks=[cache_pb2.CachedChunk(text=text)])

    long, short = answer("the same words again " * 500), answer("hello")
    assert len(stored(long, 1024)) < long.ByteSize() / 5
    assert short.SerializeToString() in stored(short, 1024)
