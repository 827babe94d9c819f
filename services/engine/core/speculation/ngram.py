"""Prompt look-up: what followed the last tokens when they were last seen is guessed to follow now.

Prompt look-up decoding (Saxena, 2023; "n-gram" speculation elsewhere) needs no second model: text
that quotes, edits, summarises or repeats its prompt or itself holds its own continuation. The
search is that of LZ77 compressors: positions are chained by a hash of the two tokens before them,
newest first, and of the first few in a chain the one that agrees longest with what was last
generated is followed. While it keeps being right nothing is searched at all, so that a token costs
about a microsecond, however long the text.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable

import numpy as np

# A match of fewer tokens says next to nothing about the next one.
MIN_MATCH = 2
# Agreement beyond this length makes no difference.
MAX_MATCH = 32
# Earlier occurrences of a pair that are compared, and what is taken in at once rather than token
# by token.
_CANDIDATES = 12
_BULK = 64
_MULTIPLIERS = (0x9E3779B1, 0x85EBCA6B)
_WORD = 0xFFFFFFFF
_NONE = -1


class PromptLookup:
    """The index over one sequence's tokens, and the place in them that is followed.

    `match_length` tokens before `_source` equal the last tokens of the sequence, 0 where nothing
    is followed; `_source` is the position of the token guessed to come next.
    """

    __slots__ = ("_heads", "_mask", "_previous", "_source", "match_length")

    def __init__(self) -> None:
        self.match_length = 0
        self._source = _NONE
        # Position p stands for the pair of tokens before it. By hash: the last position; by
        # position: the one before it with the same hash.
        self._heads = array("i")
        self._mask = -1
        self._previous = array("i")

    @property
    def num_tokens(self) -> int:
        """Tokens taken in so far."""
        return max(0, len(self._previous) - 1)

    def advance(
        self, token_ids: array[int], observe: Callable[[int, bool], None] | None = None
    ) -> None:
        """Take in what `token_ids`, all tokens of the sequence, has more than last time.

        `observe(match_length, correct)` is told of every new token that had been guessed, whether
        or not anybody asked for the guess; and of every other, with a length of 0, whether a match
        ends with it.
        """
        known = self.num_tokens
        if len(token_ids) > self._mask or len(token_ids) - known > _BULK:
            self._rebuild(token_ids)
            return
        for end in range(known + 1, len(token_ids) + 1):
            was_followed = self.match_length > 0
            if was_followed:
                correct = token_ids[self._source] == token_ids[end - 1]
                if observe is not None:
                    observe(self.match_length, correct)
                if correct:
                    self._source += 1
                    self.match_length = min(self.match_length + 1, MAX_MATCH)
                else:
                    self.match_length = 0
            self._insert(token_ids, end)
            if not self.match_length:
                self._search(token_ids, end)
                if not was_followed and observe is not None:
                    observe(0, self.match_length > 0)

    def draft(self, token_ids: array[int], length: int) -> tuple[int, ...]:
        """The next `length` tokens by what is followed; none where nothing is.

        A source that reaches the end of what is known goes on with its own copy: a text in a loop
        is guessed as far ahead as wanted.
        """
        if not self.match_length:
            return ()
        source = self._source
        period = len(token_ids) - source
        if length <= period:
            return tuple(token_ids[source : source + length])
        return tuple(token_ids[source + index % period] for index in range(length))

    def _insert(self, token_ids: array[int], end: int) -> None:
        if end < MIN_MATCH:
            self._previous.append(_NONE)
            return
        bucket = self._bucket(token_ids[end - 2], token_ids[end - 1])
        self._previous.append(self._heads[bucket])
        self._heads[bucket] = end

    def _bucket(self, first: int, second: int) -> int:
        mixed = (first * _MULTIPLIERS[0] + second * _MULTIPLIERS[1]) & _WORD
        return (mixed ^ mixed >> 15) & self._mask

    def _search(self, token_ids: array[int], end: int) -> None:
        candidate = self._previous[end]
        longest = MIN_MATCH - 1
        for _ in range(_CANDIDATES):
            if candidate == _NONE:
                break
            # One that is to beat the longest so far must agree just beyond it.
            if (
                candidate > longest
                and token_ids[candidate - longest - 1] == token_ids[end - longest - 1]
            ):
                length = 0
                most = min(candidate, MAX_MATCH)
                while length < most and (
                    token_ids[candidate - length - 1] == token_ids[end - length - 1]
                ):
                    length += 1
                if length > longest:
                    longest = length
                    self.match_length = length
                    self._source = candidate
                    if length == MAX_MATCH:
                        break
            candidate = self._previous[candidate]

    def _rebuild(self, token_ids: array[int]) -> None:
        """Index everything anew, with room to grow: seldom enough to cost O(1) per token."""
        count = len(token_ids)
        size = 1 << max(8, (2 * count).bit_length())
        self._mask = size - 1
        tokens = np.frombuffer(token_ids, np.int64).astype(np.uint64)
        mixed = (tokens[:-1] * _MULTIPLIERS[0] + tokens[1:] * _MULTIPLIERS[1]) & np.uint64(_WORD)
        buckets = ((mixed ^ (mixed >> np.uint64(15))) & np.uint64(self._mask)).astype(np.int64)
        ends = np.arange(MIN_MATCH, count + 1, dtype=np.int32)
        heads = np.full(size, _NONE, np.int32)
        heads[buckets] = ends  # of equal buckets the last one stays
        previous = np.full(count + 1, _NONE, np.int32)
        order = np.argsort(buckets, kind="stable")
        same = np.flatnonzero(buckets[order[1:]] == buckets[order[:-1]])
        previous[ends[order[same + 1]]] = ends[order[same]]
        self._heads = array("i", heads.tobytes())
        self._previous = array("i", previous.tobytes())
        self.match_length = 0
        self._search(token_ids, count)
