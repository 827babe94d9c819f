"""Replicas come, go, drain and die under load, and the client does not notice."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import meshserve
from tests.support.load import Load
from tests.support.replicated_mesh import PEERS, ReplicatedMesh
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

CLIENTS = 12


@pytest.fixture(scope="module")
def mesh(
    tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path
) -> Iterator[ReplicatedMesh]:
    with ReplicatedMesh(tmp_path_factory.mktemp("replicated")) as started:
        started.start(tokenizer=2, safety=2, cache=2, engine=2, gateway=2)
        yield started


def loaded(mesh: ReplicatedMesh) -> Load:
    return Load(lambda: meshserve.Client(mesh.target, timeout=60), clients=CLIENTS, max_tokens=24)


@pytest.mark.parametrize("service", PEERS)
def test_a_new_replica_gets_its_share_within_three_seconds(
    mesh: ReplicatedMesh, service: str
) -> None:
    new = mesh.begin(service)
    new.wait_until_healthy()
    with loaded(mesh) as load:
        mesh.publish()
        time.sleep(3)
        before = {replica.host: replica.calls() for replica in mesh.replicas[service]}
        load.wait_for_more(60)
        after = {replica.host: replica.calls() for replica in mesh.replicas[service]}
    assert not load.failures
    assert not load.truncated
    shares = {host: after[host] - before[host] for host in before}
    assert shares[new.host] >= 0.5 * sum(shares.values()) / len(shares), shares


@pytest.mark.parametrize("service", PEERS)
def test_a_replica_that_is_asked_to_stop_fails_nothing(mesh: ReplicatedMesh, service: str) -> None:
    leaving = mesh.replicas[service][0]
    with loaded(mesh) as load:
        leaving.stop()
        assert leaving.ended() == 0
        mesh.forget(leaving)
        load.wait_for_more(30)
    assert not load.failures
    assert not load.truncated
    assert "Traceback" not in leaving.log


@pytest.mark.parametrize("service", PEERS)
def test_a_replica_that_only_left_its_name_finishes_what_it_has(
    mesh: ReplicatedMesh, service: str
) -> None:
    leaving = mesh.replicas[service][0]
    mesh.add(service)
    with loaded(mesh) as load:
        mesh.forget(leaving)
        time.sleep(3)
        before = leaving.calls("Generate") if service == "engine" else leaving.calls()
        load.wait_for_more(30)
        after = leaving.calls("Generate") if service == "engine" else leaving.calls()
        assert after == before
        leaving.stop()
        assert leaving.ended() == 0
    assert not load.failures
    assert not load.truncated


@pytest.mark.parametrize("service", PEERS)
def test_only_what_a_killed_engine_had_begun_may_fail(mesh: ReplicatedMesh, service: str) -> None:
    while len(mesh.replicas[service]) < 3:
        mesh.add(service)
    victim = mesh.replicas[service][0]
    with loaded(mesh) as load:
        load.wait_for_more(20)
        victim.kill()
        load.wait_for_more(60)
        mesh.forget(victim)
        load.wait_for_more(20)
    if service == "engine":
        assert not load.refused
        assert len(load.failures) <= CLIENTS
    else:
        assert not load.failures
    assert not load.truncated


def test_gateways_are_replaced_without_an_error(mesh: ReplicatedMesh) -> None:
    with loaded(mesh) as load:
        for old in list(mesh.replicas["gateway"]):
            old.stop()
            assert old.ended() == 0
            mesh.forget(old)
            load.wait_for_more(30)
            new = mesh.begin("gateway", old.host)
            new.wait_until_healthy()
            wait_until(lambda new=new: new.calls("StreamChat"), "the clients come back")
    assert not load.failures
    assert not load.truncated


def test_every_replica_of_every_service_is_replaced_without_an_error(mesh: ReplicatedMesh) -> None:
    with loaded(mesh) as load:
        for service in PEERS:
            for old in list(mesh.replicas[service]):
                mesh.add(service)
                old.stop()
                assert old.ended() == 0
                mesh.forget(old)
                load.wait_for_more(10)
    assert not load.failures
    assert not load.truncated
