"""The pods of the chart start, find each other by its names, answer, and end within their grace."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.runtime.modelfiles import default_cache_dir, pull
from tests.integration.deploy.caller import KEY, NEW_KEY
from tests.integration.deploy.cluster import KEYS_SECRET
from tests.support.chart import Values, example, of_kind, render
from tests.support.programs import require_program

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
SERVICES = ("gateway", "tokenizer", "engine-smollm2-135m", "cache", "safety")
# Two gateways, one of all else.
PODS = {f"demo-meshserve-{each}-0" for each in SERVICES} | {"demo-meshserve-gateway-1"}
TWO_GATEWAYS = example("trial") | {
    "gateway": {"replicas": 2, "auth": {"existingSecret": KEYS_SECRET}}
}
ONE_GATEWAY = example("trial") | {"gateway": TWO_GATEWAYS["gateway"] | {"replicas": 1}}

Events = list[dict[str, Any]]


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Events:
    """What happened to the pods, in order."""
    folder = tmp_path_factory.mktemp("cluster")
    write_keys(folder / "renewed", NEW_KEY)
    return run(folder, TWO_GATEWAYS)


def run(folder: Path, values: Values, *options: str) -> Events:
    unshare = [require_program("unshare", "util-linux"), "--net", "--mount"]
    if subprocess.run([*unshare, "true"], capture_output=True).returncode != 0:
        pytest.skip("this user may not make namespaces")
    pull("smollm2-135m")
    write_keys(folder / "secrets", KEY)
    (folder / "manifests.json").write_text(json.dumps(render(values)))
    module = "tests.integration.deploy.cluster"
    ran = subprocess.run(
        [*unshare, sys.executable, "-m", module, str(folder), *options],
        cwd=ROOT,
        env={"PATH": "/usr/bin:/bin", "MESHSERVE_CACHE": str(default_cache_dir())},
        capture_output=True,
        text=True,
        timeout=280,
    )
    logs = "".join(
        f"--- {log.name}\n{log.read_text()[-2000:]}" for log in sorted(folder.glob("*.log"))
    )
    assert ran.returncode == 0, f"{ran.stdout}{ran.stderr}{logs}"
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_every_pod_becomes_ready_by_its_own_probes(events: Events) -> None:
    ready = {each["ready"]: each["alive"] for each in events if "ready" in each}
    assert ready == dict.fromkeys(PODS, True)


def test_the_gateway_is_ready_after_the_engine(events: Events) -> None:
    order = [each["ready"] for each in events if "ready" in each]
    engine = order.index("demo-meshserve-engine-smollm2-135m-0")
    assert order.index("demo-meshserve-gateway-0") > engine


def test_a_request_goes_through_all_of_them(events: Events) -> None:
    (answer,) = (each["answered"] for each in events if "answered" in each)
    assert "Paris" in answer


def test_helm_test_passes(events: Events) -> None:
    assert {"helm_test": 0} in events


def test_an_operator_sees_both_gateways_whichever_answers(events: Events) -> None:
    (seen,) = (each["gateways_seen"] for each in events if "gateways_seen" in each)
    assert len(seen) == 2


def test_running_gateways_take_the_keys_of_a_changed_secret(events: Events) -> None:
    changed = {each["changes_key"]: each["changed"] for each in events if "changes_key" in each}
    assert changed == {f"demo-meshserve-gateway-{number}": True for number in (0, 1)}


def test_every_pod_ends_by_itself_within_its_grace(events: Events) -> None:
    ended = {each["ended"]: each["code"] for each in events if "ended" in each}
    assert ended == dict.fromkeys(PODS, 0)


def test_an_engine_that_is_started_when_it_is_asked_for_answers_who_has_waited(
    tmp_path: Path,
) -> None:
    values = ONE_GATEWAY | {"engineDefaults": {"autoscaling": {"kind": "keda", "minReplicas": 0}}}
    events = run(tmp_path, values, "--idle")
    happened = [next(iter(each)) for each in events]
    # The gateway is ready without an engine; a request waits; the engine comes; it is answered.
    first, second = happened.index("awaited"), happened.index("answered")
    assert "demo-meshserve-gateway-0" in [each.get("ready") for each in events[:first]]
    assert [each.get("ready") for each in events[first + 1 : second]] == [
        "demo-meshserve-engine-smollm2-135m-0"
    ]
    assert "Paris" in events[second]["answered"]


def test_with_tls_they_trust_each_other_by_the_names_of_their_services_also_when_renewed(
    tmp_path: Path,
) -> None:
    values = TWO_GATEWAYS | {"tls": example("tls")["tls"]}
    for certificate in of_kind(render(values), "Certificate"):
        spec = certificate["spec"]
        for folder in ("secrets", "renewed"):
            sign(tmp_path / folder, spec["secretName"], spec["dnsNames"])
    events = run(tmp_path, values)
    assert {each["ready"] for each in events if "ready" in each} == PODS
    assert {"helm_test": 0} in events
    (seen,) = (each["gateways_seen"] for each in events if "gateways_seen" in each)
    assert len(seen) == 2
    what = "changes_certificate"
    changed = {each[what]: each["changed"] for each in events if what in each}
    assert changed == dict.fromkeys(PODS, True)
    for answer in ("answered", "answered_again"):
        (said,) = (each[answer] for each in events if answer in each)
        assert "Paris" in said


def write_keys(secrets: Path, key: str) -> None:
    """The Secret with an operator's key."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    keys = [{"name": "acme", "sha256": digest, "operator": True}]
    path = secrets / KEYS_SECRET / "keys.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(yaml.safe_dump(keys))


def sign(folder: Path, secret: str, names: list[str]) -> None:
    """A Secret of cert-manager: a certificate for some names, and the CA of all."""
    openssl = require_program("openssl")
    own = folder / secret
    own.mkdir(parents=True)
    new = [openssl, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    ca = [folder.parent / "ca.crt", folder.parent / "ca.key"]
    if not ca[0].exists():
        run_quietly([*new, "-x509", "-subj", "/CN=mesh", "-out", ca[0], "-keyout", ca[1]])
    named = f"subjectAltName={','.join(f'DNS:{name}' for name in names)}"
    signed = ["-x509", "-CA", ca[0], "-CAkey", ca[1], "-addext", named]
    usage = ["-addext", "extendedKeyUsage=serverAuth,clientAuth"]
    files = ["-out", own / "tls.crt", "-keyout", own / "tls.key"]
    run_quietly([*new, *signed, *usage, "-subj", f"/CN={names[0]}", *files])
    (own / "ca.crt").write_bytes(ca[0].read_bytes())


def run_quietly(command: list[str | Path]) -> None:
    subprocess.run(command, check=True, capture_output=True)
