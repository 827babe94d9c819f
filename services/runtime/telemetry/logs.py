"""Log records as one JSON object a line, each with the ids of the trace it belongs to."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

from opentelemetry import trace

# What every LogRecord has; the rest came through `extra` and is logged as fields.
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def _trace_fields() -> dict[str, str]:
    context = trace.get_current_span().get_span_context()
    if not context.is_valid:
        return {}
    return {
        "trace_id": trace.format_trace_id(context.trace_id),
        "span_id": trace.format_span_id(context.span_id),
    }


def _extra_fields(record: logging.LogRecord) -> dict[str, object]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD_FIELDS}


def _plain(value: object) -> object:
    """What JSON has a form for; anything else, NaN included, as its `str`."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return str(value)
    return value


class JsonFormatter(logging.Formatter):
    """time, level, service, logger, message, trace_id, span_id, then the record's extra fields."""

    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON; an extra field never takes the place of one of ours."""
        fields: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": record.name,
            "message": record.getMessage(),
            **_trace_fields(),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        for key, value in _extra_fields(record).items():
            fields.setdefault(key, _plain(value))
        return json.dumps(fields, ensure_ascii=False)


class TextFormatter(logging.Formatter):
    """The same for a person's eyes."""

    def __init__(self, service: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)-7s {service} %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        """One line of text, and the traceback if there is one."""
        fields = {**_extra_fields(record), **_trace_fields()}
        suffix = "".join(f" {key}={value}" for key, value in fields.items())
        head, separator, traceback = super().format(record).partition("\n")
        return head + suffix + separator + traceback


def configure_logging(service: str, level: str, form: Literal["json", "text"]) -> None:
    """Sends all log records of the process to standard error in the given form."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(service) if form == "json" else TextFormatter(service))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
