"""For how long replicas are waited for, and what they have said is remembered."""

from __future__ import annotations

import time
from typing import cast

import grpc
import pytest

from meshserve.v1 import mesh_pb2
from services.gateway.overview.places import Place
from services.gateway.overview.readings import WINDOW_S
from tests.unit.gateway.overview.test_collector import (
    SERVING,
    UNREACHABLE,
    Found,
    answers,
    collector,
    failure,
    states,
)

PLACE = Place("cache", "10.0.0.1:50054", answers)


class Clock:
    """The time that the collector reads; a test moves it."""

    def __init__(self) -> None:
        self.now_s = 100.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", lambda: clock.now_s)
    return clock


def has_rates(mesh: mesh_pb2.MeshSnapshot, service: str) -> bool:
    (replica,) = (
        each for found in mesh.services if found.service == service for each in found.replicas
    )
    return replica.HasField("cpu_cores")


async def test_what_was_counted_while_nobody_watched_tells_nothing_of_now(clock: Clock) -> None:
    collecting = collector(PLACE)
    assert (await collecting.picture(None)).window_ms == 0
    clock.now_s += 3
    assert (await collecting.picture(None)).window_ms == 3000
    clock.now_s += WINDOW_S + 1
    assert (await collecting.picture(None)).window_ms == 0


async def test_a_replica_that_has_left_is_forgotten(clock: Clock) -> None:
    collecting = collector(PLACE)
    found = cast(Found, collecting._places)
    await collecting.picture(None)
    clock.now_s += 1
    assert has_rates(await collecting.picture(None), "cache")
    found.places = []
    clock.now_s += 1
    await collecting.picture(None)
    found.places = [PLACE]
    clock.now_s += 1
    assert not has_rates(await collecting.picture(None), "cache")


async def test_a_replica_that_hangs_is_waited_for_as_long_as_is_said() -> None:
    async def hangs(_: bytes, timeout: float, **__: object) -> bytes:
        assert timeout == 1.0
        raise failure(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded")

    mesh = await collector(Place("cache", "10.0.0.9:50054", hangs), PLACE).picture(None)
    assert states(mesh, "cache") == {
        "10.0.0.9:50054": (UNREACHABLE, "no answer within 1 s"),
        "10.0.0.1:50054": (SERVING, ""),
    }
