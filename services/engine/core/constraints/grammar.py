"""Grammars and the matchers that follow them, by llguidance. Nothing else here knows the library
but `sources`."""

from __future__ import annotations

import json
import re

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from services.engine.core.constraints.vocabulary import Vocabulary
from services.engine.core.errors import ConstraintFailedError, InvalidConstraintError

# States of its lexer that a grammar may come to, of one or two kilobytes each. Other limits are the
# library's own: they keep a mask to some tens of milliseconds at worst.
_MAX_LEXER_STATES = 20_000
# The first tokens of a completion, taken to see that it can begin.
_TRIED_TOKENS = 8
_MAX_REASON_CHARS = 400
# The library puts the place in the grammar that it was given in front, and excerpts of it behind.
_PLACE = re.compile(
    r"^at \d+\(\d+\): (?:failed to compile JSON schema: )?|^failed to parse \"%json\": "
)


class Tokens:
    """A vocabulary as the library wants it; made once per process."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocab_size = len(vocabulary.pieces)
        self.eos_token_ids = tuple(vocabulary.eos_token_ids)
        self._tokenizer = LLTokenizer(
            _TokenizerView(vocabulary), eos_token=vocabulary.eos_token_ids
        )

    def compile(self, lark: str) -> Grammar:
        """Compile a grammar; other threads run meanwhile.

        Raises:
            InvalidConstraintError: it is not valid, or too large.
        """
        source = json.dumps({"grammars": [{"lark_grammar": lark}]})
        limits = LLParserLimits(max_lexer_states=_MAX_LEXER_STATES, verbose_errors=False)
        matcher = LLMatcher(self._tokenizer, source, log_level=0, limits=limits)
        if matcher.is_error():
            raise InvalidConstraintError(_reason(matcher))
        return Grammar(matcher, self)


class Grammar:
    """A compiled grammar, from which the matcher of each sequence is made."""

    def __init__(self, prototype: LLMatcher, tokens: Tokens) -> None:
        self._prototype = prototype
        self._tokens = tokens

    def matcher(self, *, ends_by_token: bool = True) -> Matcher:
        """A matcher that has taken in nothing.

        ends_by_token: whether the model's end of sequence may follow where the output may end.
        """
        barred = () if ends_by_token else self._tokens.eos_token_ids
        return Matcher(self._prototype.deep_copy(), self._tokens.vocab_size, barred)

    def try_out(self, *, may_be_empty: bool) -> None:
        """Begin a completion, to find what only shows then.

        Raises:
            InvalidConstraintError: no completion follows it, or none but the empty one, or that one
                too unless it `may_be_empty`, or the first steps exceed a limit.
        """
        matcher = self.matcher(ends_by_token=False)
        if matcher.accepts_end and not may_be_empty:
            raise InvalidConstraintError("it describes an empty text")
        words = np.empty((1, matcher.num_words), np.uint32)
        for number in range(_TRIED_TOKENS):
            if (error := matcher.fill(words)) is not None:
                raise InvalidConstraintError(str(error))
            token_ids = np.unpackbits(words.view(np.uint8), bitorder="little").nonzero()[0]
            if not token_ids.size and not matcher.accepts_end:
                raise InvalidConstraintError("no text follows it that the model's tokens can spell")
            if not token_ids.size and number == 0:
                raise InvalidConstraintError("it describes an empty text")
            if not token_ids.size:
                return
            try:
                matcher.advance(int(token_ids[token_ids.size // 2]))
            except ConstraintFailedError as error:
                raise InvalidConstraintError(str(error)) from None
            if matcher.ended:
                return


class Matcher:
    """Follows the output of one sequence.

    Not to be used by two threads at once. `fill` leaves the state as it was.
    """

    __slots__ = ("_barred", "_matcher", "_vocab_size", "num_words")

    def __init__(
        self, matcher: LLMatcher, vocab_size: int, barred_token_ids: tuple[int, ...]
    ) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size
        self._barred = barred_token_ids
        self.num_words = -(-vocab_size // 32)

    def advance(self, token_id: int) -> None:
        """Take in the next token of the output.

        Raises:
            ConstraintFailedError: the grammar does not allow it, or a limit is exceeded.
        """
        if not self._matcher.consume_token(token_id):
            raise ConstraintFailedError(_reason(self._matcher))

    def rollback(self, num_tokens: int) -> None:
        """Take back the last tokens."""
        self._matcher.rollback(num_tokens)

    def fork(self) -> Matcher:
        """Another matcher in the same state."""
        return Matcher(self._matcher.deep_copy(), self._vocab_size, self._barred)

    @property
    def ended(self) -> bool:
        """Whether nothing may follow."""
        return bool(self._matcher.is_stopped())

    @property
    def accepts_end(self) -> bool:
        """Whether the output may end here."""
        return bool(self._matcher.is_accepting())

    def num_valid(self, token_ids: tuple[int, ...]) -> int:
        """How many of `token_ids`, one after the other, may come next."""
        return int(self._matcher.validate_tokens([*token_ids]))

    def fill(
        self, words: npt.NDArray[np.uint32], draft: tuple[int, ...] = ()
    ) -> ConstraintFailedError | None:
        """Write which tokens may follow, and which may after each token of `draft`.

        `words` is [1 + len(draft), num_words] and contiguous: token t is bit t % 32 of word
        t // 32. All tokens may follow a draft that is not valid so far, for nobody looks there.
        Other threads run meanwhile. Returns the error where a limit is exceeded.
        """
        matcher, row_bytes = self._matcher, words.strides[0]
        taken = 0
        for row in range(len(draft) + 1):
            if row and (matcher.is_stopped() or not matcher.validate_tokens([draft[row - 1]])):
                words[row:] = 0xFFFFFFFF
                break
            if row:
                matcher.consume_token(draft[row - 1])
                taken += 1
            matcher.unsafe_compute_mask_ptr(words[row].ctypes.data, row_bytes)
            for token_id in self._barred:
                words[row, token_id // 32] &= ~np.uint32(1 << token_id % 32)
        error = ConstraintFailedError(_reason(matcher)) if matcher.is_error() else None
        if taken and error is None:
            matcher.rollback(taken)
        return error


class _TokenizerView(TokenizerWrapper):
    """What the library asks of a tokenizer."""

    is_tokenizer_wrapper = True

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.tokens = vocabulary.pieces
        self.special_token_ids = vocabulary.special_token_ids
        self.eos_token_id = vocabulary.eos_token_ids[0]
        self.bos_token_id = None

    def __call__(self, s: str) -> list[int]:
        """How a text is tokenized: for forced texts, of which grammars here have none."""
        return []


def _reason(matcher: LLMatcher) -> str:
    """Why a matcher has failed, in a line or two."""
    text = str(matcher.get_error())
    for mark in ("\n<state>", "\n<non-verbose/>", "\n   1 | "):
        text = text.split(mark)[0]
    return _PLACE.sub("", text).strip()[:_MAX_REASON_CHARS]
