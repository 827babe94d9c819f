"""The settings that the chart writes are those that the services read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from services.runtime.settings import Settings, parse_settings, split_address
from services.runtime.settings.schema import SERVICE_NAMES
from services.safety.policy import parse_policy
from tests.support.chart import Manifest, Values, example, of_kind, pod_templates, render, the
from tests.unit.deploy.test_chart_manifests import EXAMPLES

SERVICES = ("gateway", "tokenizer", "cache", "safety")
each_example = pytest.mark.parametrize("name", EXAMPLES)


def environment(template: Manifest) -> dict[str, str]:
    """The variables of a pod."""
    (container,) = template["spec"]["containers"]
    return {each["name"]: each["value"] for each in container["env"]}


def settings_of(values: Values) -> dict[str, Settings]:
    """What each pod reads, by the name of its workload without the release's."""
    manifests = render(values)
    document = yaml.safe_load(the(manifests, "ConfigMap", "")["data"]["meshserve.yaml"])
    return {
        where.split("demo-meshserve-")[1]: parse_settings(document, environment(template))
        for where, template in pod_templates(manifests)
        if not where.startswith("StatefulSet")
    }


@each_example
def test_every_pod_can_start_with_them(name: str) -> None:
    assert settings_of(example(name))


@each_example
def test_every_service_is_found_where_it_listens(name: str) -> None:
    manifests = render(example(name))
    ports = {
        (each["metadata"]["name"], port["port"])
        for each in of_kind(manifests, "Service")
        if each["spec"].get("clusterIP") == "None"
        for port in each["spec"]["ports"]
    }
    settings = settings_of(example(name))["gateway"]
    targets = [settings.server(each).effective_target for each in SERVICE_NAMES]
    targets += [model.engine_target or "" for model in settings.models.values()]
    for target in targets:
        host, port = split_address(target.removeprefix("dns:///"))
        assert (host, port) in ports
        assert target.startswith("dns:///")


@each_example
def test_every_container_opens_the_ports_that_its_service_listens_on(name: str) -> None:
    by_workload = settings_of(example(name))
    for where, template in pod_templates(render(example(name))):
        if where.startswith("StatefulSet") or where.endswith(" worker"):
            continue
        (container,) = template["spec"]["containers"]
        section = by_workload[where.split("demo-meshserve-")[1]].server(container["name"])
        listens = {split_address(section.listen)[1], split_address(section.metrics_listen or "")[1]}
        opened = {each["containerPort"] for each in container["ports"]}
        assert listens <= opened


def test_each_engine_runs_its_own_model_where_the_gateway_looks_for_it() -> None:
    values = example("gpu")
    by_workload = settings_of(values)
    gateway = by_workload["gateway"]
    for workload, model, device in (
        ("engine-llama-3-1-8b", "llama-3.1-8b", "cuda:0"),
        ("engine-smollm2-135m", "smollm2-135m", "cpu"),
    ):
        engine = by_workload[workload]
        assert (engine.engine_models, engine.engine.device) == ((model,), device)
        assert engine.engine.effective_target == gateway.models[model].engine_target
    assert by_workload["engine-llama-3-1-8b"].engine.max_batch_tokens == 2048
    assert by_workload["engine-llama-3-1-8b"].engine.speculation.draft_model == "smollm2-135m"
    assert by_workload["engine-smollm2-135m"].engine.max_batch_tokens == 512


SHARING: Values = {
    "gateway": {"auth": {"mode": "off"}},
    "defaultModel": "first",
    "models": {
        "chat": {"source": "org/chat", "engine": {"autoscaling": {"kind": "keda"}}},
        "first": {"source": "org/first", "sharesEngineOf": "chat", "load": "on_request"},
        "alone": {"source": "org/alone"},
    },
}


def test_a_model_that_shares_engines_is_hosted_and_found_there() -> None:
    by_workload = settings_of(SHARING)
    assert by_workload["engine-chat"].engine_models == ("first", "chat")
    assert by_workload["engine-alone"].engine_models == ("alone",)
    assert "engine-first" not in by_workload
    models = by_workload["gateway"].models
    assert models["first"].engine_target == models["chat"].engine_target
    assert models["first"].load == "on_request"
    assert by_workload["gateway"].engine.effective_target == models["chat"].engine_target
    pod = the(render(SHARING), "Deployment", "engine-chat")["spec"]["template"]["spec"]
    assert [each["args"][-1] for each in pod["initContainers"]] == ["org/chat", "org/first"]
    queries = json.dumps(of_kind(render(SHARING), "ScaledObject"))
    assert "chat|first" in queries


def test_the_pods_that_read_models_pull_them_first() -> None:
    manifests = render(example("gpu"))

    def pulled(name: str) -> list[str]:
        pod = the(manifests, "Deployment", name)["spec"]["template"]["spec"]
        return [each["args"][-1] for each in pod["initContainers"]]

    llama = "meta-llama/Llama-3.1-8B-Instruct"
    assert pulled("engine-llama-3-1-8b") == [llama, "smollm2-135m"]
    assert pulled("engine-smollm2-135m") == ["smollm2-135m"]
    assert pulled("tokenizer") == [llama, "smollm2-135m"]
    gateway = the(manifests, "Deployment", "gateway")["spec"]["template"]["spec"]
    assert "initContainers" not in gateway


def test_the_default_model_is_the_one_that_was_named() -> None:
    assert settings_of(example("production"))["gateway"].default_model == "smollm2-360m"


def test_requests_wait_for_the_engines_that_may_all_end_and_for_no_others() -> None:
    models = settings_of(example("keda"))["gateway"].models
    assert models["smollm2-360m"].activation_timeout_s == 300
    assert models["smollm2-135m"].activation_timeout_s is None


def test_with_tls_every_service_shows_a_certificate_and_asks_for_one_within() -> None:
    settings = settings_of(example("tls"))["gateway"]
    for service in ("gateway", "tokenizer", "engine", "cache", "safety"):
        tls = settings.server(service).tls
        assert tls is not None
        assert tls.certificate == Path("/etc/meshserve/tls/tls.crt")
        assert (tls.client_ca is None) == (service == "gateway")
    for where, template in pod_templates(render(example("tls"))):
        (container,) = template["spec"]["containers"]
        (volume,) = (each for each in template["spec"]["volumes"] if each["name"] == "tls")
        mounts = {each["mountPath"] for each in container["volumeMounts"]}
        assert volume["secret"]["secretName"] == f"demo-meshserve-{container['name']}-tls", where
        assert "/etc/meshserve/tls" in mounts


def test_cert_manager_makes_certificates_for_the_names_by_which_services_are_found() -> None:
    certificates = {
        each["metadata"]["labels"]["app.kubernetes.io/component"]: each["spec"]
        for each in of_kind(render(example("tls")), "Certificate")
    }
    settings = settings_of(example("tls"))["gateway"]
    for service in SERVICE_NAMES:
        spec = certificates[service]
        assert spec["secretName"] == f"demo-meshserve-{service}-tls"
        targets = [settings.server(service).effective_target]
        if service == "engine":
            targets = [model.engine_target or "" for model in settings.models.values()]
        found = {split_address(each.removeprefix("dns:///"))[0] for each in targets}
        assert found <= set(spec["dnsNames"])
    services = {"demo-meshserve-gateway", "demo-meshserve-gateway-replicas"}
    names = services | {"localhost", "mesh.example.com"}
    assert set(certificates["gateway"]["dnsNames"]) == names


def test_secrets_are_read_by_who_needs_them_and_stand_nowhere_else() -> None:
    manifests = render(example("production"))
    readers: dict[str, set[str]] = {}
    for where, template in pod_templates(manifests):
        for volume in template["spec"]["volumes"]:
            if "secret" in volume:
                secret = volume["secret"]["secretName"]
                readers.setdefault(secret, set()).add(where.split("demo-meshserve-")[1])
    assert readers == {"meshserve-keys": {"gateway"}, "meshserve-valkey": {"gateway", "cache"}}
    assert of_kind(manifests, "Secret") == []


@pytest.mark.parametrize("service", ["gateway", "cache"])
def test_secrets_are_read_where_their_changes_reach_the_pod(service: str) -> None:
    settings = settings_of(example("production"))[service]
    files = {"valkey": settings.valkey.url_file}
    if service == "gateway":
        files["keys"] = settings.gateway.auth.keys_file
    pod = the(render(example("production")), "Deployment", service)["spec"]["template"]["spec"]
    mounts = {each["name"]: each for each in pod["containers"][0]["volumeMounts"]}
    for name, path in files.items():
        assert path is not None
        assert mounts[name]["mountPath"] == str(path.parent)
        # The kubelet changes no file that is mounted by itself.
        assert "subPath" not in mounts[name]


def test_a_secret_beside_the_url_of_valkey_holds_its_password() -> None:
    valkey = {"url": "rediss://mesh@valkey:6379/0", "existingSecret": "v", "secretKey": "password"}
    settings = settings_of(example("trial") | {"valkey": valkey})["cache"].valkey
    assert settings.url == "rediss://mesh@valkey:6379/0"
    assert settings.password_file == Path("/etc/meshserve/valkey/password")


def test_a_policy_is_read_where_it_is_mounted() -> None:
    manifests = render(example("production"))
    path = settings_of(example("production"))["safety"].safety.policies["default"]
    pod = the(manifests, "Deployment", "safety")["spec"]["template"]["spec"]
    (mount,) = (each for each in pod["containers"][0]["volumeMounts"] if each["name"] == "policies")
    assert str(path.parent) == mount["mountPath"]
    written = yaml.safe_load(the(manifests, "ConfigMap", "policies")["data"][path.name])
    assert written == example("production")["safety"]["policies"]["default"]
    assert parse_policy(the(manifests, "ConfigMap", "policies")["data"][path.name]).categories


@pytest.mark.parametrize(
    ("change", "replaced"),
    [
        ({}, set()),
        ({"settings": {"gateway": {"max_active_requests": 12}}}, {"gateway"}),
        ({"settings": {"cache": {"default_ttl_s": 60}}}, {"gateway", "cache"}),
        ({"settings": {"engine": {"block_tokens": 32}}}, {"gateway", "engine-one"}),
        ({"settings": {"telemetry": {"log_level": "debug"}}}, {*SERVICES, "engine-one"}),
        ({"valkey": {"url": "redis://elsewhere:6379"}}, {"gateway", "cache"}),
        ({"safety": {"policies": {"default": {"categories": {}}}}}, {"gateway", "safety"}),
        ({"models": {"another": {"source": "org/other"}}}, {"gateway", "tokenizer"}),
        ({"models": {"one": {"dtype": "float32"}}}, {"gateway", "tokenizer", "engine-one"}),
        (
            {"models": {"another": {"source": "org/other", "sharesEngineOf": "one"}}},
            {"gateway", "tokenizer", "engine-one"},
        ),
    ],
)
def test_new_settings_are_new_pods_of_who_reads_them(change: Values, replaced: set[str]) -> None:
    def checksums(values: Values) -> dict[str, str]:
        return {
            where.split("demo-meshserve-")[1]: template["metadata"]["annotations"][
                "checksum/settings"
            ]
            for where, template in pod_templates(render(values))
            if not where.startswith("StatefulSet")
        }

    values = {"gateway": {"auth": {"mode": "off"}}, "models": {"one": {"source": "org/one"}}}
    before = checksums(values)
    after = checksums(laid_over(values, change))
    assert {name for name, checksum in before.items() if after[name] != checksum} == replaced


def test_new_texts_of_policies_reach_pods_that_run() -> None:
    def template(action: str) -> Manifest:
        policy = {"categories": {"secrets": {"prompt": action}}}
        values = example("trial") | {"safety": {"policies": {"default": policy}}}
        return the(render(values), "Deployment", "safety")["spec"]["template"]

    assert template("flag") == template("block")


def laid_over(values: Values, change: Values) -> Values:
    """As Helm does it."""
    return values | {
        key: laid_over(values[key], value)
        if isinstance(value, dict) and isinstance(values.get(key), dict)
        else value
        for key, value in change.items()
    }
