"""What a replica says of itself: how it does, and its metrics, for whoever watches the mesh."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from importlib.metadata import version
from typing import Any

from prometheus_client import Metric as Family
from prometheus_client.samples import Sample

from meshserve.v1 import monitor_pb2, monitor_pb2_grpc
from services.runtime.health import HealthMonitor
from services.runtime.telemetry import Metrics

GRPC_SERVICE = monitor_pb2.DESCRIPTOR.services_by_name["MonitorService"].full_name

_KINDS = {
    "counter": monitor_pb2.METRIC_KIND_COUNTER,
    "gauge": monitor_pb2.METRIC_KIND_GAUGE,
    "histogram": monitor_pb2.METRIC_KIND_HISTOGRAM,
}

Metadata = Iterable[tuple[str, str | bytes]]


class Monitor:
    """Knows the status of this process; `draining` is set when it shuts down."""

    def __init__(self, health: HealthMonitor, metrics: Metrics, draining: asyncio.Event) -> None:
        self._health = health
        self._metrics = metrics
        self._draining = draining
        self._version = version("meshserve")

    def status(self) -> monitor_pb2.GetStatusResponse:
        """The process as it is now."""
        state = self._state()
        unhealthy = state == monitor_pb2.REPLICA_STATE_UNHEALTHY
        return monitor_pb2.GetStatusResponse(
            service=self._metrics.service,
            version=self._version,
            instance_id=self._health.servicer.instance_id,
            state=state,
            problem=self._health.problem if unhealthy else "",
            metrics=[
                _metric(family)
                for family in self._metrics.registry.collect()
                if family.type in _KINDS
            ],
        )

    def _state(self) -> monitor_pb2.ReplicaState.ValueType:
        if self._draining.is_set():
            return monitor_pb2.REPLICA_STATE_DRAINING
        if self._health.healthy:
            return monitor_pb2.REPLICA_STATE_SERVING
        if self._health.was_healthy:
            return monitor_pb2.REPLICA_STATE_UNHEALTHY
        return monitor_pb2.REPLICA_STATE_STARTING


class MonitorServicer(monitor_pb2_grpc.MonitorServiceServicer):
    """Answers for this replica those whom `admit` lets in; it raises ServiceError for others."""

    def __init__(self, monitor: Monitor, admit: Callable[[Metadata], None]) -> None:
        self._monitor = monitor
        self._admit = admit

    async def GetStatus(  # noqa: N802
        self, request: monitor_pb2.GetStatusRequest, context: Any
    ) -> monitor_pb2.GetStatusResponse:
        """The process as it is now."""
        self._admit(context.invocation_metadata() or ())
        return self._monitor.status()


def _metric(family: Family) -> monitor_pb2.Metric:
    metric = monitor_pb2.Metric(name=family.name, kind=_KINDS[family.type])
    if family.type == "histogram":
        _add_histogram(metric, family.samples)
        return metric
    for sample in family.samples:
        if not metric.samples:
            metric.label_names.extend(sample.labels)
        metric.samples.add(label_values=sample.labels.values(), value=sample.value)
    return metric


def _add_histogram(metric: monitor_pb2.Metric, samples: Iterable[Sample]) -> None:
    """Prometheus counts what is in a bucket and in all below it; we tell them apart."""
    by_labels: dict[tuple[str, ...], monitor_pb2.MetricSample] = {}
    below = 0
    for sample in samples:
        labels = dict(sample.labels)
        bound = labels.pop("le", None)
        values = tuple(labels.values())
        entry = by_labels.get(values)
        if entry is None:
            if not by_labels:
                metric.label_names.extend(labels)
            entry = by_labels[values] = metric.samples.add(label_values=values)
            below = 0
        if bound is not None:
            if len(by_labels) == 1:
                metric.bucket_bounds.append(float(bound))
            entry.bucket_counts.append(int(sample.value) - below)
            below = int(sample.value)
        elif sample.name.endswith("_sum"):
            entry.value = sample.value
