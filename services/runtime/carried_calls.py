"""Calls that travel on a shared stream, the answering side.

The stream itself has no span, since it belongs to no one request. A call on it leaves the span and
the metrics that it would leave on a stream of its own, so that nobody who watches has to know how
it came.
"""

from __future__ import annotations

import time

import grpc
from opentelemetry.trace import SpanKind, set_span_in_context

from meshserve.v1 import types_pb2
from services.runtime.errors import Reason, ServiceError
from services.runtime.telemetry import Metrics, get_tracer
from services.runtime.telemetry.tracing import context_of, mark_failed


class CarriedCalls:
    """Records the calls of one method.

    Args:
        method: full name, for example `meshserve.v1.EngineService/Generate`.
        metrics: those of the service.
    """

    def __init__(self, method: str, metrics: Metrics) -> None:
        self.method = method
        self.calls = metrics.counter("meshserve_rpc_server_calls")
        self.duration = metrics.histogram("meshserve_rpc_server_duration_seconds").labels(method)
        self.active = metrics.gauge("meshserve_rpc_server_active_calls").labels(method)

    def begin(self, trace: types_pb2.TraceContext) -> CarriedCall:
        """A call that has just arrived."""
        return CarriedCall(self, trace)


class CarriedCall:
    """One call. `context` is the trace context of what is done for it."""

    def __init__(self, calls: CarriedCalls, trace: types_pb2.TraceContext) -> None:
        self._calls = calls
        self._started = time.perf_counter()
        self._span = get_tracer().start_span(
            calls.method,
            context_of(trace),
            SpanKind.SERVER,
            {"rpc.system.name": "grpc", "rpc.method": calls.method},
        )
        self.context = set_span_in_context(self._span)
        calls.active.inc()

    def end(self, error: ServiceError | None) -> None:
        """Records how the call ended; a caller that gave it up is no failure."""
        code = grpc.StatusCode.OK if error is None else error.code
        if error is not None and error.reason is not Reason.CANCELLED:
            mark_failed(self._span, error)
        self._span.set_attribute("rpc.response.status_code", code.name)
        self._span.end()
        self._calls.active.dec()
        self._calls.calls.labels(self._calls.method, code.name).inc()
        self._calls.duration.observe(time.perf_counter() - self._started)
