"""Each value changes what it says, and what is no value is refused with a word on what to do."""

from __future__ import annotations

import importlib
import re
from typing import Any

import helm_python
import pytest
import yaml

from tests.support.chart import CHART, DEPLOY, Values, problems, render
from tests.unit.deploy.chart_values import BESIDE, HPA, NO_KEYS, OTHERS, ROUTES


def at(path: str, value: Any, base: Values = NO_KEYS) -> Values:
    """Values with one more, by its path with dots."""
    values = yaml.safe_load(yaml.safe_dump(base))
    place = values
    *folders, last = path.split(".")
    for folder in folders:
        place = place.setdefault(folder, {})
    place[last] = value
    return values


def defaults() -> dict[str, Any]:
    """Every value of values.yaml that is no mapping with keys of its own, by its path."""
    found: dict[str, Any] = {}

    def take(prefix: str, value: Any) -> None:
        if (
            isinstance(value, dict)
            and value
            and not prefix.endswith(("resources", "Labels", "Namespaces"))
        ):
            for key, each in value.items():
                take(f"{prefix}.{key}" if prefix else key, each)
        else:
            found[prefix] = value

    take("", yaml.safe_load((CHART / "values.yaml").read_text()))
    return found


# Held elsewhere: what it does shows only with another model, a Valkey or dashboards beside it.
ELSEWHERE = {"defaultModel", "valkey.embedded.enabled", "monitoring.dashboards"}


def beside(path: str) -> Values:
    """What is set where the value is tried; a switch is tried without what it switches on."""
    is_switch = path.endswith((".enabled", ".kind", ".type"))
    found = [
        key
        for key in BESIDE
        if path == key or (key.endswith(".") and path.startswith(key) and not is_switch)
    ]
    return NO_KEYS | BESIDE[max(found, key=len)] if found else NO_KEYS


def text_of(values: Values) -> str:
    manifests = render(values)
    texts = [yaml.dump(each, Dumper=yaml.CSafeDumper) for each in manifests]
    settings = [each.get("data", {}).get("meshserve.yaml", "") for each in manifests]
    return "\n".join([*texts, *settings])


def test_every_value_is_tried_here() -> None:
    assert set(defaults()) == OTHERS.keys() | ELSEWHERE


@pytest.mark.parametrize("path", OTHERS)
def test_a_value_changes_what_it_says(path: str) -> None:
    value, word = OTHERS[path]
    base = beside(path)
    before, after = text_of(base), text_of(at(path, value, base))
    if word.startswith("!"):
        before, after, word = after, before, word[1:]
    assert word in after
    assert word not in before


def test_a_value_of_one_model_stands_over_the_default() -> None:
    models = {"big": {"source": "org/big", "engine": {"replicas": 5}}, "small": {"source": "org/s"}}
    replicas = {
        each["metadata"]["name"]: each["spec"]["replicas"]
        for each in render(at("engineDefaults.replicas", 3, at("models", models)))
        if each["kind"] == "Deployment"
    }
    assert replicas["demo-meshserve-engine-big"] == 5
    assert replicas["demo-meshserve-engine-small"] == 3


def test_a_model_of_ones_own_takes_the_place_of_the_demo_model() -> None:
    assert "smollm2" in text_of(NO_KEYS)
    assert "smollm2" not in text_of(at("models", {"own": {"source": "org/own"}}))


def test_without_the_embedded_valkey_there_is_none() -> None:
    values = at("valkey", {"url": "redis://valkey:6379", "embedded": {"enabled": False}})
    assert "StatefulSet" in text_of(NO_KEYS)
    assert "StatefulSet" not in text_of(values)


def test_dashboards_are_those_of_grafana() -> None:
    values = at("monitoring.dashboards", True)
    boards = {
        name
        for each in render(values)
        if each["metadata"]["labels"].get("grafana_dashboard")
        for name in each["data"]
    }
    assert boards == {each.name for each in (DEPLOY / "grafana/dashboards").glob("*.json")}


def test_every_value_says_what_it_is() -> None:
    lines = (CHART / "values.yaml").read_text().splitlines()
    silent = [
        line
        for before, line in zip(["", *lines], lines, strict=False)
        if re.match(r" *[a-zA-Z0-9-]+:", line)
        and not before.strip().startswith("#")
        and not _is_section(line, lines)
        and not _is_amount(line)
    ]
    assert silent == []


def _is_section(line: str, lines: list[str]) -> bool:
    """A mapping whose keys follow, each with a word of its own."""
    return line.endswith(":") and lines[lines.index(line) + 1].strip().startswith("#")


def _is_amount(line: str) -> bool:
    return line.strip().startswith(("requests:", "limits:", "kubernetes.io/", "grafana_dashboard:"))


def test_schema_and_page_are_what_the_generator_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(DEPLOY / "helm")
    schema_text = importlib.import_module("values_schema").schema_text()
    page_text = importlib.import_module("values_page").page_text()
    assert (CHART / "values.schema.json").read_text() == schema_text, "run `make docs`"
    page = (DEPLOY.parent / "docs/helm-values.md").read_text()
    assert page == page_text, "run `make docs`"
    described = set(re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE))
    assert set(defaults()) <= described


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("gatway", {}, "additional properties 'gatway' not allowed"),
        ("gateway.replcas", 2, "'replcas' not allowed"),
        ("gateway.replicas", "two", "want integer"),
        ("gateway.service.type", "Loadbalancer", "'LoadBalancer'"),
        ("models.other", {}, "missing property 'source'"),
        ("models.other", {"source": "a", "dtyp": "auto"}, "'dtyp' not allowed"),
        ("models.other", {"source": "a", "engine_target": "b"}, "'engine_target' not allowed"),
        ("engineDefaults.settings", {"block_tokens": 7}, "block_tokens"),
        ("engineDefaults.settings", {"device": "cpu"}, "'device' not allowed"),
        ("settings.gateway", {"listen": "0.0.0.0:1"}, "'listen' not allowed"),
        ("settings.gateway", {"rate_limit": {"brust": 2}}, "'brust' not allowed"),
        ("valkey.url", "redis://:word@valkey:6379", "does not match pattern"),
    ],
)
def test_what_no_value_may_be_is_refused_with_its_place(path: str, value: Any, words: str) -> None:
    with pytest.raises(helm_python.HelmError) as error:
        render(at(path, value))
    assert words in str(error.value)
    assert path.split(".")[0] in str(error.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "gateway.auth.existingSecret is empty"),
        (at("defaultModel", "bert"), '"bert", which is not among models'),
        (
            at("models", {"a": {"source": "a", "sharesEngineOf": "bert"}}),
            'models.a.sharesEngineOf is "bert", which is not among models',
        ),
        (
            at(
                "models",
                {
                    "a": {"source": "a", "sharesEngineOf": "b"},
                    "b": {"source": "b", "sharesEngineOf": "c"},
                    "c": {"source": "c"},
                },
            ),
            "b has no engines itself",
        ),
        (
            at(
                "models",
                {
                    "a": {"source": "a", "sharesEngineOf": "b", "engine": {"replicas": 2}},
                    "b": {"source": "b"},
                },
            ),
            "it has no engines of its own",
        ),
        (
            at("models", {"a.b": {"source": "x"}, "a-b": {"source": "x"}}),
            'would both be called "a-b"',
        ),
        (at("engineDefaults.autoscaling", {"minReplicas": 9}), "minReplicas is above maxReplicas"),
        (at("engineDefaults.autoscaling", HPA | {"minReplicas": 0}), "an HPA leaves one engine"),
        (
            at(
                "engineDefaults.autoscaling",
                HPA | {"waitingSequences": None, "kvCachePercent": None},
            ),
            "no metric to go by",
        ),
        (at("engineDefaults.maxSurge", 0), "no engine could ever be replaced"),
        (at("tls.enabled", True), "tls.secrets.gateway is empty"),
        (
            at("tls", {"enabled": True, "certManager": {"enabled": True}}),
            "tls.certManager.issuerRef is empty",
        ),
        (
            at("gateway.gatewayApi", {"enabled": True, "httpHostnames": ["a.example"]}),
            "set grpcHostnames too",
        ),
        (
            at("gateway.gatewayApi", ROUTES | {"httpHostnames": ["b.example"]}),
            "b.example is among grpcHostnames and httpHostnames",
        ),
        (at("valkey.embedded.enabled", False), "set url or existingSecret"),
    ],
)
def test_values_that_contradict_each_other_are_refused_with_the_way_out(
    values: Values, words: str
) -> None:
    with pytest.raises(helm_python.HelmError) as error:
        render(values)
    assert words in str(error.value)


def test_the_values_in_the_documentation_are_values() -> None:
    pages = [DEPLOY.parent / "docs" / name for name in ("kubernetes.md", "sizing.md")]
    page = "\n".join(each.read_text() for each in pages)
    texts = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    found = [each for text in texts for each in yaml.safe_load_all(text)]
    values = [each for each in found if "apiVersion" not in each]
    assert len(values) >= 6
    for manifest in found:
        if manifest not in values:
            assert problems(manifest) == []
    for each in values:
        assert render(NO_KEYS | each)
    described = (DEPLOY.parent / "docs/helm-values.md").read_text()
    for key in re.findall(r"--set ([\w.]+)=", page):
        assert f"| `{key}` |" in described
