"""Speculators whose drafts are as right or wrong as a test wants them."""

from __future__ import annotations

import random
from collections.abc import Mapping

from services.engine.core.sequence import Sequence
from services.engine.core.speculation.speculator import Speculator, room_for_draft
from tests.fakes.engines import reference_output
from tests.fakes.hash_model import NO_WINDOW, SLOW_TOKEN_ID, Windows


class HalfRightSpeculator(Speculator):
    """Drafts what the sequence will say, often with one wrong token somewhere in it; every other
    step is launched ahead without drafts.

    The wrong token may be one that breaks a step or gives NaN.
    """

    def __init__(self, context_tokens: int, seed: int, windows: Windows = NO_WINDOW) -> None:
        super().__init__()
        self._windows = windows
        self.tracked: set[int] = set()
        self._context_tokens = context_tokens
        self._rng = random.Random(seed)
        self._answers: dict[int, list[int]] = {}

    def propose(self, sequences: list[Sequence], max_tokens: int) -> list[tuple[int, ...]]:
        drafts = []
        for sequence in sequences:
            self.tracked.add(sequence.arrival)
            if sequence.arrival not in self._answers:
                answer = reference_output(sequence.request, self._context_tokens, self._windows)
                self._answers[sequence.arrival] = answer
            answer = self._answers[sequence.arrival]
            length = min(self._rng.randint(0, 5), room_for_draft(sequence), max_tokens)
            # Beyond its end the answer goes on with anything: nobody will get to see it.
            ahead = answer[sequence.num_output_tokens :][:length]
            ahead += [self._rng.randrange(SLOW_TOKEN_ID) for _ in range(length - len(ahead))]
            if ahead and self._rng.random() < 0.6:
                ahead[self._rng.randrange(length)] = self._rng.randrange(SLOW_TOKEN_ID)
            max_tokens -= length
            drafts.append(tuple(ahead))
        return drafts

    def awaits(self, sequences: list[Sequence]) -> bool:
        return self._rng.random() < 0.5

    def forget(self, sequence: Sequence) -> None:
        self.tracked.discard(sequence.arrival)


class KnowingSpeculator(Speculator):
    """Drafts what was answered another time, by sequence, with mistakes."""

    def __init__(self, known: Mapping[int, list[int]], vocab_size: int) -> None:
        super().__init__()
        self._known = known
        self._vocab_size = vocab_size
        self._rng = random.Random(5)

    def propose(self, sequences: list[Sequence], max_tokens: int) -> list[tuple[int, ...]]:
        drafts = []
        for sequence in sequences:
            said = sequence.num_output_tokens
            room = min(max_tokens, sequence.max_tokens - said - 1, self._rng.randrange(5))
            draft = self._known[sequence.sequence_id][said : said + max(0, room)]
            if draft and self._rng.random() < 0.4:
                draft[-1] = self._rng.randrange(self._vocab_size)
            max_tokens -= len(draft)
            drafts.append(tuple(draft))
        return drafts

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept."""
