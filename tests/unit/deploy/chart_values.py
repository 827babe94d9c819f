"""Every value of the chart: what to set beside it so that it shows, another value than the default,
and a word of what is rendered with that value alone (with "!" before it: without it alone)."""

from __future__ import annotations

from typing import Any

from tests.support.chart import Values

NO_AUTH = {"auth": {"mode": "off"}}
NO_KEYS: Values = {"gateway": NO_AUTH}
LIMITS = {"requests": {"cpu": "3"}, "limits": {"memory": "7Gi"}}
LABELS = {"team": "search"}
TAINT = [{"key": "team", "operator": "Exists"}]
SPREAD: Values = {
    "nodeAffinity": {
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "disk", "operator": "Exists"}]}]
        }
    }
}
CERTIFICATES = {
    "gateway": "gateway-tls",
    "tokenizer": "tokenizer-tls",
    "engine": "engine-tls",
    "cache": "cache-tls",
    "safety": "safety-tls",
}
ISSUER = {"certManager": {"issuerRef": {"name": "one"}}}
MADE = ISSUER["certManager"] | {"enabled": True}
ROUTES = {"enabled": True, "parentRefs": [{"name": "one"}], "grpcHostnames": ["b.example"]}
BALANCED = {"type": "LoadBalancer"}
HPA = {"kind": "hpa"}
KEDA = {"kind": "keda", "minReplicas": 0}

# What to set beside a value so that it has an effect.
BESIDE: dict[str, Values] = {
    "engineDefaults.gpus": {"engineDefaults": {"device": "cuda"}},
    "engineDefaults.multiNode.": {"engineDefaults": {"multiNode": {"enabled": True}}},
    "engineDefaults.autoscaling.idleSeconds": {"engineDefaults": {"autoscaling": KEDA}},
    "engineDefaults.autoscaling.activationSeconds": {"engineDefaults": {"autoscaling": KEDA}},
    "engineDefaults.autoscaling.": {"engineDefaults": {"autoscaling": HPA}},
    "storage.": {"storage": {"type": "pvc"}},
    "storage.type": {},
    "storage.sizeLimit": {},
    "gateway.autoscaling.": {"gateway": NO_AUTH | {"autoscaling": {"enabled": True}}},
    "gateway.ingress.": {"gateway": NO_AUTH | {"ingress": {"enabled": True, "host": "a.example"}}},
    "gateway.gatewayApi.": {"gateway": NO_AUTH | {"gatewayApi": ROUTES}},
    "gateway.service.loadBalancerSourceRanges": {
        "gateway": NO_AUTH | {"service": {"type": "LoadBalancer"}}
    },
    "gateway.auth.": {"gateway": {"auth": {"existingSecret": "keys"}}},
    "tokenizer.autoscaling.": {"tokenizer": {"autoscaling": {"enabled": True}}},
    "cache.autoscaling.": {"cache": {"autoscaling": {"enabled": True}}},
    "safety.autoscaling.": {"safety": {"autoscaling": {"enabled": True}}},
    "valkey.secretKey": {"valkey": {"existingSecret": "one"}},
    "valkey.embedded.enabled": {"valkey": {"url": ""}},
    "tls.": {"tls": {"enabled": True, "secrets": CERTIFICATES}},
    "tls.certManager.": {"tls": {"enabled": True, "certManager": MADE}},
    "tls.certManager.enabled": {"tls": {"enabled": True, "secrets": CERTIFICATES} | ISSUER},
    "tls.enabled": {"tls": {"secrets": CERTIFICATES}},
    "networkPolicy.collectorNamespaces": {
        "settings": {"telemetry": {"otlp_endpoint": "http://collector:4317"}}
    },
    "networkPolicy.valkeyPort": {"valkey": {"url": "redis://valkey:6380"}},
    "monitoring.interval": {"monitoring": {"serviceMonitor": True}},
    "monitoring.labels": {"monitoring": {"serviceMonitor": True}},
    "monitoring.dashboardLabels": {"monitoring": {"dashboards": True}},
    "monitoring.prometheusUrl": {"engineDefaults": {"autoscaling": KEDA}},
}

# A value other than the default, and a word that stands in what is rendered with it alone.
OTHERS: dict[str, tuple[Any, str]] = {
    "fullnameOverride": ("chatter", "name: chatter-gateway"),
    "image.registry": ("registry.example/", "image: registry.example/meshserve/gateway"),
    "image.prefix": ("mesh-", "image: mesh-gateway:"),
    "image.tag": ("9.9", "/gateway:9.9"),
    "image.pullPolicy": ("Always", "imagePullPolicy: Always"),
    "image.pullSecrets": (["regcred"], "- name: regcred"),
    "models": ({"other": {"source": "org/name"}}, "source: org/name"),
    "engineDefaults.device": ("cuda", "meshserve/engine-cuda"),
    "engineDefaults.replicas": (7, "replicas: 7"),
    "engineDefaults.gpus": (4, "nvidia.com/gpu: 4"),
    "engineDefaults.settings": ({"block_tokens": 64}, "MESHSERVE_ENGINE__BLOCK_TOKENS"),
    "engineDefaults.runtimeClassName": ("nvidia", "runtimeClassName: nvidia"),
    "engineDefaults.maxSurge": (3, "maxSurge: 3"),
    "engineDefaults.maxUnavailable": (2, "maxUnavailable: 2"),
    "engineDefaults.startupSeconds": (3600, "failureThreshold: 1800"),
    "engineDefaults.autoscaling.kind": ("hpa", "kind: HorizontalPodAutoscaler"),
    "engineDefaults.autoscaling.minReplicas": (3, "minReplicas: 3"),
    "engineDefaults.autoscaling.maxReplicas": (9, "maxReplicas: 9"),
    "engineDefaults.autoscaling.waitingSequences": (11, "averageValue: '11'"),
    "engineDefaults.autoscaling.kvCachePercent": (77, "averageValue: '77'"),
    "engineDefaults.autoscaling.timeToFirstTokenSeconds": (1.5, "value: '1.5'"),
    "engineDefaults.autoscaling.cpuPercent": (66, "averageUtilization: 66"),
    "engineDefaults.autoscaling.scaleDownSeconds": (55, "stabilizationWindowSeconds: 55"),
    "engineDefaults.autoscaling.idleSeconds": (44, "cooldownPeriod: 44"),
    "engineDefaults.autoscaling.activationSeconds": (33, "activation_timeout_s: 33"),
    "engineDefaults.multiNode.enabled": (True, "kind: LeaderWorkerSet"),
    "engineDefaults.multiNode.size": (5, "size: 5"),
    "engineDefaults.multiNode.workerArgs": (["--rank"], "- --rank"),
    "storage.type": ("pvc", "claimName: demo-meshserve-models"),
    "storage.sizeLimit": ("9Gi", "sizeLimit: 9Gi"),
    "storage.existingClaim": ("shelf", "claimName: shelf"),
    "storage.storageClassName": ("nfs", "storageClassName: nfs"),
    "storage.size": ("8Gi", "storage: 8Gi"),
    "storage.accessModes": (["ReadWriteOnce"], "- ReadWriteOnce"),
    "pull.enabled": (False, "!initContainers:"),
    "pull.env": ({"HF_ENDPOINT": "https://mirror"}, "name: HF_ENDPOINT"),
    "pull.existingSecret": ("hub", "name: hub"),
    "gateway.preStopSeconds": (17, "seconds: 17"),
    "gateway.service.type": ("NodePort", "type: NodePort"),
    "gateway.service.annotations": ({"cloud": "internal"}, "cloud: internal"),
    "gateway.service.grpcPort": (4430, "port: 4430"),
    "gateway.service.httpPort": (81, "port: 81"),
    "gateway.service.loadBalancerSourceRanges": (["10.1.0.0/16"], "- 10.1.0.0/16"),
    "gateway.auth.mode": ("off", 'mode: "off"'),
    "gateway.auth.existingSecret": ("digests", "secretName: digests"),
    "gateway.auth.secretKey": ("list", "keys_file: /etc/meshserve/keys/list"),
    "gateway.ingress.enabled": (True, "kind: Ingress"),
    "gateway.ingress.className": ("nginx", "ingressClassName: nginx"),
    "gateway.ingress.annotations": ({"of": "ingress"}, "of: ingress"),
    "gateway.ingress.host": ("b.example", "host: b.example"),
    "gateway.ingress.tlsSecret": ("cert", "secretName: cert"),
    "gateway.gatewayApi.enabled": (True, "kind: GRPCRoute"),
    "gateway.gatewayApi.parentRefs": ([{"name": "two"}], "name: two"),
    "gateway.gatewayApi.grpcHostnames": (["c.example"], "- c.example"),
    "gateway.gatewayApi.httpHostnames": (["d.example"], "kind: HTTPRoute"),
    "safety.policies": (
        {"strict": {"categories": {}}},
        "/etc/meshserve/policies/strict.yaml",
    ),
    "valkey.url": ("redis://elsewhere:6379", "url: redis://elsewhere:6379"),
    "valkey.existingSecret": ("valkey-url", "secretName: valkey-url"),
    "valkey.secretKey": ("address", "url_file: /etc/meshserve/valkey/address"),
    "valkey.embedded.image": ("mirror/valkey:8", "image: mirror/valkey:8"),
    "valkey.embedded.maxMemory": ("99mb", "- 99mb"),
    "tls.enabled": (True, "certificate: /etc/meshserve/tls/tls.crt"),
    "tls.mutual": (False, "!client_ca:"),
    "tls.certManager.enabled": (True, "kind: Certificate"),
    "tls.certManager.issuerRef": ({"name": "two"}, "name: two"),
    "tls.certManager.gatewayNames": (["llm.example"], "- llm.example"),
    "listenHost": ("[::]", "listen: '[::]:50051'"),
    "networkPolicy.enabled": (False, "!kind: NetworkPolicy"),
    "networkPolicy.callerNamespaces": (LABELS, "team: search"),
    "networkPolicy.metricsNamespaces": (LABELS, "team: search"),
    "networkPolicy.collectorNamespaces": (LABELS, "team: search"),
    "networkPolicy.valkeyPort": (6380, "port: 6380"),
    "networkPolicy.pullCidrs": (["10.2.0.0/16"], "cidr: 10.2.0.0/16"),
    "networkPolicy.pullPorts": ([8443], "port: 8443"),
    "podDisruptionBudget.enabled": (False, "!kind: PodDisruptionBudget"),
    "podDisruptionBudget.maxUnavailable": (4, "maxUnavailable: 4"),
    "spreadOver": (["rack"], "topologyKey: rack"),
    "monitoring.serviceMonitor": (True, "kind: ServiceMonitor"),
    "monitoring.interval": ("7s", "interval: 7s"),
    "monitoring.labels": (LABELS, "team: search"),
    "monitoring.rules": (True, "alert: MeshServeServiceDown"),
    "monitoring.dashboardLabels": (LABELS, "team: search"),
    "monitoring.prometheusUrl": ("http://prometheus:1", "serverAddress: http://prometheus:1"),
    "serviceAccount.annotations": ({"of": "account"}, "of: account"),
    "podLabels": (LABELS, "team: search"),
    "podAnnotations": ({"of": "pods"}, "of: pods"),
    "settings.gateway": ({"max_active_requests": 12}, "max_active_requests: 12"),
    "settings.tokenizer": ({"workers": 12}, "workers: 12"),
    "settings.engine": ({"max_running_sequences": 12}, "max_running_sequences: 12"),
    "settings.cache": ({"lease_s": 12}, "lease_s: 12"),
    "settings.safety": ({"workers": 12}, "workers: 12"),
    "settings.telemetry": ({"log_level": "debug"}, "log_level: debug"),
    **{
        f"{service}.{value}": other
        for service in ("engineDefaults", "gateway", "tokenizer", "cache", "safety")
        for value, other in {
            "nodeSelector": ({"disk": "ssd"}, "disk: ssd"),
            "tolerations": (TAINT, "key: team"),
            "affinity": (SPREAD, "nodeAffinity:"),
            "priorityClassName": ("urgent", "priorityClassName: urgent"),
        }.items()
    },
    **{
        f"{service}.{value}": other
        for service in ("gateway", "tokenizer", "cache", "safety")
        for value, other in {
            "replicas": (7, "replicas: 7"),
            "autoscaling.enabled": (True, "kind: HorizontalPodAutoscaler"),
            "autoscaling.minReplicas": (3, "minReplicas: 3"),
            "autoscaling.maxReplicas": (19, "maxReplicas: 19"),
            "autoscaling.cpuPercent": (44, "averageUtilization: 44"),
        }.items()
    },
    **{
        f"{service}.preStopSeconds": (17, "seconds: 17")
        for service in ("tokenizer", "cache", "safety")
    },
    **{
        f"{container}.resources": (LIMITS, "memory: 7Gi")
        for container in (
            "engineDefaults",
            "pull",
            "gateway",
            "tokenizer",
            "cache",
            "safety",
            "valkey.embedded",
        )
    },
    **{f"tls.secrets.{each}": ("other-tls", "secretName: other-tls") for each in CERTIFICATES},
}
