"""A real Prometheus scrapes the mesh: all metrics arrive, all dashboards show something."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path
from typing import Any

import pytest

from services.runtime.telemetry.metrics import METRICS, MetricDeclaration
from tests.integration.metrics.conftest import Watched

pytestmark = pytest.mark.slow

DASHBOARDS = sorted((Path(__file__).parents[3] / "deploy/grafana/dashboards").glob("*.json"))
# What a healthy mesh on a CPU has nothing to tell of.
NEVER_HERE = {
    "meshserve_engine_gpu_memory_used_bytes": "there is no GPU",
    "meshserve_engine_gpu_memory_bytes": "there is no GPU",
    "meshserve_engine_gpu_utilization": "there is no GPU",
    "meshserve_certificate_expiry_seconds": "there is no TLS",
    "meshserve_engine_encoded_inputs": "no encoder is served",
    "meshserve_gateway_inputs": "no encoder is served",
    "meshserve_gateway_cached_inputs": "no encoder is served",
    "meshserve_gateway_hosting_calls": "no operator loads or unloads anything",
    "meshserve_gateway_requests_awaiting_engine": "no model's engines are started on demand",
}
WINDOW = {"$__rate_interval": "10s", "$__range": "5m"}


def series_of(row: MetricDeclaration) -> str:
    return row.name + {"counter": "_total", "gauge": "", "histogram": "_count"}[row.kind]


def test_every_metric_of_the_table_has_samples(watched: Watched) -> None:
    for row in METRICS:
        found = watched.prometheus.last(series_of(row))
        if row.name in NEVER_HERE:
            assert not found, f"{row.name} does come: {NEVER_HERE[row.name]}?"
        else:
            assert found, row.name
    # Histograms that nobody observed would be no proof.
    for row in METRICS:
        if row.kind == "histogram":
            assert watched.prometheus.last(f"{series_of(row)} > 0"), row.name


def test_what_the_traffic_must_have_counted_was_counted(watched: Watched) -> None:
    for expression in (
        'meshserve_gateway_requests_total{tenant="acme", reason=""} > 0',
        'meshserve_gateway_requests_total{tenant="limited", reason="RATE_LIMITED"} > 0',
        'meshserve_gateway_denials_total{reason="RATE_LIMITED"} > 0',
        'meshserve_gateway_denials_total{reason="API_KEY_INVALID"} > 0',
        'meshserve_gateway_cost_total{tenant="acme", currency="EUR"} > 0',
        'meshserve_gateway_cached_prompt_tokens_total{tenant="acme"} > 0',
        'meshserve_gateway_cached_completion_tokens_total{tenant="acme"} > 0',
        "meshserve_engine_preemptions_total > 0",
        'meshserve_http_server_calls_total{method="GET", route="/api/models", status="200"} > 0',
        'meshserve_http_server_event_streams{route="/api/requests"} == 1',
        "meshserve_gateway_watchers == 1",
        'meshserve_file_reloads_total{what="api_keys", outcome="taken"} > 0',
        'meshserve_rpc_client_replicas{peer="engine", state="serving"} == 1',
        "meshserve_engine_drafted_tokens_total > 0",
        'meshserve_process_cpu_seconds_total{job="engine", process="core"} > 0',
        'meshserve_engine_info{model="smollm2-135m", dtype="float32", device="cpu"} == 1',
    ):
        assert watched.prometheus.last(expression), expression


def test_cost_is_what_the_tokens_come_to_at_their_prices(watched: Watched) -> None:
    def total(name: str) -> float:
        return watched.mesh.metric("gateway", f"meshserve_gateway_{name}_total")

    cached = total("cached_prompt_tokens")
    expected = (
        100 * (total("prompt_tokens") - cached) + 10 * cached + 400 * total("completion_tokens")
    )
    assert total("cost") == pytest.approx(expected / 1e6)


def queries(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """The panels' titles and targets of a dashboard."""
    return [
        (panel["title"], target)
        for panel in json.loads(path.read_text())["panels"]
        for target in panel.get("targets", ())
    ]


def filled_in(expression: str) -> str:
    """An expression as Grafana sends it while nothing is filtered."""
    for name, value in WINDOW.items():
        expression = expression.replace(name, value)
    return re.sub(r"\$\w+", ".*", expression)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_of_a_dashboard_returns_data(watched: Watched, path: Path) -> None:
    empty = []
    for title, target in queries(path):
        expression = filled_in(target["expr"])
        points = [
            float(value)
            for series in watched.prometheus.last(expression, 300)
            for _, value in series["values"]
        ]
        expected = not any(name in expression for name in NEVER_HERE)
        if any(math.isfinite(point) for point in points) != expected:
            empty.append(f"{title}: {expression}")
    assert not empty, "\n".join(empty)


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_every_variable_of_a_dashboard_has_values_to_choose_from(
    watched: Watched, path: Path
) -> None:
    for variable in json.loads(path.read_text())["templating"]["list"]:
        if variable["type"] != "query":
            continue
        found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"])
        assert found, variable["query"]
        values = watched.prometheus.get(f"label/{found[2]}/values", match=filled_in(found[1]))
        assert values, variable["query"]


def test_exemplars_of_the_dashboards_lead_to_traces_that_were_sent(watched: Watched) -> None:
    shown = [
        (title, target["expr"])
        for path in DASHBOARDS
        for title, target in queries(path)
        if target.get("exemplar")
    ]
    assert len(shown) == 3
    for title, expression in shown:
        now = time.time()
        found = watched.prometheus.get(
            "query_exemplars", query=filled_in(expression), start=str(now - 300), end=str(now)
        )
        traces = {each["labels"]["trace_id"] for series in found for each in series["exemplars"]}
        assert traces, title
        for trace in traces:
            spans = watched.otlp.wait_for(trace, lambda spans: bool(spans))
            assert any(span.name.startswith(("chat", "text_completion")) for span in spans), title


def firing(watched: Watched) -> set[str]:
    return {
        alert["labels"]["alertname"]
        for alert in watched.prometheus.get("alerts")["alerts"]
        if alert["state"] == "firing"
    }


def test_no_alert_fires_for_a_healthy_mesh(watched: Watched) -> None:
    assert firing(watched) == set()


def test_an_alert_fires_when_the_core_of_an_engine_is_killed(watched: Watched) -> None:
    """Last, for the mesh is not healthy any more."""
    (core,) = watched.mesh.process("engine").children()
    core.kill()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if "MeshServeCoreRestarting" in firing(watched) and cores(watched) > 1:
            break
        time.sleep(0.5)
    assert "MeshServeCoreRestarting" in firing(watched)
    assert cores(watched) > 1, "the new core is not told of"


def cores(watched: Watched) -> int:
    """How many processes have been the core, one after another."""
    started = 'meshserve_process_start_time_seconds{process="core"}'
    series = watched.prometheus.last(started, 300)
    return len({value for each in series for _, value in each["values"]})
