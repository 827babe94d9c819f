"""Inputs of encoders are those that `transformers` makes of the same texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from services.tokenizer.encoder_inputs import EncoderInput, InputEncoder
from services.tokenizer.errors import InvalidTextError, TooManyTokensError
from services.tokenizer.model_tokenizer import load_model_tokenizer
from tests.fakes.small_tokenizers import save_small_tokenizer

TEXTS = ["a cat on a mat", "x", "Rain, and more of it", " ", "[CLS] is text [SEP]"]
PAIRS = [("where is the cat", "on the mat"), ("why", "because it rains and rains"), ("a", " ")]
LONG = "one two three four five six seven"

Encoders = tuple[InputEncoder, PreTrainedTokenizerFast]


@pytest.fixture
def encoders(tmp_path: Path) -> Encoders:
    theirs = save_small_tokenizer(tmp_path)
    return load_model_tokenizer(tmp_path).inputs, theirs


def as_input(encoded: Any) -> EncoderInput:
    types = encoded["token_type_ids"]
    return EncoderInput(encoded["input_ids"], types.index(1) if 1 in types else None)


@pytest.mark.parametrize("text", TEXTS[:4])
def test_a_text_gets_the_special_tokens_of_its_model(encoders: Encoders, text: str) -> None:
    ours, theirs = encoders
    assert ours.texts([text], None, "refuse") == [as_input(theirs(text))]


def test_a_batch_is_as_its_texts(encoders: Encoders) -> None:
    ours, _ = encoders
    alone = [ours.texts([text], None, "refuse")[0] for text in TEXTS]
    assert ours.texts(TEXTS, None, "refuse") == alone


@pytest.mark.parametrize("pair", PAIRS)
def test_a_pair_says_where_the_second_kind_of_tokens_begins(
    encoders: Encoders, pair: tuple[str, str]
) -> None:
    ours, theirs = encoders
    [found] = ours.pairs([pair], None, "refuse")
    assert found == as_input(theirs(*pair))
    assert found.second_text_start is not None


def test_special_tokens_spelled_out_are_text(encoders: Encoders) -> None:
    ours, theirs = encoders
    [found] = ours.texts(["[CLS] is text [SEP]"], None, "refuse")
    special = [theirs.cls_token_id, theirs.sep_token_id]
    assert [each for each in found.token_ids if each in special] == special


@pytest.mark.parametrize("limit", [2, 3, 7, 20])
def test_truncation_cuts_the_text_and_never_the_special_tokens(
    encoders: Encoders, limit: int
) -> None:
    ours, theirs = encoders
    [found] = ours.texts([LONG], limit, "drop_newest")
    assert found == as_input(theirs(LONG, truncation=True, max_length=limit))
    [oldest] = ours.texts([LONG], limit, "drop_oldest")
    theirs.truncation_side = "left"
    assert oldest == as_input(theirs(LONG, truncation=True, max_length=limit))


@pytest.mark.parametrize("limit", [3, 8, 11, 16, 30])
@pytest.mark.parametrize("pair", [(LONG, "a b c"), ("a b c", LONG), (LONG, LONG), ("a", LONG)])
@pytest.mark.parametrize("strategy", [None, "only_first", "only_second"])
def test_the_model_says_which_text_of_a_pair_gives_way(
    tmp_path: Path, strategy: str | None, pair: tuple[str, str], limit: int
) -> None:
    theirs = save_small_tokenizer(tmp_path, strategy=strategy)
    ours = load_model_tokenizer(tmp_path).inputs
    [found] = ours.pairs([pair], limit, "drop_newest")
    parts = [theirs(text, add_special_tokens=False)["input_ids"] for text in pair]
    over = sum(map(len, parts)) + 3 - limit
    given_way = {"only_first": parts[0], "only_second": parts[1]}.get(strategy or "")
    if given_way is not None and over >= len(given_way):
        # `transformers` gives up where that text alone cannot give way far enough.
        assert len(found.token_ids) == limit
        return
    expected = theirs(*pair, truncation=strategy or "longest_first", max_length=limit)
    assert found == as_input(expected)


def test_what_does_not_fit_is_refused_by_its_index(encoders: Encoders) -> None:
    ours, _ = encoders
    with pytest.raises(TooManyTokensError) as refused:
        ours.texts(["a", LONG, LONG], 5, "refuse")
    assert (refused.value.index, refused.value.limit) == (1, 5)
    assert refused.value.tokens > 5


def test_a_lone_surrogate_is_no_text(encoders: Encoders) -> None:
    with pytest.raises(InvalidTextError):
        encoders[0].texts(["a\ud800"], None, "refuse")
