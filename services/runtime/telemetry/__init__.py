"""Traces, metrics and logs, the same in every service."""

from services.runtime.telemetry.logs import configure_logging
from services.runtime.telemetry.metrics import Metrics, exemplar_of
from services.runtime.telemetry.tracing import Tracing, configure_tracing, get_tracer

__all__ = [
    "Metrics",
    "Tracing",
    "configure_logging",
    "configure_tracing",
    "exemplar_of",
    "get_tracer",
]
