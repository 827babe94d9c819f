"""How many drafted tokens a step takes in: as many as bring the most tokens per second."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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


@dataclass(frozen=True, slots=True)
class _Best:
    """Drafted tokens in the order in which they are taken in, by the index of their draft; how many
    of them bring the most tokens per second, and the same or 0 where none bring more."""

    order: npt.NDArray[np.int64]
    num_best: int
    num_paying: int


class DraftLengths:
    """Chooses draft lengths that maximise expected tokens over expected seconds.

    The objective is the goodput of SmartSpec (Liu et al., 2406.14066). The tokens of all drafts
    compete: those that are likeliest to be accepted go first, whichever sequence they belong to,
    and as many are taken as bring more tokens per second than without. A step that computes many
    tokens anyway (a full batch) costs more with every token, so that drafts stop by themselves.

    Where a device has its next step before it is through with one, drafts give that up twice over:
    what they follow must be known before they are made, and how many of them stand before the step
    behind them is planned. So a step with drafts costs what the device idles meanwhile as well; and
    where drafts do not bring that much, steps are launched ahead without any.
    """

    def __init__(
        self, seconds: Callable[[int], float], idle_s: Callable[[], float] = lambda: 0.0
    ) -> None:
        """seconds: of a step, by its number of tokens: a line. idle_s: what a device idles before a
        step that waits for the one before it."""
        self._seconds = seconds
        self._idle_s = idle_s
        self._probing = Probing()
        self._probes = False  # whether a step was awaited for the next to take in drafts anyway

    def could_pay(self, num_sequences: int) -> bool:
        """Whether even drafts that are certain to be accepted would pay in a step of so many
        sequences; cheap to ask before anything is drafted."""
        if self._probing.is_due:
            return True
        plain = self._seconds(num_sequences) / num_sequences
        for tokens in (1, MAX_DRAFT_TOKENS):
            width = num_sequences + num_sequences * tokens
            if (self._seconds(width) + self._idle_s()) / width * MARGIN < plain:
                return True
        self._probing.pass_over()
        return False

    def are_worth_awaiting(self, num_sequences: int, survivals: list[list[float]]) -> bool:
        """Whether drafts are likely to bring more than it costs to await what they follow.

        `survivals` are as for `choose`, of the drafts that there will be if what they follow is
        what is guessed now; the probability of that is in them.
        """
        if not any(survivals):
            return False
        best = self._best(num_sequences, survivals, num_sequences * MAX_DRAFT_TOKENS)
        if best.num_paying:
            return True
        if self._probing.pass_over():
            self._probes = True
            return True
        return False

    def choose(
        self, num_sequences: int, survivals: list[list[float]], max_tokens: int
    ) -> list[int]:
        """How many tokens of each draft to take in.

        `survivals[i]` holds for each token of draft i the probability that it is accepted, never
        rising; `max_tokens` bounds the sum of what is taken.
        """
        best = self._best(num_sequences, survivals, max_tokens)
        num_taken = best.num_paying
        if num_taken:
            self._probing.pays()
        elif len(best.order) and (self._probes or self._probing.pass_over()):
            num_taken = best.num_best
            self._probes = False
        taken: list[int] = np.bincount(best.order[:num_taken], minlength=len(survivals)).tolist()
        return taken

    def _best(self, num_sequences: int, survivals: list[list[float]], max_tokens: int) -> _Best:
        # In the order of what is likeliest, the tokens of a draft are in their own.
        gains = np.array([gain for survival in survivals for gain in survival])
        owners = np.repeat(np.arange(len(survivals)), [len(each) for each in survivals])
        order = np.argsort(-gains, kind="stable")[:max_tokens]
        plain_s = self._seconds(num_sequences)
        each_s = self._seconds(num_sequences + 1) - plain_s
        counts = np.arange(1, len(order) + 1)
        expected = num_sequences + np.cumsum(gains[order])
        rates = expected / (plain_s + self._idle_s() + each_s * counts)
        best = int(rates.argmax()) if len(order) else 0
        pays = len(order) > 0 and bool(rates[best] > num_sequences / plain_s * MARGIN)
        return _Best(owners[order], best + 1, best + 1 if pays else 0)
