"""What a decode step costs by the number of tokens it computes, as measured; and what a device
idles where the next step is not launched ahead."""

from __future__ import annotations

# Of what was measured, this much is kept with each new step: a few hundred say what holds now.
_MEMORY = 0.99
# A step is slow for reasons that have nothing to do with its tokens far more often than it is fast
# for such reasons; it counts for no more than so many times what was expected.
_SLOWEST = 1.5


class StepCost:
    """Estimated seconds of a step by its number of tokens: a line through those measured.

    Least squares, with weights that fade. Every step says something about all numbers of tokens,
    so that one that was held up spoils no estimate for long, however rare its number. As long as
    all steps had the same number, others are believed to cost the same: the first step of another
    may be a bad bargain, and shows it. A step costs no less with more tokens, and no more by the
    token.
    """

    def __init__(self) -> None:
        self._weight = 0.0
        self._tokens = 0.0  # the weighted means
        self._seconds = 0.0
        self._spread = 0.0  # the weighted sums of squared and mixed distances from these
        self._mixed = 0.0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Take in a measured step."""
        if self._weight:
            seconds = min(seconds, _SLOWEST * self.seconds(num_tokens))
        kept = _MEMORY * self._weight
        self._weight = kept + 1
        # Welford's update, with a memory that fades.
        tokens_off, seconds_off = num_tokens - self._tokens, seconds - self._seconds
        self._tokens += tokens_off / self._weight
        self._seconds += seconds_off / self._weight
        share = kept / self._weight
        self._spread = _MEMORY * self._spread + share * tokens_off * tokens_off
        self._mixed = _MEMORY * self._mixed + share * tokens_off * seconds_off

    @property
    def is_measured(self) -> bool:
        """Whether any step was."""
        return self._weight > 0

    def seconds(self, num_tokens: int) -> float:
        """The estimate for a step of `num_tokens`; 1 as long as nothing was measured."""
        if not self._weight:
            return 1.0
        slope = self._mixed / self._spread if self._spread > 0 else 0.0
        slope = min(max(slope, 0.0), self._seconds / self._tokens)
        return self._seconds + slope * (num_tokens - self._tokens)


class IdleTime:
    """Estimated seconds between two steps of which the second waits for the first."""

    def __init__(self) -> None:
        self.is_avoidable = False  # whether steps are launched ahead where that can be
        self._weight = 0.0
        self._seconds = 0.0
        self._ended_ns = 0

    def observe(self, started_ns: int, ended_ns: int, *, follows: bool, spent_ns: int = 0) -> None:
        """Take in a step. follows: whether there was something to compute ever since the one before
        it ended. spent_ns: of the time between them, what is counted otherwise."""
        between_s = (started_ns - self._ended_ns - spent_ns) / 1e9
        self._ended_ns = ended_ns
        if not follows or between_s <= 0:
            return
        if self._weight:
            between_s = min(between_s, _SLOWEST * self._seconds)
        self._weight = _MEMORY * self._weight + 1
        self._seconds += (between_s - self._seconds) / self._weight

    def seconds(self) -> float:
        """The estimate; what cannot be avoided is no reason for anything."""
        return self._seconds if self.is_avoidable else 0.0
