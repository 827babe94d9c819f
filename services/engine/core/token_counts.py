"""Which tokens a sequence holds, and how often its output does, kept from step to step."""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

_LEAST_ROOM = 64


class TokenCounts:
    """The distinct tokens of prompt and output in the order they came, counted in the output.

    A step costs what its new tokens cost, however long the sequence is.
    """

    __slots__ = ("_ids", "_in_output", "_num_taken", "_places")

    def __init__(self) -> None:
        self._places: dict[int, int] = {}  # token id -> index into the arrays
        self._ids = np.empty(_LEAST_ROOM, np.int64)
        self._in_output = np.zeros(_LEAST_ROOM, np.int64)
        self._num_taken = 0

    @property
    def num_taken(self) -> int:
        """Tokens that have been taken in."""
        return self._num_taken

    @property
    def num_distinct(self) -> int:
        """Distinct tokens among them. Each has a place, which stays its own."""
        return len(self._places)

    def changed(self, token_ids: array[int], since: int) -> tuple[list[int], list[int], list[int]]:
        """The places that tokens from number `since` on have changed, the token of each, and how
        often it is in the output. `token_ids` are those that were taken in."""
        if since == 0:
            ids, in_output = self.after(())
            return list(range(len(ids))), ids.tolist(), in_output.tolist()
        new = list(dict.fromkeys(token_ids[since : self._num_taken]))
        places = [self._places[token_id] for token_id in new]
        return places, new, [self._in_output.item(place) for place in places]

    def advance(self, token_ids: array[int], num_prompt_tokens: int) -> None:
        """Take in what `token_ids`, all tokens of the sequence, has more than last time."""
        for position in range(self._num_taken, len(token_ids)):
            token_id = token_ids[position]
            place = self._places.get(token_id)
            if place is None:
                place = self._places[token_id] = len(self._places)
                if place == len(self._ids):
                    self._ids = np.concatenate((self._ids, np.empty_like(self._ids)))
                    self._in_output = np.concatenate(
                        (self._in_output, np.zeros_like(self._in_output))
                    )
                self._ids[place] = token_id
            if position >= num_prompt_tokens:
                self._in_output[place] += 1
        self._num_taken = len(token_ids)

    def after(self, draft: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Distinct token ids and how often each is in the output, if `draft` belonged to it.

        Without a draft they are views, good until tokens are taken in.
        """
        size = len(self._places)
        ids, in_output = self._ids[:size], self._in_output[:size]
        if not draft:
            return ids, in_output
        places = [self._places.get(token_id, -1) for token_id in draft]
        new: dict[int, int] = {}
        for index, token_id in enumerate(draft):
            if places[index] < 0:
                places[index] = new.setdefault(token_id, size + len(new))
        ids = np.concatenate((ids, np.array(list(new), np.int64)))
        in_output = np.concatenate((in_output, np.zeros(len(new), np.int64)))
        for place in places:
            in_output[place] += 1
        return ids, in_output
