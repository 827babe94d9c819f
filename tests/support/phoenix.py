"""A Phoenix that shows traces: where it is, and what its pages are asked through."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from meshserve.supervisor.phoenix import PhoenixMissingError, find_command
from services.runtime.settings import PhoenixSettings

START_TIMEOUT_S = 120.0

SPANS = """
query($trace: String!) {
  getTraceByOtelId(traceId: $trace) {
    spans(first: 1000) {
      edges { node { name spanKind statusCode latencyMs parentId spanId attributes } }
    }
  }
}
"""


def require_phoenix() -> Path:
    """Its executable; where it is missing the test is skipped, but in CI, which installs it, it
    fails."""
    try:
        return find_command(PhoenixSettings(), os.environ)
    except PhoenixMissingError:
        missing = "Phoenix is not installed: make phoenix"
    if os.environ.get("CI"):
        pytest.fail(missing)
    pytest.skip(missing)


def wait_until_up(url: str) -> None:
    """Returns once its pages can be opened."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            urllib.request.urlopen(f"{url}/healthz", timeout=5).close()
        except (urllib.error.URLError, OSError):
            assert time.monotonic() < deadline, "Phoenix did not come up"
            time.sleep(0.5)
        else:
            return


def spans_of(url: str, trace_id: str, name: str, timeout_s: float = 30.0) -> list[dict[str, Any]]:
    """The spans that it keeps of a trace, once one of them is named `name`."""
    deadline = time.monotonic() + timeout_s
    body = json.dumps({"query": SPANS, "variables": {"trace": trace_id}}).encode()
    request = urllib.request.Request(f"{url}/graphql", body, {"content-type": "application/json"})
    spans: list[dict[str, Any]] = []
    while not any(span["name"] == name for span in spans):
        assert time.monotonic() < deadline, f"no span {name!r} among {spans}"
        time.sleep(0.3)
        with urllib.request.urlopen(request, timeout=10) as response:
            answer = json.load(response)
        trace = (answer.get("data") or {}).get("getTraceByOtelId")
        assert "errors" not in answer, answer["errors"]
        spans = [edge["node"] for edge in trace["spans"]["edges"]] if trace else []
    return spans
