"""An exemplar leads from a latency of the gateway to the trace of a request that took so long."""

from __future__ import annotations

import urllib.request

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families

from tests.support.mesh import Mesh
from tests.support.otlp import ReceivedSpan, Receiver

NAMES = ("request_duration", "time_to_first_token", "time_per_output_token")


def exemplars(mesh: Mesh, name: str) -> dict[str, float]:
    """The values of a histogram's exemplars, by their traces."""
    request = urllib.request.Request(
        f"http://127.0.0.1:{mesh.metrics_ports['gateway']}/metrics",
        headers={"Accept": "application/openmetrics-text; version=1.0.0"},
    )
    with urllib.request.urlopen(request, timeout=5) as response:
        assert response.headers["Content-Type"].startswith("application/openmetrics-text")
        text = response.read().decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if family.name == f"meshserve_gateway_{name}_seconds" and sample.exemplar:
                assert sample.exemplar.value <= float(sample.labels["le"])
                assert set(sample.exemplar.labels) == {"trace_id"}
                found[sample.exemplar.labels["trace_id"]] = sample.exemplar.value
    return found


def _is_request(span: ReceivedSpan) -> bool:
    return "gen_ai.operation.name" in span.attributes


@pytest.mark.parametrize("name", NAMES)
def test_an_exemplar_names_a_trace_that_was_sent(mesh: Mesh, otlp: Receiver, name: str) -> None:
    with mesh.client() as client:
        client.generate("Count to ten.", max_tokens=4, ignore_eos=True, seed=1)
    found = exemplars(mesh, name)
    assert found
    for trace_id in found:
        spans = otlp.wait_for(trace_id, lambda spans: any(map(_is_request, spans)))
        (request,) = filter(_is_request, spans)
        if name == "request_duration":
            assert found[trace_id] == pytest.approx(
                (request.end_ns - request.start_ns) / 1e9, abs=0.05
            )


def test_a_request_that_is_not_sampled_leaves_no_exemplar(mesh: Mesh) -> None:
    trace = "0123456789abcdef0123456789abcdef"
    with mesh.client(metadata={"traceparent": f"00-{trace}-0123456789abcdef-00"}) as client:
        client.generate("Count to ten.", max_tokens=4, ignore_eos=True, seed=2)
    assert all(trace not in exemplars(mesh, name) for name in NAMES)


def test_who_does_not_ask_for_exemplars_gets_none(mesh: Mesh) -> None:
    assert "trace_id" not in mesh.metrics("gateway")
