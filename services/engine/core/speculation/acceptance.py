"""How likely a guessed token is right, learnt from every guess that was checked."""

from __future__ import annotations

# Lengths of a match from here on are all the same: 2-3, 4-7, 8-15, 16 and more.
_CLASSES = 5
# What is taken for granted before anything was seen, by class of match length; the last two tokens
# of a text say little, sixteen in a row are a quotation.
_PRIOR = (0.0, 0.2, 0.3, 0.6, 0.8, 0.9)
_PRIOR_WEIGHT = 4.0
# Of what a sequence or all of them have shown, this much is kept with each new observation.
_SEQUENCE_MEMORY = 0.97
_SHARED_MEMORY = 0.998


def match_class(match_length: int) -> int:
    """The class of match lengths whose guesses are counted together, 1 to 5; 0 where there is no
    match, and the guess is that one begins."""
    return min(_CLASSES, match_length.bit_length())


class Acceptance:
    """Exponentially weighted shares of right guesses, by class of match length.

    An estimate leans on `parent`, or on a prior where there is none, with the weight of a few
    observations: a new sequence is believed to be like the others until it shows otherwise.
    """

    __slots__ = ("_memory", "_parent", "_right", "_seen")

    def __init__(self, parent: Acceptance | None = None) -> None:
        self._parent = parent
        self._memory = _SHARED_MEMORY if parent is None else _SEQUENCE_MEMORY
        self._right = [0.0] * (_CLASSES + 1)
        self._seen = [0.0] * (_CLASSES + 1)

    def observe(self, match_length: int, correct: bool) -> None:
        """Take in one checked guess that followed a match of `match_length` tokens."""
        index = match_class(match_length)
        self._right[index] = self._right[index] * self._memory + correct
        self._seen[index] = self._seen[index] * self._memory + 1.0
        if self._parent is not None:
            self._parent.observe(match_length, correct)

    def probability(self, match_length: int) -> float:
        """The probability that the next guess is right, after a match of `match_length` tokens."""
        return self._estimate(match_class(match_length))

    def survival(self, match_length: int, length: int) -> list[float]:
        """For each token of a draft the probability that it and all before it are right.

        Each token that is right makes the match one longer.
        """
        estimates = [self._estimate(index) for index in range(1, _CLASSES + 1)]
        survival: list[float] = []
        probability = 1.0
        for agreed in range(match_length, match_length + length):
            probability *= estimates[match_class(agreed) - 1]
            survival.append(probability)
        return survival

    def _estimate(self, index: int) -> float:
        prior = _PRIOR[index] if self._parent is None else self._parent._estimate(index)
        return (self._right[index] + _PRIOR_WEIGHT * prior) / (self._seen[index] + _PRIOR_WEIGHT)
