"""Rates and percentiles, from counters and histograms read twice."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


def growth(before: float, now: float) -> float:
    """What a counter counted between two readings; one that fell was started again meanwhile."""
    return now - before if now >= before else now


def ratio(part: float, whole: float) -> float | None:
    """A share of a whole, within [0, 1]; None of nothing."""
    return min(1.0, max(0.0, part / whole)) if whole > 0 else None


@dataclass(frozen=True, slots=True)
class Histogram:
    """Observations in buckets.

    Attributes:
        bounds: upper bounds, rising; the last is infinity.
        counts: observations in each bucket alone.
        sum: of all observations.
    """

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    sum: float

    @property
    def count(self) -> float:
        """Observations in all buckets."""
        return sum(self.counts)

    def since(self, before: Histogram | None) -> Histogram:
        """What was observed after an earlier reading. A histogram whose count fell was started
        again meanwhile."""
        if before is None or before.bounds != self.bounds or before.count > self.count:
            return self
        counts = tuple(
            max(0.0, now - then) for now, then in zip(self.counts, before.counts, strict=True)
        )
        return Histogram(self.bounds, counts, max(0.0, self.sum - before.sum))

    def quantile(self, share: float) -> float:
        """The value that this share of the observations, above 0 and at most 1, does not exceed.

        An estimate: observations are taken to lie evenly in their bucket, as far as their mean
        allows (Markov's inequality, which matters where most are in the first bucket). Those above
        the last finite bound count as it. Needs an observation.
        """
        highest = self.mean / (1 - share) if share < 1 else math.inf
        return min(highest, self._evenly(share))

    def _evenly(self, share: float) -> float:
        rank = share * self.count
        below = 0.0
        lower = 0.0
        for bound, count in zip(self.bounds, self.counts, strict=True):
            if count and below + count >= rank:
                if math.isinf(bound):
                    return lower
                # Rounding must not lead out of the bucket.
                return min(bound, lower + (bound - lower) * (rank - below) / count)
            below += count
            if not math.isinf(bound):
                lower = bound
        return lower

    @property
    def mean(self) -> float:
        """The mean of the observations. Needs one."""
        return self.sum / self.count


def merged(histograms: Iterable[Histogram]) -> Histogram | None:
    """Several as one; None of none. Those with other buckets than the first, as a replica of
    another version may have, are left out."""
    found: list[Histogram] = []
    for histogram in histograms:
        if not found or histogram.bounds == found[0].bounds:
            found.append(histogram)
    if not found:
        return None
    counts = _sums([histogram.counts for histogram in found])
    return Histogram(found[0].bounds, counts, sum(histogram.sum for histogram in found))


def _sums(rows: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    return tuple(sum(column) for column in zip(*rows, strict=True))
