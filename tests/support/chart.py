"""The Helm chart, rendered by Helm's own engine, and the schemas of what it renders."""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import helm_python
import yaml
from jsonschema import Draft202012Validator
from pydantic import BaseModel
from referencing import Registry
from referencing.jsonschema import DRAFT202012

DEPLOY = Path(__file__).parents[2] / "deploy"
CHART = DEPLOY / "helm/meshserve"
EXAMPLES = DEPLOY / "helm/examples"
RELEASE, NAMESPACE = "demo", "inference"
OLDEST, NEWEST = "1.30.0", "1.37.0"

Manifest = dict[str, Any]
Values = dict[str, Any]


def example(name: str) -> Values:
    """The values of a file in deploy/helm/examples."""
    values = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    assert isinstance(values, dict)
    return values


def render(values: Values) -> list[Manifest]:
    """All manifests. Raises helm_python.HelmError for values that the chart refuses."""
    return list(_rendered(json.dumps(values)))


def of_kind(manifests: list[Manifest], *kinds: str) -> list[Manifest]:
    """Those of some kinds."""
    return [manifest for manifest in manifests if manifest["kind"] in kinds]


def the(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    """The one of a kind whose name is that of the release and `name`."""
    full = f"{RELEASE}-meshserve-{name}" if name else f"{RELEASE}-meshserve"
    (found,) = (each for each in of_kind(manifests, kind) if each["metadata"]["name"] == full)
    return found


def pod_templates(manifests: list[Manifest]) -> Iterator[tuple[str, Manifest]]:
    """The pod template of every workload, each with a name for it."""
    for manifest in manifests:
        name = f"{manifest['kind']}/{manifest['metadata']['name']}"
        if manifest["kind"] in ("Deployment", "StatefulSet"):
            yield name, manifest["spec"]["template"]
        elif manifest["kind"] == "LeaderWorkerSet":
            group = manifest["spec"]["leaderWorkerTemplate"]
            yield f"{name} leader", group["leaderTemplate"]
            yield f"{name} worker", group["workerTemplate"]


def problems(manifest: Manifest, version: str = NEWEST) -> list[str]:
    """What the schema of its kind says against a manifest."""
    key = (manifest["apiVersion"], manifest["kind"])
    if key in CUSTOM:
        return _problems_of_model(_model(key), manifest)
    if key in DESCRIBED:
        found = _problems(Draft202012Validator(DESCRIBED[key]), manifest)
        return found + [
            problem
            for _, template in pod_templates([manifest])
            for problem in _problems(_validator("podtemplatespec-v1", version), template)
        ]
    group, _, api_version = manifest["apiVersion"].rpartition("/")
    name = "-".join(filter(None, (manifest["kind"].lower(), group.split(".")[0], api_version)))
    return _problems(_validator(name, version), manifest)


@functools.cache
def _rendered(values: str) -> tuple[Manifest, ...]:
    with helm_python.Chart.load(CHART) as chart:
        chart.validate_schema(chart.merge_values(json.loads(values)))
        texts = chart.render(json.loads(values), name=RELEASE, namespace=NAMESPACE)
    return tuple(
        manifest
        for path, text in sorted(texts.items())
        if path.endswith(".yaml")
        for manifest in yaml.load_all(text, yaml.CSafeLoader)
        if manifest is not None
    )


def _problems(validator: Draft202012Validator, manifest: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in validator.iter_errors(manifest)]


@functools.cache
def _registry(version: str) -> Registry[Any]:
    path = f"kubernetes-json-schema/v{version}-local-strict/_definitions.json"
    definitions = json.loads((files("kubernetes_validate") / path).read_text())
    resource = DRAFT202012.create_resource(definitions)
    return Registry().with_resource("_definitions.json", resource).crawl()


@functools.cache
def _validator(name: str, version: str) -> Draft202012Validator:
    """Strict: keys that Kubernetes does not know are errors."""
    path = f"kubernetes-json-schema/v{version}-local-strict/{name}.json"
    schema = json.loads((files("kubernetes_validate") / path).read_text())
    return Draft202012Validator(schema, registry=_registry(version))


def _problems_of_model(model: type[BaseModel], manifest: Manifest) -> list[str]:
    """Models made from a CRD take keys that they do not know, and lose them."""
    try:
        kept = model.model_validate(manifest).model_dump(mode="json", by_alias=True)
    except ValueError as error:
        return [str(error)]
    return list(_lost(manifest, kept, "$"))


def _lost(before: Any, after: Any, path: str) -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key, value in before.items():
            if key not in after:
                yield f"{path}.{key}: unknown"
            else:
                yield from _lost(value, after[key], f"{path}.{key}")
    elif isinstance(before, list) and isinstance(after, list):
        for number, (one, other) in enumerate(zip(before, after, strict=True)):
            yield from _lost(one, other, f"{path}[{number}]")


CUSTOM = {
    ("cert-manager.io/v1", "Certificate"): "cloudcoil.models.cert_manager.v1",
    ("cert-manager.io/v1", "Issuer"): "cloudcoil.models.cert_manager.v1",
    ("keda.sh/v1alpha1", "ScaledObject"): "cloudcoil.models.keda.v1alpha1",
    ("monitoring.coreos.com/v1", "ServiceMonitor"): "cloudcoil.models.prometheus_operator.v1",
    ("monitoring.coreos.com/v1", "PrometheusRule"): "cloudcoil.models.prometheus_operator.v1",
}


@functools.cache
def _model(key: tuple[str, str]) -> type[BaseModel]:
    # Imported where they are needed: they take their time.
    model: type[BaseModel] = getattr(importlib.import_module(CUSTOM[key]), key[1])
    return model


def _strict(required: str, **properties: Any) -> Manifest:
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


_TEXT = {"type": "string"}
_COUNT = {"type": ["integer", "string"]}
_METADATA = _strict("name", name=_TEXT, labels={"type": "object", "additionalProperties": _TEXT})


def _described(spec: Manifest) -> Manifest:
    return _strict(
        "apiVersion kind metadata spec", apiVersion=_TEXT, kind=_TEXT, metadata=_METADATA, spec=spec
    )


def _route(match: Manifest) -> Manifest:
    parent = _strict("name", name=_TEXT, namespace=_TEXT, sectionName=_TEXT)
    backend = _strict("name port", name=_TEXT, port={"type": "integer"})
    rule = _strict(
        "",
        backendRefs={"type": "array", "items": backend},
        matches={"type": "array", "items": match},
    )
    return _described(
        _strict(
            "parentRefs rules",
            parentRefs={"type": "array", "items": parent, "minItems": 1},
            hostnames={"type": "array", "items": _TEXT},
            rules={"type": "array", "items": rule},
        )
    )


# No package has schemas of these: the fields that the chart uses, after the CRDs of
# kubernetes-sigs/lws (config/crd/bases/leaderworkerset.x-k8s.io_leaderworkersets.yaml, v1) and of
# Gateway API 1.1 (GRPCRoute and HTTPRoute of the standard channel). Pods within are held against
# their own schema.
DESCRIBED: dict[tuple[str, str], Manifest] = {
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): _described(
        _strict(
            "leaderWorkerTemplate",
            replicas={"type": "integer", "minimum": 0},
            rolloutStrategy=_strict(
                "type",
                type={"enum": ["RollingUpdate"]},
                rollingUpdateConfiguration=_strict("", maxSurge=_COUNT, maxUnavailable=_COUNT),
            ),
            leaderWorkerTemplate=_strict(
                "workerTemplate size",
                size={"type": "integer", "minimum": 1},
                restartPolicy={"enum": ["RecreateGroupOnPodRestart", "None"]},
                leaderTemplate={"type": "object"},
                workerTemplate={"type": "object"},
            ),
        )
    ),
    ("gateway.networking.k8s.io/v1", "GRPCRoute"): _route(
        _strict("method", method=_strict("", service=_TEXT, method=_TEXT, type=_TEXT))
    ),
    ("gateway.networking.k8s.io/v1", "HTTPRoute"): _route({"type": "object"}),
}
