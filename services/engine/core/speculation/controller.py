"""How many drafted tokens a step takes in: as many as bring the most tokens per second."""

from __future__ import annotations

import heapq
from collections.abc import Callable

# Tokens of a draft beyond which a longer one is not considered.
MAX_DRAFT_TOKENS = 16
# What a draft must promise to be worth it: estimates are uncertain, and drafting has its own cost.
MARGIN = 1.02
# After this many steps in a row that passed over drafts, one takes them in all the same, since the
# costs that spoke against them may be out of date. Each that proves them right doubles the number.
_FIRST_PROBE, _LAST_PROBE = 32, 1024


class Probing:
    """Now and then tries what does not seem to pay, since the costs that speak against it may be
    out of date; less often each time that it turns out not to pay still."""

    def __init__(self) -> None:
        self._passed_over = 0
        self._after = _FIRST_PROBE

    @property
    def is_due(self) -> bool:
        """Whether what does not pay is to be tried next."""
        return self._passed_over >= self._after

    def pass_over(self) -> bool:
        """Count a step in which drafting does not seem to pay; True if it is to draft all the
        same."""
        if not self.is_due:
            self._passed_over += 1
            return False
        self._passed_over = 0
        self._after = min(2 * self._after, _LAST_PROBE)
        return True

    def pays(self) -> None:
        """Drafting pays: doubts start afresh."""
        self._passed_over = 0
        self._after = _FIRST_PROBE


class DraftLengths:
    """Chooses draft lengths that maximise expected tokens over expected seconds.

    The objective is the goodput of SmartSpec (Liu et al., 2406.14066). The tokens of all drafts
    compete: those that are likeliest to be accepted go first, whichever sequence they belong to,
    and as many are taken as bring more tokens per second than without. A step that computes many
    tokens anyway (a full batch) costs more with every token, so that drafts stop by themselves.
    """

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self._seconds = seconds  # of a step, by its number of tokens
        self._probing = Probing()

    def could_pay(self, num_sequences: int) -> bool:
        """Whether even drafts that are certain to be accepted would pay in a step of so many
        sequences; cheap to ask before anything is drafted."""
        if self._probing.is_due:
            return True
        plain = self._seconds(num_sequences) / num_sequences
        for tokens in (1, MAX_DRAFT_TOKENS):
            width = num_sequences + num_sequences * tokens
            if self._seconds(width) / width * MARGIN < plain:
                return True
        self._probing.pass_over()
        return False

    def choose(
        self, num_sequences: int, survivals: list[list[float]], max_tokens: int
    ) -> list[int]:
        """How many tokens of each draft to take in.

        `survivals[i]` holds for each token of draft i the probability that it is accepted, never
        rising; `max_tokens` bounds the sum of what is taken.
        """
        taken = [0] * len(survivals)
        heap = [(-survival[0], index) for index, survival in enumerate(survivals) if survival]
        heapq.heapify(heap)
        order: list[int] = []
        expected = float(num_sequences)
        seconds = self._seconds
        best = expected / seconds(num_sequences) * MARGIN
        best_with_any, num_best, num_best_with_any = 0.0, 0, 0
        while heap and len(order) < max_tokens:
            gain, index = heap[0]
            order.append(index)
            taken[index] += 1
            expected -= gain
            rate = expected / seconds(num_sequences + len(order))
            if rate > best_with_any:
                best_with_any, num_best_with_any = rate, len(order)
            if rate > best:
                best, num_best = rate, len(order)
            survival = survivals[index]
            if taken[index] < len(survival):
                heapq.heapreplace(heap, (-survival[taken[index]], index))
            else:
                heapq.heappop(heap)
        if num_best:
            self._probing.pays()
        elif order and self._probing.pass_over():
            num_best = num_best_with_any
        for index in order[num_best:]:
            taken[index] -= 1
        return taken
