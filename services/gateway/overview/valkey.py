"""What the Redis-protocol server says of itself, in the form of a replica of ours."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

from meshserve.v1 import monitor_pb2
from services.runtime.valkey import ValkeyClient


async def valkey_status(client: ValkeyClient) -> monitor_pb2.GetStatusResponse:
    """Its INFO as metrics. Of a cluster, that of the node that answers. Raises ValkeyError."""
    info = await client.execute("INFO")
    if client.is_cluster and not _is_of_one_node(info):
        info = next(iter(info.values()))
    return status_of(info)


def address_of(url: str) -> str:
    """`HOST:PORT` or the path of a socket, from the URL of a server or a cluster."""
    parts = urlsplit(url)
    return f"unix:{parts.path}" if parts.scheme == "unix" else parts.netloc.rpartition("@")[2]


def status_of(info: Mapping[str, Any]) -> monitor_pb2.GetStatusResponse:
    """An INFO as the status of a replica."""

    def number(name: str) -> float:
        return float(info.get(name, 0))

    return monitor_pb2.GetStatusResponse(
        service="valkey",
        version=str(info.get("valkey_version") or info.get("redis_version", "")),
        instance_id=str(info.get("run_id", "")),
        state=monitor_pb2.REPLICA_STATE_SERVING,
        metrics=[
            _counter(
                "meshserve_process_cpu_seconds", number("used_cpu_sys") + number("used_cpu_user")
            ),
            _gauge("meshserve_process_resident_memory_bytes", number("used_memory_rss")),
            _gauge(
                "meshserve_process_start_time_seconds", time.time() - number("uptime_in_seconds")
            ),
            _counter("valkey_commands", number("total_commands_processed")),
        ],
    )


def _is_of_one_node(info: Mapping[str, Any]) -> bool:
    return "run_id" in info


def _counter(name: str, value: float) -> monitor_pb2.Metric:
    return _metric(name, monitor_pb2.METRIC_KIND_COUNTER, value)


def _gauge(name: str, value: float) -> monitor_pb2.Metric:
    return _metric(name, monitor_pb2.METRIC_KIND_GAUGE, value)


def _metric(name: str, kind: monitor_pb2.MetricKind.ValueType, value: float) -> monitor_pb2.Metric:
    return monitor_pb2.Metric(name=name, kind=kind, samples=[monitor_pb2.MetricSample(value=value)])
