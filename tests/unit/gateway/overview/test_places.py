"""Where the mesh is looked at: each process once, however many addresses it has."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import MagicMock

from services.gateway.overview.places import Places
from services.gateway.peers import Peers
from services.runtime.replicas import ReplicaSet, ReplicaState
from services.runtime.settings import parse_settings
from services.runtime.telemetry import Metrics


def test_a_process_with_two_addresses_is_asked_once_at_the_one_that_answers() -> None:
    replicas = ReplicaSet(MagicMock())
    replicas.update(dict.fromkeys(["10.0.0.1:1", "[fd00::1]:1", "10.0.0.2:1", "[fd00::2]:1"]))
    for replica, process in zip(replicas, ("one", "one", "two", "two"), strict=True):
        replica.is_instance(process)
        replica.became(ReplicaState.SERVING)
    first, *_ = replicas
    first.became(ReplicaState.UNREACHABLE)
    channel = SimpleNamespace(
        replicas=replicas, target="cache:1", instruments=SimpleNamespace(peer="cache")
    )
    peers: Any = SimpleNamespace(channels=[channel])
    places = Places(parse_settings({}, {}), cast(Peers, peers), Metrics("gateway"))
    assert [place.address for place in places.all()] == ["[fd00::1]:1", "10.0.0.2:1"]
