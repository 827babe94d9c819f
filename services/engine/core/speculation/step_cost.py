"""What a decode step costs by the number of tokens it computes, as measured."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

# An estimate follows faster steps quickly and slower ones slowly and not far: a step is slow for
# reasons that have nothing to do with its tokens far more often than it is fast for such reasons.
_FASTER, _SLOWER = 0.3, 0.1
_SLOWEST = 2.0


class StepCost:
    """Estimated seconds of a step by its number of tokens, from measured ones.

    No step costs more than one of more tokens: where measurements say so, some were held up.
    Between two measured numbers it is interpolated. Beyond the largest it is believed to be the
    same: the first step of a new width may be a bad bargain, and is then known to be one.
    """

    def __init__(self) -> None:
        self._widths: list[int] = []  # ascending
        self._seconds: list[float] = []
        self._levels: list[float] = []  # the least of each and all wider ones

    def observe(self, num_tokens: int, seconds: float) -> None:
        """Take in a measured step."""
        index = bisect_left(self._widths, num_tokens)
        if index == len(self._widths) or self._widths[index] != num_tokens:
            self._widths.insert(index, num_tokens)
            self._seconds.insert(index, seconds)
        else:
            known = self._seconds[index]
            if seconds < known:
                self._seconds[index] = known + _FASTER * (seconds - known)
            else:
                self._seconds[index] = known + _SLOWER * (min(seconds, _SLOWEST * known) - known)
        self._levels = list(accumulate(reversed(self._seconds), min))[::-1]

    @property
    def is_measured(self) -> bool:
        """Whether any step was."""
        return bool(self._widths)

    def seconds(self, num_tokens: int) -> float:
        """The estimate for a step of `num_tokens`; 1 as long as nothing was measured."""
        widths, seconds = self._widths, self._levels
        if not widths:
            return 1.0
        index = bisect_left(widths, num_tokens)
        if index == len(widths):
            return seconds[-1]
        if index == 0 or widths[index] == num_tokens:
            return seconds[index]
        low, high = widths[index - 1], widths[index]
        share = (num_tokens - low) / (high - low)
        return seconds[index - 1] + share * (seconds[index] - seconds[index - 1])
