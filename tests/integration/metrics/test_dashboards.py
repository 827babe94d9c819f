"""The dashboards are what their code says, and ask for nothing that the mesh does not declare."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.runtime.telemetry.metrics import METRICS

DEPLOY = Path(__file__).parents[3] / "deploy"
DASHBOARDS = sorted((DEPLOY / "grafana" / "dashboards").glob("*.json"))
RULES = sorted((DEPLOY / "prometheus" / "rules").glob("*.yml"))
SERIES = {"counter": ("_total",), "gauge": ("",), "histogram": ("_bucket", "_sum", "_count")}
# What Prometheus itself adds to what it scrapes.
TARGET_LABELS = {"job", "instance"}
NAME = re.compile(r"\b((?:model:)?meshserve[\w:]+)(?:\{([^}]*)\})?")


def panels(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text())["panels"]
    return found


def rules() -> list[dict[str, Any]]:
    documents = [yaml.safe_load(path.read_text()) for path in RULES]
    return [rule for each in documents for group in each["groups"] for rule in group["rules"]]


def declared() -> dict[str, set[str]]:
    """The labels of every series, by its name, recorded ones included."""
    series = {
        row.name + suffix: {*row.labels, *TARGET_LABELS, *(["le"] if suffix == "_bucket" else [])}
        for row in METRICS
        for suffix in SERIES[row.kind]
    }
    recorded = {rule["record"]: {"model"} for rule in rules() if "record" in rule}
    return series | recorded


def expressions() -> list[str]:
    dashboards = [json.loads(path.read_text()) for path in DASHBOARDS]
    targets = [
        target["expr"]
        for board in dashboards
        for panel in board["panels"]
        for target in panel.get("targets", ())
    ]
    variables = [
        str(variable.get("query", ""))
        for board in dashboards
        for variable in board["templating"]["list"]
    ]
    return targets + variables + [rule["expr"] for rule in rules()]


def test_the_files_are_what_the_code_writes(tmp_path: Path) -> None:
    generate = DEPLOY / "grafana" / "generate.py"
    subprocess.run([sys.executable, str(generate), "--into", str(tmp_path)], check=True)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in DASHBOARDS}


def test_dashboards_and_rules_ask_for_declared_metrics_by_declared_labels() -> None:
    known = declared()
    found = [match for each in expressions() for match in NAME.findall(each)]
    assert len(found) > 100
    for name, matchers in found:
        assert name in known, name
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        assert labels <= known[name], f"{name}: {labels - known[name]}"


def test_every_metric_is_shown_somewhere() -> None:
    text = "\n".join(path.read_text() for path in DASHBOARDS)
    assert [row.name for row in METRICS if row.name not in text] == []


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_panels_say_what_they_show_and_do_not_overlap(path: Path) -> None:
    found = [panel for panel in panels(path) if panel["type"] != "row"]
    for panel in found:
        assert panel["title"], panel["id"]
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
    for one, other in itertools.combinations(found, 2):
        a, b = one["gridPos"], other["gridPos"]
        beside = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        below = a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
        assert beside or below, (one["title"], other["title"])
        assert one["id"] != other["id"]
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in found)


def test_grafana_finds_its_data_sources_and_an_exemplar_its_trace() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    sources = yaml.safe_load((provisioning / "datasources" / "datasources.yml").read_text())
    by_uid = {source["uid"]: source for source in sources["datasources"]}
    (link,) = by_uid["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert (link["name"], by_uid[link["datasourceUid"]]["type"]) == ("trace_id", "jaeger")
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    for uid, service in (("prometheus", "prometheus"), ("jaeger", "jaeger")):
        assert f"//{service}:" in by_uid[uid]["url"]
        assert service in compose
    providers = yaml.safe_load((provisioning / "dashboards" / "dashboards.yml").read_text())
    (provider,) = providers["providers"]
    assert f"./grafana/dashboards:{provider['options']['path']}:ro" in compose["grafana"]["volumes"]
