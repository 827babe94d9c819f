"""A matcher says which tokens may follow: those with which a text can still come to its end."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from services.engine.core.constraints.grammar import Grammar, Matcher, Tokens
from services.engine.core.constraints.sources import lark_source
from services.engine.core.constraints.vocabulary import Vocabulary
from services.engine.core.errors import ConstraintFailedError
from services.engine.core.messages import Constraint
from tests.fakes.spelling_llama import EOS_TOKEN_ID, PIECES, VOCAB_SIZE, tokens_of

# Every text of the rule, which is finite.
TEXTS = ["abc", "abab", "xya b", "né", "12", "1200"]


@pytest.fixture(scope="module")
def grammar(vocabulary: Vocabulary) -> Grammar:
    rule = Constraint("regex", "|".join(TEXTS))
    return Tokens(vocabulary).compile(lark_source(rule))


def allowed(matcher: Matcher, draft: tuple[int, ...] = ()) -> list[set[int]]:
    words = np.zeros((1 + len(draft), -(-VOCAB_SIZE // 32)), np.uint32)
    assert matcher.fill(words, draft) is None
    bits = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")
    return [set(row.nonzero()[0].tolist()) for row in bits]


def expected(said: bytes) -> set[int]:
    texts = [text.encode() for text in TEXTS]
    follow = {
        number
        for number, piece in enumerate(PIECES)
        if number > EOS_TOKEN_ID and any(text.startswith(said + piece) for text in texts)
    }
    return follow | ({EOS_TOKEN_ID} if said in texts else set())


@pytest.mark.parametrize("text", TEXTS)
def test_tokens_are_allowed_that_lead_to_a_text_whatever_they_are(
    grammar: Grammar, text: str
) -> None:
    matcher = grammar.matcher()
    said = b""
    for token in tokens_of(text):
        assert allowed(matcher) == [expected(said)]
        matcher.advance(token)
        said += PIECES[token]
    assert matcher.accepts_end
    assert allowed(matcher) == [expected(said)]
    assert matcher.ended == (expected(said) == {EOS_TOKEN_ID})


def test_masks_after_each_token_of_a_draft_leave_the_state_as_it_was(grammar: Grammar) -> None:
    matcher = grammar.matcher()
    draft = tuple(tokens_of("12"))
    assert allowed(matcher, draft) == [expected(b""), expected(b"1"), expected(b"12")]
    assert allowed(matcher) == [expected(b"")]
    wrong = (draft[0], tokens_of("x")[0], draft[1])
    assert matcher.num_valid(wrong) == 1
    assert allowed(matcher, wrong)[:2] == [expected(b""), expected(b"1")]
    assert allowed(matcher) == [expected(b"")]


def test_a_matcher_goes_back_and_its_fork_goes_on_alone(grammar: Grammar) -> None:
    matcher = grammar.matcher()
    first, second, third = tokens_of("aba")
    matcher.advance(first)
    matcher.advance(second)
    fork = matcher.fork()
    matcher.advance(third)
    assert allowed(fork) == [expected(b"ab")]
    matcher.rollback(2)
    assert allowed(matcher) == [expected(b"a")]
    assert allowed(fork) == [expected(b"ab")]


def test_the_end_of_sequence_may_be_barred(grammar: Grammar) -> None:
    matcher = grammar.matcher(ends_by_token=False)
    for token in tokens_of("12"):
        matcher.advance(token)
    assert allowed(matcher) == [expected(b"12") - {EOS_TOKEN_ID}]


def test_each_of_the_ends_that_a_model_has_may_end_a_text(vocabulary: Vocabulary) -> None:
    other = EOS_TOKEN_ID - 1
    tokens = Tokens(msgspec.structs.replace(vocabulary, eos_token_ids=[EOS_TOKEN_ID, other]))
    matcher = tokens.compile(lark_source(Constraint("regex", "x+"))).matcher()
    (x,) = tokens_of("x")
    assert {EOS_TOKEN_ID, other}.isdisjoint(allowed(matcher)[0])
    matcher.advance(x)
    assert {EOS_TOKEN_ID, other, x} <= allowed(matcher)[0]


def test_a_token_that_is_not_allowed_is_an_error(grammar: Grammar) -> None:
    with pytest.raises(ConstraintFailedError):
        grammar.matcher().advance(tokens_of("q")[0])
