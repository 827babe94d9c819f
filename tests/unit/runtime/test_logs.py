"""A log record is one line of JSON with the ids of the trace it belongs to."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import TracerProvider

from services.runtime.telemetry import configure_logging
from services.runtime.telemetry.logs import JsonFormatter, TextFormatter


def line(message: str, *args: Any, exc_info: Any = None, **extra: Any) -> dict[str, Any]:
    record = logging.getLogger("a.logger").makeRecord(
        "a.logger", logging.WARNING, "f.py", 1, message, args, exc_info, extra=extra
    )
    text = JsonFormatter("engine").format(record)
    assert "\n" not in text
    fields = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert isinstance(fields, dict)
    return fields


def test_a_record_says_when_who_where_and_what() -> None:
    fields = line("%s of %d", "one", 2)
    assert fields["message"] == "one of 2"
    assert fields["level"] == "warning"
    assert fields["service"] == "engine"
    assert fields["logger"] == "a.logger"
    assert fields["time"].endswith("+00:00")
    assert "trace_id" not in fields


def test_a_record_inside_a_span_carries_its_ids() -> None:
    with TracerProvider().get_tracer("t").start_as_current_span("s") as span:
        fields = line("hi")
    context = span.get_span_context()
    assert fields["trace_id"] == f"{context.trace_id:032x}"
    assert fields["span_id"] == f"{context.span_id:016x}"


def test_extra_fields_stand_beside_ours_and_never_in_their_place() -> None:
    fields = line("hi", port=7, level="forged", service="forged", trace_id="kept")
    assert fields["port"] == 7
    assert fields["level"] == "warning"
    assert fields["service"] == "engine"
    assert fields["trace_id"] == "kept"


def test_an_exception_is_a_field_with_its_traceback() -> None:
    try:
        raise KeyError("lost")
    except KeyError:
        fields = line("failed", exc_info=sys.exc_info())
    assert fields["exception"].startswith("Traceback")
    assert "KeyError: 'lost'" in fields["exception"]


class Odd:
    def __str__(self) -> str:
        return "odd"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (Odd(), "odd"),
        (math.nan, "nan"),
        (math.inf, "inf"),
        ({("a", 1): 2}, "{('a', 1): 2}"),
        ([Odd], str([Odd])),
        ("two\nlines", "two\nlines"),
        ({"a": [1, None]}, {"a": [1, None]}),
    ],
)
def test_what_json_has_no_form_for_is_written_as_text(value: Any, written: Any) -> None:
    assert line("hi", value=value)["value"] == written


def test_a_value_that_contains_itself_does_no_harm() -> None:
    endless: list[Any] = []
    endless.append(endless)
    assert line("hi", value=endless)["value"] == "[[...]]"


@given(st.text(), st.recursive(st.floats() | st.text() | st.binary(), st.lists))
def test_any_record_is_one_line_of_json(message: str, value: Any) -> None:
    assert line("%s", message, value=value)["message"] == message


def test_a_person_reads_the_same_as_text() -> None:
    try:
        raise KeyError("lost")
    except KeyError:
        record = logging.makeLogRecord(
            {"name": "a", "msg": "failed", "exc_info": sys.exc_info(), "port": 7}
        )
    first, *rest = TextFormatter("engine").format(record).splitlines()
    assert first.endswith("engine a: failed port=7")
    assert rest[0].startswith("Traceback")
    assert rest[-1] == "KeyError: 'lost'"


def test_the_level_and_the_form_are_those_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    written = io.StringIO()
    monkeypatch.setattr(sys, "stderr", written)
    try:
        configure_logging("cache", "warning", "json")
        logging.getLogger("x").info("not written")
        logging.getLogger("x").warning("written")
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    (only,) = written.getvalue().splitlines()
    assert json.loads(only)["message"] == "written"
