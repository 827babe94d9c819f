"""Whatever the values, what the chart renders is what Kubernetes takes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import helm_python
import pytest

from tests.support.chart import (
    CHART,
    NEWEST,
    OLDEST,
    example,
    of_kind,
    pod_templates,
    problems,
    render,
)

EXAMPLES = ("trial", "production", "gpu", "keda", "tls", "routes", "multinode")
each_example = pytest.mark.parametrize("name", EXAMPLES)


@each_example
def test_lint_finds_nothing(name: str, tmp_path: Path) -> None:
    report = helm_python.lint(CHART, example(name), strict=True)
    # An icon is recommended; severity 1 is information.
    assert [each for each in report["messages"] if each["severity"] > 1] == []
    assert report["errors"] == []


@each_example
@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_every_manifest_is_valid(name: str, version: str) -> None:
    manifests = render(example(name))
    found = {
        f"{each['kind']}/{each['metadata']['name']}": wrong
        for each in manifests
        if (wrong := problems(each, version))
    }
    assert found == {}


def test_the_schemas_find_what_is_wrong() -> None:
    manifests = render(example("keda") | {"monitoring": {"serviceMonitor": True, "rules": True}})
    manifests += render(example("multinode")) + render(example("routes"))
    manifests += render(example("tls"))
    kinds = "Deployment ScaledObject ServiceMonitor LeaderWorkerSet GRPCRoute Certificate"
    for kind in kinds.split():
        (manifest, *_) = of_kind(manifests, kind)
        assert problems(manifest | {"spec": manifest["spec"] | {"misspelt": 1}}), kind


@each_example
def test_every_object_has_a_name_of_its_own_that_is_short_enough(name: str) -> None:
    manifests = render(example(name))
    names = Counter((each["kind"], each["metadata"]["name"]) for each in manifests)
    assert max(names.values()) == 1
    assert all(len(each) <= 63 for _, each in names)


@each_example
def test_what_objects_refer_to_is_there(name: str) -> None:
    manifests = render(example(name))
    names = {(each["kind"], each["metadata"]["name"]) for each in manifests}
    for where, template in pod_templates(manifests):
        pod = template["spec"]
        assert ("ServiceAccount", pod["serviceAccountName"]) in names, where
        for volume in pod["volumes"]:
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in names, where
        mounted = {volume["name"] for volume in pod["volumes"]}
        for container in [*pod.get("initContainers", []), *pod["containers"]]:
            assert {mount["name"] for mount in container["volumeMounts"]} <= mounted, where
    for scaler in of_kind(manifests, "HorizontalPodAutoscaler", "ScaledObject"):
        target = scaler["spec"]["scaleTargetRef"]
        assert (target["kind"], target["name"]) in names
    for route in of_kind(manifests, "Ingress"):
        (path,) = route["spec"]["rules"][0]["http"]["paths"]
        assert ("Service", path["backend"]["service"]["name"]) in names


@each_example
def test_every_selector_finds_the_pods_of_one_service(name: str) -> None:
    manifests = render(example(name))
    labels = [template["metadata"]["labels"] for _, template in pod_templates(manifests)]
    for manifest in of_kind(manifests, "Service", "PodDisruptionBudget", "NetworkPolicy"):
        spec = manifest["spec"]
        selector = spec["podSelector"] if "podSelector" in spec else spec["selector"]
        wanted = dict(selector.get("matchLabels", selector))
        wanted.pop("leaderworkerset.sigs.k8s.io/worker-index", None)
        found = [each for each in labels if wanted.items() <= each.items()]
        assert len({each["app.kubernetes.io/component"] for each in found}) == 1, manifest
        assert len({each.get("meshserve/model") for each in found}) == 1, manifest


def test_the_chart_packs_with_the_rules_that_it_links_to(tmp_path: Path) -> None:
    archive = helm_python.package(CHART, destination=tmp_path)
    values = example("production")
    with helm_python.Chart.load(archive) as chart:
        texts = chart.render(values, name="demo", namespace="inference")
    assert "MeshServeServiceDown" in texts["meshserve/templates/monitoring.yaml"]
