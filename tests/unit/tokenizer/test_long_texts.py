"""A long text may be cut anywhere that `cut` cuts it: the tokens are those of the whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.runtime.tokenizerfiles.definition import TokenizerDefinition, added_token
from services.runtime.tokenizerfiles.pretokenizers import PRE_TOKENIZER_KINDS
from services.tokenizer.long_texts import can_be_cut, cut, in_rounds
from services.tokenizer.model_tokenizer import ModelTokenizer

WORDS = [
    "fox",
    "Dog",
    "it's",
    "I'LL",
    "12",
    "345",
    "é",
    "e\u0301",
    "日本",
    "Ⅷ",
    "👩",
    "<|im_start|>",
]
BETWEEN = [" ", "  ", "\n", "\r\n", "\u00a0", ".", "...", "/", "\t", "▁", " fox", " Dog", "x"]
texts = st.lists(st.sampled_from([*WORDS, *BETWEEN]), max_size=60).map("".join)


@pytest.fixture(scope="module")
def by_kind(byte_level_json: dict[str, Any]) -> dict[str, ModelTokenizer]:
    made = {}
    for name, kind in PRE_TOKENIZER_KINDS.items():
        document = byte_level_json | {
            "pre_tokenizer": kind.to_json(),
            "normalizer": {"type": "NFC"} if kind.nfc else None,
        }
        assert can_be_cut(document)
        made[name] = ModelTokenizer(TokenizerDefinition(Path("made-in-test"), document))
    return made


@pytest.mark.parametrize("kind", sorted(PRE_TOKENIZER_KINDS))
@settings(max_examples=60, deadline=None)
@given(text=texts, chunk_chars=st.integers(1, 30))
def test_the_parts_have_the_tokens_of_the_whole(
    by_kind: dict[str, ModelTokenizer], kind: str, text: str, chunk_chars: int
) -> None:
    tokenizer = by_kind[kind]
    parts = cut(text, chunk_chars)
    assert "".join(parts) == text
    token_ids = [i for part in parts for i in tokenizer.encode(part).token_ids]
    assert token_ids == tokenizer.encode(text).token_ids


@settings(max_examples=300, deadline=None)
@given(text=texts, chunk_chars=st.integers(1, 30))
def test_sentencepiece_texts_are_cut_as_safely(
    sentencepiece: ModelTokenizer, text: str, chunk_chars: int
) -> None:
    parts = cut(text, chunk_chars)
    token_ids = [i for part in parts for i in sentencepiece.encode(part).token_ids]
    assert token_ids == sentencepiece.encode(text).token_ids


def test_a_vocabulary_with_tokens_over_spaces_is_left_alone(
    sentencepiece_json: dict[str, Any],
) -> None:
    assert can_be_cut(sentencepiece_json)
    model = sentencepiece_json["model"]
    vocabulary = model["vocab"] | {"of▁the": len(model["vocab"])}
    assert not can_be_cut(sentencepiece_json | {"model": model | {"vocab": vocabulary}})


def test_text_without_a_safe_place_stays_whole() -> None:
    assert cut("x" * 100, 10) == ["x" * 100]
    assert cut("aa bb " * 3, 4) == ["aa bb", " aa bb", " aa bb "]


def test_what_stands_around_a_text_stands_around_a_long_one(
    byte_level_json: dict[str, Any],
) -> None:
    ends = [{"SpecialToken": {"id": f"<{i}>", "type_id": 0}} for i in (1, 2)]
    middle = {"Sequence": {"id": "A", "type_id": 0}}
    document = byte_level_json | {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [ends[0], middle, ends[1]],
            "pair": [middle, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {
                f"<{i}>": {"id": f"<{i}>", "ids": [i], "tokens": [f"<{i}>"]} for i in (1, 2)
            },
        }
    }
    tokenizer = ModelTokenizer(TokenizerDefinition(Path("made-in-test"), document))
    text = "the quick brown fox " * 20_000
    inner = tokenizer.encode(text, add_special_tokens=False).token_ids
    assert tokenizer.encode(text).token_ids == [1, *inner, 2]
    assert tokenizer.detokenizer.decode(inner) == text


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": None},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"}},
        {"added_tokens": [added_token(0, "New York", special=False)]},
        {"added_tokens": [added_token(0, "x", special=False) | {"lstrip": True}]},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "unheard of"},
                "behavior": "Isolated",
                "invert": False,
            }
        },
    ],
)
def test_tokenizers_that_might_join_over_a_cut_are_left_alone(
    byte_level_json: dict[str, Any], change: dict[str, Any]
) -> None:
    assert can_be_cut(byte_level_json)
    assert not can_be_cut(byte_level_json | change)


@given(sizes=st.lists(st.integers(0, 100_000), max_size=30))
def test_rounds_keep_order_and_leave_nothing_out(sizes: list[int]) -> None:
    texts = ["x" * size for size in sizes]
    rounds = list(in_rounds(texts))
    assert [text for group in rounds for text in group] == texts
    assert all(rounds)
