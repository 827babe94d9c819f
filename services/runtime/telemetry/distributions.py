"""Histograms that are observed for every message of every stream.

The library's own take a lock twice and walk through the buckets for each observation. These take a
tenth of that: one thread observes, and whoever reads meanwhile may miss what is just being noted.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from prometheus_client.metrics_core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString


class Distribution:
    """What was observed under some labels.

    Attributes:
        counts: observations in each bucket alone, the last above all bounds.
        sum: of all observations.
    """

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Takes note of a value; one on a bound belongs below it."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class Distributions(Collector):
    """A histogram by its labels.

    Args:
        bounds: upper bounds of the buckets, rising, all finite.
    """

    def __init__(
        self, name: str, meaning: str, label_names: Sequence[str], bounds: Sequence[float]
    ) -> None:
        self._name = name
        self._meaning = meaning
        self._label_names = label_names
        self._bounds = bounds
        self._ends = [*map(floatToGoString, bounds), "+Inf"]
        self._by_labels: dict[tuple[str, ...], Distribution] = {}

    def labels(self, *values: str) -> Distribution:
        """What is observed under these labels, in the order of their names."""
        found = self._by_labels.get(values)
        if found is None:
            found = self._by_labels[values] = Distribution(self._bounds)
        return found

    def collect(self) -> Iterable[HistogramMetricFamily]:
        """Called by the library, from any thread."""
        family = HistogramMetricFamily(self._name, self._meaning, labels=self._label_names)
        for values, found in list(self._by_labels.items()):
            total = 0
            buckets = []
            for end, count in zip(self._ends, list(found.counts), strict=True):
                total += count
                buckets.append((end, total))
            family.add_metric(values, buckets, found.sum)
        yield family
