"""What one replica has said of itself, now and at the beginning of the window."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from meshserve.v1 import monitor_pb2
from services.gateway.overview.rates import Histogram, growth, merged

WINDOW_S = 10.0

# Names and values of labels.
Labels: TypeAlias = dict[str, str]
Wanted: TypeAlias = Callable[[Labels], bool]


def everything(labels: Labels) -> bool:
    """Wants a metric under all labels."""
    return True


def having(label: str, value: str) -> Wanted:
    """Wants a metric where a label has a value."""
    return lambda labels: labels.get(label) == value


def both(one: Wanted, other: Wanted) -> Wanted:
    """Wants what two want."""
    return lambda labels: one(labels) and other(labels)


class Reading:
    """The status of a replica at a moment.

    Args:
        at: when it was read, by the monotonic clock, in seconds.
        status: what the replica answered.
    """

    def __init__(self, at: float, status: monitor_pb2.GetStatusResponse) -> None:
        self.at = at
        self.status = status
        self._metrics = {metric.name: metric for metric in status.metrics}
        self._series: dict[str, list[tuple[Labels, monitor_pb2.MetricSample]]] = {}

    def series(self, name: str) -> list[tuple[Labels, monitor_pb2.MetricSample]]:
        """A metric under each combination of labels that it has; nothing of one that is absent."""
        known = self._series.get(name)
        if known is None:
            metric = self._metrics.get(name)
            known = self._series[name] = (
                []
                if metric is None
                else [
                    (dict(zip(metric.label_names, sample.label_values, strict=True)), sample)
                    for sample in metric.samples
                ]
            )
        return known

    def value(self, name: str, wanted: Wanted = everything) -> float:
        """A counter or a gauge, summed over the labels that are wanted."""
        return sum(sample.value for labels, sample in self.series(name) if wanted(labels))

    def histograms(self, name: str) -> Iterator[tuple[Labels, Histogram]]:
        """A histogram under each combination of labels."""
        metric = self._metrics.get(name)
        if metric is None:
            return
        bounds = tuple(metric.bucket_bounds)
        for labels, sample in self.series(name):
            yield labels, Histogram(bounds, tuple(sample.bucket_counts), sample.value)


@dataclass(frozen=True, slots=True)
class Window:
    """Two readings of one process, and what it did between them. They are the same one when it has
    been read once."""

    first: Reading
    last: Reading

    @property
    def seconds(self) -> float:
        """How long it is; 0 when there is one reading."""
        return self.last.at - self.first.at

    def total(self, name: str, wanted: Wanted = everything) -> float:
        """A counter since start, or a gauge as it is."""
        return self.last.value(name, wanted)

    def rate(self, name: str, wanted: Wanted = everything) -> float:
        """What a counter counted, per second; 0 when there is one reading."""
        return self.grown(name, wanted) / self.seconds if self.seconds else 0.0

    def grown(self, name: str, wanted: Wanted = everything) -> float:
        """What a counter counted."""
        before = {_key(labels): sample.value for labels, sample in self.first.series(name)}
        return sum(
            growth(before.get(_key(labels), 0.0), sample.value)
            for labels, sample in self.last.series(name)
            if wanted(labels)
        )

    def observed(self, name: str, wanted: Wanted = everything) -> Histogram | None:
        """What a histogram observed, over the labels that are wanted; None if nothing."""
        if not self.seconds:
            return None
        before = {_key(labels): found for labels, found in self.first.histograms(name)}
        found = merged(
            histogram.since(before.get(_key(labels)))
            for labels, histogram in self.last.histograms(name)
            if wanted(labels)
        )
        return found if found is not None and found.count else None


class History:
    """The readings of one address: those of the window, and the last one before it."""

    def __init__(self) -> None:
        self._readings: deque[Reading] = deque()

    def add(self, reading: Reading) -> Window:
        """Takes in what the replica has said, and returns the newest window. Another process at the
        address begins anew."""
        readings = self._readings
        if readings and readings[-1].status.instance_id != reading.status.instance_id:
            readings.clear()
        readings.append(reading)
        while len(readings) > 1 and readings[1].at <= reading.at - WINDOW_S:
            readings.popleft()
        return Window(readings[0], readings[-1])


def _key(labels: Labels) -> tuple[str, ...]:
    return tuple(labels.values())
