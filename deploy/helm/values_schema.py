"""What the values of the chart may be: the text of meshserve/values.schema.json.

The parts that are settings of the mesh come from the code that reads these settings, so that a key
which a service would refuse is refused before anything is installed.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import BaseModel

from services.runtime.settings import (
    CacheSettings,
    EngineSettings,
    GatewaySettings,
    ModelSettings,
    SafetySettings,
    TelemetrySettings,
    TokenizerSettings,
)

Schema = dict[str, Any]

# What the chart says itself, from other values.
OWN_KEYS = ("listen", "metrics_listen", "http_listen", "target", "tls")

TEXT: Schema = {"type": "string"}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
POSITIVE: Schema = {"type": "integer", "minimum": 1}
PERCENT: Schema = {"type": "integer", "minimum": 1, "maximum": 100}
PORT: Schema = {"type": "integer", "minimum": 1, "maximum": 65535}
LABELS: Schema = {"type": "object", "additionalProperties": TEXT}
# What Kubernetes checks itself.
ANY_OBJECT: Schema = {"type": "object"}
OBJECTS: Schema = {"type": "array", "items": {"type": "object"}}
TEXTS: Schema = {"type": "array", "items": TEXT}
VARIABLES: Schema = {
    "type": "object",
    "propertyNames": {"pattern": "^[A-Za-z_][A-Za-z0-9_]*$"},
    "additionalProperties": {"type": ["string", "number", "boolean"]},
}
QUANTITY: Schema = {"type": "string", "pattern": "^[0-9.]+([EPTGMk]i?|m)?$"}
NAME: Schema = {"type": "string", "pattern": "^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$"}


def fields(**properties: Schema) -> Schema:
    """An object with these keys and no others."""
    return {"type": "object", "properties": properties, "additionalProperties": False}


def one_of(*values: str) -> Schema:
    """One of some texts."""
    return {"type": "string", "enum": list(values)}


def or_null(schema: Schema) -> Schema:
    """What the schema says, or null."""
    return {"anyOf": [schema, {"type": "null"}]}


def at_most(limits: Schema = QUANTITY) -> Schema:
    """Requests and limits of a container."""
    amounts = {"type": "object", "additionalProperties": {"anyOf": [limits, {"type": "number"}]}}
    return fields(requests=amounts, limits=amounts)


class SettingsSchemas:
    """Schemas of settings, and of what they refer to."""

    def __init__(self) -> None:
        self.definitions: dict[str, Schema] = {}

    def of(self, model: type[BaseModel], *left_out: str) -> Schema:
        """Keys of a section; none is required, since the chart lays its own over them."""
        schema = model.model_json_schema(ref_template="#/definitions/{model}")
        for name, definition in schema.pop("$defs", {}).items():
            self.definitions[name] = _without_noise(definition)
        properties = {
            name: _without_noise(each)
            for name, each in schema["properties"].items()
            if name not in left_out
        }
        return {"type": "object", "properties": properties, "additionalProperties": False}


def _without_noise(schema: Any) -> Any:
    """Without what says nothing about what is allowed here."""
    if isinstance(schema, dict):
        return {
            key: {name: _without_noise(each) for name, each in value.items()}
            if key == "properties"
            else _without_noise(value)
            for key, value in schema.items()
            if key not in ("title", "format", "default", "description")
        }
    if isinstance(schema, list):
        return [_without_noise(each) for each in schema]
    return schema


def engine(settings: SettingsSchemas) -> Schema:
    """`engineDefaults`, and `engine` of a model."""
    return fields(
        device=one_of("cpu", "cuda"),
        replicas=COUNT,
        gpus=POSITIVE,
        settings=settings.of(EngineSettings, *OWN_KEYS, "model", "device"),
        resources=at_most(),
        nodeSelector=LABELS,
        tolerations=OBJECTS,
        affinity=ANY_OBJECT,
        runtimeClassName=TEXT,
        priorityClassName=TEXT,
        maxSurge=COUNT,
        maxUnavailable=COUNT,
        startupSeconds=POSITIVE,
        autoscaling=fields(
            kind=one_of("none", "hpa", "keda"),
            minReplicas=COUNT,
            maxReplicas=POSITIVE,
            waitingSequences=or_null(POSITIVE),
            kvCachePercent=or_null(PERCENT),
            timeToFirstTokenSeconds=or_null({"type": "number", "exclusiveMinimum": 0}),
            cpuPercent=or_null(PERCENT),
            scaleDownSeconds={"type": "integer", "minimum": 0, "maximum": 3600},
            idleSeconds=COUNT,
            activationSeconds=POSITIVE,
        ),
        multiNode=fields(enabled=BOOLEAN, size={"type": "integer", "minimum": 2}, workerArgs=TEXTS),
    )


def service(**more: Schema) -> Schema:
    """A service that is scaled by its processors."""
    return fields(
        replicas=COUNT,
        resources=at_most(),
        preStopSeconds=COUNT,
        nodeSelector=LABELS,
        tolerations=OBJECTS,
        affinity=ANY_OBJECT,
        priorityClassName=TEXT,
        autoscaling=fields(
            enabled=BOOLEAN, minReplicas=POSITIVE, maxReplicas=POSITIVE, cpuPercent=PERCENT
        ),
        **more,
    )


def gateway() -> Schema:
    """The gateway, and how callers reach it."""
    return service(
        service=fields(
            type=one_of("ClusterIP", "LoadBalancer", "NodePort"),
            annotations=LABELS,
            grpcPort=PORT,
            httpPort=PORT,
            loadBalancerSourceRanges=TEXTS,
        ),
        auth=fields(mode=one_of("required", "off"), existingSecret=NAME, secretKey=TEXT),
        ingress=fields(
            enabled=BOOLEAN, className=TEXT, annotations=LABELS, host=TEXT, tlsSecret=NAME
        ),
        gatewayApi=fields(
            enabled=BOOLEAN, parentRefs=OBJECTS, grpcHostnames=TEXTS, httpHostnames=TEXTS
        ),
    )


def model(settings: SettingsSchemas) -> Schema:
    """An entry of `models`."""
    schema = settings.of(ModelSettings, "engine_target", "activation_timeout_s")
    schema["properties"]["engine"] = {"$ref": "#/definitions/engine"}
    schema["properties"]["sharesEngineOf"] = TEXT
    return schema | {"required": ["source"]}


def values_schema() -> Schema:
    """All values."""
    settings = SettingsSchemas()
    properties = {
        "fullnameOverride": NAME,
        "image": fields(
            registry=TEXT,
            prefix=TEXT,
            tag=TEXT,
            pullPolicy=one_of("Always", "IfNotPresent", "Never"),
            pullSecrets=TEXTS,
        ),
        "models": {"type": "object", "additionalProperties": model(settings)},
        "defaultModel": TEXT,
        "engineDefaults": {"$ref": "#/definitions/engine"},
        "storage": fields(
            type=one_of("emptyDir", "pvc"),
            sizeLimit=QUANTITY,
            existingClaim=NAME,
            storageClassName=TEXT,
            size=QUANTITY,
            accessModes={"type": "array", "items": TEXT, "minItems": 1},
        ),
        "pull": fields(enabled=BOOLEAN, env=VARIABLES, existingSecret=NAME, resources=at_most()),
        "gateway": gateway(),
        "tokenizer": service(),
        "cache": service(),
        "safety": service(
            policies={
                "type": "object",
                "propertyNames": {"pattern": "^[A-Za-z0-9_-]+$"},
                "additionalProperties": ANY_OBJECT,
            }
        ),
        "valkey": fields(
            url={
                "type": "string",
                "pattern": "^$|^(redis|rediss|redis\\+cluster)://([^:@/]+@)?[^@]*$",
            },
            existingSecret=NAME,
            secretKey=TEXT,
            embedded=fields(enabled=BOOLEAN, image=TEXT, maxMemory=TEXT, resources=at_most()),
        ),
        "tls": fields(
            enabled=BOOLEAN,
            mutual=BOOLEAN,
            certManager=fields(
                enabled=BOOLEAN,
                issuerRef=fields(name=TEXT, kind=TEXT, group=TEXT),
                gatewayNames=TEXTS,
            ),
            secrets=fields(gateway=NAME, tokenizer=NAME, engine=NAME, cache=NAME, safety=NAME),
        ),
        "settings": fields(
            gateway=settings.of(GatewaySettings, *OWN_KEYS, "auth"),
            tokenizer=settings.of(TokenizerSettings, *OWN_KEYS),
            engine=settings.of(EngineSettings, *OWN_KEYS, "model", "device"),
            cache=settings.of(CacheSettings, *OWN_KEYS),
            safety=settings.of(SafetySettings, *OWN_KEYS, "policies"),
            telemetry=settings.of(TelemetrySettings),
        ),
        "listenHost": {"type": "string", "minLength": 1},
        "networkPolicy": fields(
            enabled=BOOLEAN,
            callerNamespaces=LABELS,
            metricsNamespaces=LABELS,
            collectorNamespaces=LABELS,
            valkeyPort=PORT,
            pullCidrs=TEXTS,
            pullPorts={"type": "array", "items": PORT},
        ),
        "podDisruptionBudget": fields(enabled=BOOLEAN, maxUnavailable=POSITIVE),
        "spreadOver": TEXTS,
        "monitoring": fields(
            serviceMonitor=BOOLEAN,
            interval={"type": "string", "pattern": "^[0-9]+(ms|s|m)$"},
            labels=LABELS,
            rules=BOOLEAN,
            dashboards=BOOLEAN,
            dashboardLabels=LABELS,
            prometheusUrl={"type": "string", "pattern": "^https?://"},
        ),
        "serviceAccount": fields(annotations=LABELS),
        "podLabels": LABELS,
        "podAnnotations": LABELS,
        # What Helm gives to charts that are part of others.
        "global": ANY_OBJECT,
    }
    definitions = {"engine": engine(settings), **settings.definitions}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        **fields(**properties),
        "definitions": {
            name: definitions[name] for name in sorted(_referred_to(properties, definitions))
        },
    }


def _referred_to(schema: Any, definitions: dict[str, Schema]) -> set[str]:
    """Names of definitions that a schema needs, by whatever way."""
    found: set[str] = set()
    waiting = [schema]
    while waiting:
        text = json.dumps(waiting.pop())
        new = set(re.findall(r'"#/definitions/(\w+)"', text)) - found
        found |= new
        waiting += [definitions[name] for name in new]
    return found


def schema_text() -> str:
    """The text of values.schema.json."""
    return json.dumps(values_schema(), indent=2, ensure_ascii=False) + "\n"
