"""What holds for every pod of the chart, whatever the values."""

from __future__ import annotations

import math
from typing import Any

import pytest

from services.cache.service import CacheService
from services.engine.service import EngineService
from services.gateway.service import GatewayService
from services.runtime.health import LIVENESS
from services.runtime.server import Service
from services.safety.service import SafetyService
from services.tokenizer.service import TokenizerService
from tests.support.chart import Manifest, example, of_kind, pod_templates, problems, render, the
from tests.unit.deploy.test_chart_manifests import EXAMPLES

each_example = pytest.mark.parametrize("name", EXAMPLES)


def selects(selector: Manifest, template: Manifest) -> bool:
    return selector["matchLabels"].items() <= template["metadata"]["labels"].items()


def answering(name: str) -> list[tuple[str, Manifest]]:
    """Pods that answer others: all but the workers of an engine of several pods."""
    return [
        (where, template)
        for where, template in pod_templates(render(example(name)))
        if not where.endswith(" worker")
    ]


@each_example
def test_pods_run_as_nobody_in_particular_and_write_nowhere(name: str) -> None:
    for where, template in pod_templates(render(example(name))):
        pod = template["spec"]
        assert pod["automountServiceAccountToken"] is False, where
        assert pod["enableServiceLinks"] is False, where
        security = pod["securityContext"]
        assert security["runAsNonRoot"], where
        assert security["runAsUser"] == 10001, where
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, where
        assert not any("hostPath" in volume for volume in pod["volumes"]), where
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, where
            mounts = {each["mountPath"] for each in container["volumeMounts"]}
            assert "/tmp" in mounts, where


@each_example
def test_every_container_has_requests_and_a_limit_of_memory(name: str) -> None:
    for where, template in pod_templates(render(example(name))):
        pod = template["spec"]
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            resources = container["resources"]
            assert {"cpu", "memory"} <= resources["requests"].keys(), where
            assert "memory" in resources["limits"], where


@each_example
def test_every_pod_that_answers_has_three_probes(name: str) -> None:
    for where, template in answering(name):
        (container,) = template["spec"]["containers"]
        for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
            assert probe in container, (where, probe)


@each_example
def test_every_pod_is_under_a_network_policy_in_both_directions(name: str) -> None:
    manifests = render(example(name))
    policies = [each["spec"] for each in of_kind(manifests, "NetworkPolicy")]
    for where, template in pod_templates(manifests):
        over = [each for each in policies if selects(each["podSelector"], template)]
        assert [each["policyTypes"] for each in over] == [["Ingress", "Egress"]], where


@each_example
def test_every_service_keeps_replicas_while_nodes_are_drained(name: str) -> None:
    manifests = render(example(name))
    budgets = [each["spec"] for each in of_kind(manifests, "PodDisruptionBudget")]
    for where, template in pod_templates(manifests):
        if where.startswith("StatefulSet"):
            continue  # the one Valkey of a trial
        over = [each for each in budgets if selects(each["selector"], template)]
        assert [each["maxUnavailable"] for each in over] == [1], where


@each_example
def test_replicas_are_spread_among_their_own(name: str) -> None:
    for where, template in answering(name):
        if where.startswith("StatefulSet"):
            continue
        spread = template["spec"]["topologySpreadConstraints"]
        assert {each["topologyKey"] for each in spread} == {
            "kubernetes.io/hostname",
            "topology.kubernetes.io/zone",
        }
        assert all(selects(each["labelSelector"], template) for each in spread), where


@each_example
def test_a_pod_has_time_to_finish_what_it_has(name: str) -> None:
    drains_s = {"production": {"gateway": 120, "engine": 120}}.get(name, {})
    for where, template in answering(name):
        if where.startswith("StatefulSet"):
            continue
        (container,) = template["spec"]["containers"]
        waits_s = container["lifecycle"]["preStop"]["sleep"]["seconds"]
        drain_s = drains_s.get(container["name"], 30)
        grace_s = template["spec"]["terminationGracePeriodSeconds"]
        assert waits_s >= 2, where
        assert grace_s > waits_s + drain_s, where


@each_example
def test_nothing_is_replaced_before_its_successor_is_ready_unless_asked_for(name: str) -> None:
    for deployment in of_kind(render(example(name)), "Deployment"):
        rolling = deployment["spec"]["strategy"]["rollingUpdate"]
        is_scarce = deployment["metadata"]["name"] == "demo-meshserve-engine-llama-3-1-8b"
        wanted = (0, 1) if is_scarce else (1, 0)
        assert (rolling["maxSurge"], rolling["maxUnavailable"]) == wanted


@each_example
def test_a_scaler_has_the_number_of_replicas_to_itself(name: str) -> None:
    manifests = render(example(name))
    scaled = {
        (target["kind"], target["name"])
        for each in of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject")
        for target in [each["spec"]["scaleTargetRef"]]
    }
    for each in of_kind(manifests, "Deployment", "LeaderWorkerSet"):
        is_scaled = (each["kind"], each["metadata"]["name"]) in scaled
        assert ("replicas" in each["spec"]) != is_scaled


@pytest.mark.parametrize(
    ("service", "kind"),
    [
        ("gateway", GatewayService),
        ("tokenizer", TokenizerService),
        ("engine-smollm2-135m", EngineService),
        ("cache", CacheService),
        ("safety", SafetyService),
    ],
)
def test_probes_ask_for_the_names_that_services_answer_to(
    service: str, kind: type[Service]
) -> None:
    deployment = the(render(example("trial")), "Deployment", service)
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    (port,) = (each for each in container["ports"] if each["name"] == "grpc")
    number = port["containerPort"]
    assert container["readinessProbe"]["grpc"] == {
        "port": number,
        "service": kind.grpc_services[0],
    }
    for probe in ("startupProbe", "livenessProbe"):
        assert container[probe]["grpc"] == {"port": number, "service": LIVENESS}


def test_with_tls_the_probes_are_our_own() -> None:
    for where, template in answering("tls"):
        (container,) = template["spec"]["containers"]
        name = container["name"]
        wanted: dict[str, list[str]] = {
            "readinessProbe": ["meshserve", "probe", name],
            "startupProbe": ["meshserve", "probe", "--liveness", name],
            "livenessProbe": ["meshserve", "probe", "--liveness", name],
        }
        for probe, command in wanted.items():
            assert container[probe]["exec"] == {"command": command}, where


def test_only_who_must_talks_to_whom() -> None:
    callers = {"networkPolicy": {"callerNamespaces": {"team": "search"}}}
    manifests = render(example("production") | callers)

    def reaches(caller: str, callee: str, port: int) -> bool:
        """Whether both policies let a caller reach a port."""
        pods = {
            template["metadata"]["labels"]["app.kubernetes.io/component"]: template
            for _, template in pod_templates(manifests)
        }
        policies = {
            each["metadata"]["labels"]["app.kubernetes.io/component"]: each["spec"]
            for each in of_kind(manifests, "NetworkPolicy")
        }

        def lets(rules: list[Any], side: str, template: Manifest) -> bool:
            return any(
                port in [each["port"] for each in rule["ports"]]
                and (
                    side not in rule
                    or any(
                        selects(peer["podSelector"], template)
                        for peer in rule[side]
                        if "podSelector" in peer
                    )
                )
                for rule in rules
            )

        return lets(policies[caller]["egress"], "to", pods[callee]) and lets(
            policies[callee]["ingress"], "from", pods[caller]
        )

    ports = {"gateway": 50051, "tokenizer": 50052, "engine": 50053, "cache": 50054, "safety": 50055}
    allowed = {
        (caller, callee)
        for caller in ports
        for callee, port in ports.items()
        if reaches(caller, callee, port)
    }
    assert allowed == {("gateway", each) for each in ports}


def test_a_multi_node_engine_is_called_at_its_leader_alone() -> None:
    manifests = render(example("multinode"))
    service = the(manifests, "Service", "engine-large")
    assert service["spec"]["selector"]["leaderworkerset.sigs.k8s.io/worker-index"] == "0"
    group = the(manifests, "LeaderWorkerSet", "engine-large")["spec"]["leaderWorkerTemplate"]
    assert group["size"] == 2
    (leader,) = group["leaderTemplate"]["spec"]["containers"]
    (worker,) = group["workerTemplate"]["spec"]["containers"]
    assert "command" not in leader
    assert worker["command"] == ["python", "-m", "services.engine.core.parallel.machine"]
    for container in (leader, worker):
        said = {each["name"]: each.get("value") for each in container["env"]}
        ranks = [int(said[f"MESHSERVE_ENGINE__{each}_PARALLEL"]) for each in ("TENSOR", "PIPELINE")]
        assert math.prod(ranks) == int(said["LOCAL_WORLD_SIZE"]) * group["size"]
        assert said["MASTER_PORT"] == "29500"
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert "readinessProbe" not in worker
    assert problems(the(manifests, "LeaderWorkerSet", "engine-large")) == []
