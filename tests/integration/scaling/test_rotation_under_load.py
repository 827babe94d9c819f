"""Certificates, their authority, API keys and the password of Valkey change under load: no service
is restarted and no request fails."""

from __future__ import annotations

import hashlib
import ssl
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import redis
import yaml

import meshserve
from tests.support.kubelet import publish
from tests.support.load import Load
from tests.support.pki import Authority
from tests.support.ports import free_ports
from tests.support.replicated_mesh import PEERS, ReplicatedMesh
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

SERVICES = (*PEERS, "gateway")
FIRST_PASSWORD = "first-password"


def keys(*names: str) -> bytes:
    digests = {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
    entries = [{"name": name, "sha256": digest} for name, digest in digests.items()]
    return yaml.safe_dump(entries).encode()


class Secret:
    """A folder of files, as a pod sees it."""

    def __init__(self, folder: Path, files: dict[str, bytes]) -> None:
        self.folder = folder
        self._files = files
        publish(folder, files)

    def update(self, files: dict[str, bytes]) -> None:
        """Replaces some of the files."""
        self._files = {**self._files, **files}
        publish(self.folder, self._files)


class Rotating:
    """A mesh with mutual TLS between its services, and all that may change in mounted Secrets."""

    def __init__(self, mesh: ReplicatedMesh, directory: Path) -> None:
        self.mesh = mesh
        self.directory = directory
        self.old_ca = Authority(directory / "authorities", "old")
        self.new_ca = Authority(directory / "authorities", "new")
        self.tls = {
            service: Secret(
                directory / "tls" / service,
                {**self.pair(service, self.old_ca), "ca.crt": self.old_ca.certificate.read_bytes()},
            )
            for service in SERVICES
        }
        self.keys = Secret(directory / "keys", {"keys.yaml": keys("load")})
        self.password = Secret(directory / "valkey", {"password": FIRST_PASSWORD.encode()})
        (self.http_port,) = free_ports(1)
        for service, secret in self.tls.items():
            tls = {
                "certificate": str(secret.folder / "tls.crt"),
                "private_key": str(secret.folder / "tls.key"),
                "ca": str(secret.folder / "ca.crt"),
            }
            if service != "gateway":
                tls["client_ca"] = tls["ca"]
            mesh.settings[service]["tls"] = tls
        mesh.settings["gateway"].update(
            http_listen=f"127.0.0.1:{self.http_port}",
            auth={"mode": "required", "keys_file": str(self.keys.folder / "keys.yaml")},
            # A request whose rate cannot be counted fails.
            rate_limit={
                "requests_per_minute": 1_000_000,
                "burst": 1_000_000,
                "when_unavailable": "refuse",
            },
        )
        mesh.settings["valkey"]["password_file"] = str(self.password.folder / "password")
        # Those who watch from outside trust both, and show the gateway's certificate.
        self.both = directory / "both.crt"
        self.both.write_bytes(self.bundle(self.old_ca, self.new_ca))
        pair = self.pair("gateway", self.old_ca)
        mesh.credentials = grpc.ssl_channel_credentials(
            self.both.read_bytes(), pair["tls.key"], pair["tls.crt"]
        )

    def pair(self, service: str, authority: Authority) -> dict[str, bytes]:
        folder = self.directory / "issued"
        authority.issue(folder, f"DNS:{service}.test", "IP:127.0.0.1")
        return {name: (folder / name).read_bytes() for name in ("tls.crt", "tls.key")}

    def bundle(self, *authorities: Authority) -> bytes:
        return b"".join(each.certificate.read_bytes() for each in authorities)

    def client(self, ca: Path | None = None, key: str = "load") -> meshserve.Client:
        tls = meshserve.TLS(ca_file=ca or self.both, server_name="gateway.test")
        return meshserve.Client(self.mesh.target, tls=tls, api_key=key, timeout=30)

    def load(self) -> Load:
        return Load(self.client, clients=8, max_tokens=16)

    def taken(self, what: str) -> float:
        """How often the replicas have taken what files hold."""
        return sum(
            replica.metric("meshserve_file_reloads_total", f'outcome="taken",what="{what}')
            for replicas in self.mesh.replicas.values()
            for replica in replicas
        )

    def issue_all(self, authority: Authority) -> None:
        """Gives each service a new certificate, and waits until it shows it."""
        before = self.taken("certificate")
        for service, secret in self.tls.items():
            secret.update(self.pair(service, authority))
        count = sum(len(replicas) for replicas in self.mesh.replicas.values())
        wait_until(lambda: self.taken("certificate") >= before + count, "certificates are shown")

    def trust_all(self, *authorities: Authority) -> None:
        """Has each service trust authorities, and waits until it does."""
        before, before_by_gateway = self.taken("certificate"), self.taken("trust")
        for secret in self.tls.values():
            secret.update({"ca.crt": self.bundle(*authorities)})
        # The gateway asks nobody for a certificate, and trusts each of its peers.
        asking = sum(len(self.mesh.replicas[service]) for service in PEERS)
        wait_until(lambda: self.taken("certificate") >= before + asking, "servers trust")
        wait_until(lambda: self.taken("trust") >= before_by_gateway + len(PEERS), "gateway trusts")


@pytest.fixture(scope="module")
def rotating(tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path) -> Iterator[Rotating]:
    directory = tmp_path_factory.mktemp("rotating")
    with ReplicatedMesh(directory / "mesh", valkey_password=FIRST_PASSWORD) as mesh:
        rotating = Rotating(mesh, directory)
        mesh.start(engine=2, tokenizer=2)
        yield rotating


def is_answered(client: meshserve.Client) -> bool:
    with client:
        try:
            client.chat("Hello.", max_tokens=1)
        except meshserve.MeshServeError:
            return False
    return True


def test_certificates_are_renewed_and_then_their_authority(rotating: Rotating) -> None:
    old_ca, new_ca = rotating.old_ca, rotating.new_ca
    with rotating.load() as load:
        load.wait_for_more()
        rotating.issue_all(old_ca)
        load.wait_for_more()
        rotating.trust_all(old_ca, new_ca)
        load.wait_for_more()
        rotating.issue_all(new_ca)
        load.wait_for_more()
        rotating.trust_all(new_ca)
        load.wait_for_more()
        # What joins now knows nothing of the old authority.
        pair = rotating.pair("gateway", new_ca)
        rotating.mesh.credentials = grpc.ssl_channel_credentials(
            new_ca.certificate.read_bytes(), pair["tls.key"], pair["tls.crt"]
        )
        rotating.mesh.add("tokenizer")
        leaving = rotating.mesh.replicas["tokenizer"][0]
        leaving.stop()
        assert leaving.ended() == 0
        rotating.mesh.forget(leaving)
        load.wait_for_more()
    assert not load.failures
    assert not load.truncated
    assert is_answered(rotating.client(new_ca.certificate))
    assert not is_answered(rotating.client(old_ca.certificate))
    health = f"https://127.0.0.1:{rotating.http_port}/healthz"
    trust = ssl.create_default_context(cafile=new_ca.certificate)
    with urllib.request.urlopen(health, timeout=5, context=trust) as response:
        assert response.status == 200


def test_api_keys_come_and_go(rotating: Rotating) -> None:
    with rotating.load() as load:
        load.wait_for_more()
        assert not is_answered(rotating.client(key="new"))
        rotating.keys.update({"keys.yaml": keys("load", "new")})
        wait_until(lambda: is_answered(rotating.client(key="new")), "the new key is taken", 10)
        rotating.keys.update({"keys.yaml": keys("load")})
        wait_until(lambda: not is_answered(rotating.client(key="new")), "it is refused", 10)
        rotating.keys.update({"keys.yaml": b"- {name: load, sha256: "})
        (gateway,) = rotating.mesh.replicas["gateway"]
        refused = 'what="api_keys"'
        wait_until(lambda: gateway.metric("meshserve_files_refused", refused) == 1, "it is told")
        load.wait_for_more()
        rotating.keys.update({"keys.yaml": keys("load")})
        wait_until(lambda: gateway.metric("meshserve_files_refused", refused) == 0, "it is mended")
    assert not load.failures
    assert "keys.yaml: not valid YAML" in gateway.log


def test_the_password_of_valkey_changes(rotating: Rotating) -> None:
    def asked(*command: Any) -> Any:
        with redis.Redis(port=rotating.mesh.valkey.port, password=passwords[-1]) as admin:
            return admin.execute_command(*command)

    passwords = [FIRST_PASSWORD]
    with rotating.load() as load:
        load.wait_for_more()
        before = rotating.taken("valkey")
        rotating.password.update({"password": b"second-password"})
        load.wait_for_more()
        asked("CONFIG", "SET", "requirepass", "second-password")
        passwords.append("second-password")
        wait_until(lambda: rotating.taken("valkey") == before + 2, "gateway and cache use it")
        load.wait_for_more()
        # From here on everybody has to show it.
        asked("CLIENT", "KILL", "TYPE", "NORMAL")
        load.wait_for_more()
    assert not load.failures
    for replicas in rotating.mesh.replicas.values():
        for replica in replicas:
            assert not any(password in replica.log for password in passwords)
