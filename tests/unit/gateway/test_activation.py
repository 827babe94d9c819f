"""Requests for a model whose engines run only while they are asked for."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import grpc
import pytest

from tests.fakes.scripted_mesh import MODEL, ScriptedMesh
from tests.support.errors import failure_of
from tests.support.ports import free_ports
from tests.support.waiting import until

WAITING = "meshserve_gateway_requests_awaiting_engine"


def on_demand(timeout_s: float = 10.0, **fields: str) -> dict[str, object]:
    return {MODEL: {"source": MODEL, "activation_timeout_s": timeout_s, **fields}}


async def test_a_request_waits_for_the_engine_that_it_asks_for(tmp_path: Path) -> None:
    async with ScriptedMesh(tmp_path, models=on_demand()) as mesh:
        await mesh.generate()
        await mesh.kill("engine")
        await asyncio.sleep(1.1)
        waiting = [asyncio.create_task(mesh.generate()) for _ in range(3)]
        await until(lambda: mesh.count(WAITING, model=MODEL) == 3)
        await mesh.start("engine")
        for answer in await asyncio.gather(*waiting):
            assert answer.choices[0].text == "onetwo"
        assert mesh.count(WAITING, model=MODEL) == 0


async def test_it_fails_when_none_has_come_in_time(tmp_path: Path) -> None:
    async with ScriptedMesh(tmp_path, models=on_demand(0.7)) as mesh:
        await mesh.generate()
        await mesh.kill("engine")
        await asyncio.sleep(1.1)
        with pytest.raises(grpc.RpcError) as error:
            await mesh.generate()
        failure = failure_of(error.value)
        assert (failure.reason, failure.metadata["service"]) == ("SERVICE_UNAVAILABLE", "engine")
        assert "within 0.7 s" in failure.message
        assert mesh.count(WAITING, model=MODEL) == 0


async def test_a_model_that_is_not_started_on_demand_fails_at_once(tmp_path: Path) -> None:
    async with ScriptedMesh(tmp_path) as mesh:
        await mesh.generate()
        await mesh.kill("engine")
        started = time.monotonic()
        with pytest.raises(grpc.RpcError):
            await mesh.generate()
        assert time.monotonic() - started < 10, "it has 20 s"


async def test_a_cached_answer_needs_no_engine(tmp_path: Path) -> None:
    async with ScriptedMesh(tmp_path, models=on_demand(), cache={"enabled": True}) as mesh:
        first = await mesh.generate(temperature=0)
        await until(lambda: bool(mesh.cache.answers))
        await mesh.kill("engine")
        assert (await mesh.generate(temperature=0)).choices == first.choices
        assert mesh.count(WAITING, model=MODEL) == 0


async def test_a_gateway_serves_before_an_engine_has_ever_run(tmp_path: Path) -> None:
    (port,) = free_ports(1)
    models = on_demand(engine_target=f"ipv4:127.0.0.1:{port}")
    async with ScriptedMesh(tmp_path, models=models) as mesh:
        await mesh.gateway.probe()
        request = asyncio.create_task(mesh.generate())
        await until(lambda: mesh.count(WAITING, model=MODEL) == 1)
        await mesh.start("engine", port)
        assert (await request).choices[0].text == "onetwo"
