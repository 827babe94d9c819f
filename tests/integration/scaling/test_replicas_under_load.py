"""Replicas come, go, drain and die under load, and the client does not notice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.scaling.load import Load
from tests.support.replicated_mesh import PEERS, ReplicatedMesh

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def mesh(
    tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path
) -> Iterator[ReplicatedMesh]:
    with ReplicatedMesh(tmp_path_factory.mktemp("replicated")) as started:
        started.start(tokenizer=2, safety=2, cache=2, engine=2, gateway=2)
        yield started


@pytest.mark.parametrize("service", PEERS)
def test_a_new_replica_gets_its_share_within_three_seconds(
    mesh: ReplicatedMesh, service: str
) -> None:
    new = mesh.begin(service)
    new.wait_until_healthy()
    with Load(mesh.target) as load:
        mesh.publish()
        time.sleep(3)
        before = {replica.host: replica.calls() for replica in mesh.replicas[service]}
        load.go_on(60)
        after = {replica.host: replica.calls() for replica in mesh.replicas[service]}
    assert not load.failures
    assert not load.wrong
    shares = {host: after[host] - before[host] for host in before}
    assert shares[new.host] >= 0.5 * sum(shares.values()) / len(shares), shares


@pytest.mark.parametrize("service", PEERS)
def test_a_replica_that_is_asked_to_stop_fails_nothing(mesh: ReplicatedMesh, service: str) -> None:
    leaving = mesh.replicas[service][0]
    with Load(mesh.target) as load:
        leaving.stop()
        assert leaving.ended() == 0
        mesh.forget(leaving)
        load.go_on(30)
    assert not load.failures
    assert not load.wrong
    assert "Traceback" not in leaving.log


@pytest.mark.parametrize("service", PEERS)
def test_a_replica_that_only_left_its_name_finishes_what_it_has(
    mesh: ReplicatedMesh, service: str
) -> None:
    leaving = mesh.replicas[service][0]
    mesh.add(service)
    with Load(mesh.target) as load:
        mesh.forget(leaving)
        time.sleep(3)
        before = leaving.calls("Generate") if service == "engine" else leaving.calls()
        load.go_on(30)
        after = leaving.calls("Generate") if service == "engine" else leaving.calls()
        assert after == before
        leaving.stop()
        assert leaving.ended() == 0
    assert not load.failures
    assert not load.wrong


@pytest.mark.parametrize("service", PEERS)
def test_only_what_a_killed_engine_had_begun_may_fail(mesh: ReplicatedMesh, service: str) -> None:
    while len(mesh.replicas[service]) < 3:
        mesh.add(service)
    victim = mesh.replicas[service][0]
    with Load(mesh.target) as load:
        load.go_on(20)
        victim.kill()
        load.go_on(60)
        mesh.forget(victim)
        load.go_on(20)
    if service == "engine":
        assert all(has_begun for _, has_begun in load.failures), load.failures
        assert sum(load.failures.values()) <= 12
    else:
        assert not load.failures
    assert not load.wrong


def test_gateways_are_replaced_without_an_error(mesh: ReplicatedMesh) -> None:
    with Load(mesh.target) as load:
        for old in list(mesh.replicas["gateway"]):
            old.stop()
            assert old.ended() == 0
            mesh.forget(old)
            load.go_on(30)
            new = mesh.begin("gateway", old.host)
            new.wait_until_healthy()
            give_up_at = time.monotonic() + 10
            while not new.calls("StreamChat"):
                assert time.monotonic() < give_up_at, "the clients do not come back"
                time.sleep(0.1)
    assert not load.failures
    assert not load.wrong


def test_every_replica_of_every_service_is_replaced_without_an_error(mesh: ReplicatedMesh) -> None:
    with Load(mesh.target) as load:
        for service in PEERS:
            for old in list(mesh.replicas[service]):
                mesh.add(service)
                old.stop()
                assert old.ended() == 0
                mesh.forget(old)
                load.go_on(10)
    assert not load.failures
    assert not load.wrong
