"""The cache as a process of its own: health that tells the truth, and a clean end."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
import time

import grpc
import pytest
import yaml
from google.protobuf.duration_pb2 import Duration
from grpc_health.v1 import health_pb2, health_pb2_grpc

from meshserve.v1 import cache_pb2, cache_pb2_grpc, types_pb2
from services.runtime.errors import Reason, ServiceError
from tests.support.ports import free_ports

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
SERVICE = "meshserve.v1.CacheService"
KEY = cache_pb2.CacheKey(model="m", request=b"r")


@contextlib.asynccontextmanager
async def cache_process(tmp_path, url: str):
    address = f"127.0.0.1:{free_ports(1)[0]}"
    config = tmp_path / "meshserve.yaml"
    section = {"listen": address, "metrics_listen": None, "drain_timeout_s": 5}
    config.write_text(yaml.safe_dump({"cache": section, "valkey": {"url": url}}))
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "services.cache", "--config", str(config)),
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with grpc.aio.insecure_channel(address) as channel:
            yield process, channel
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def until_status(channel, wanted: int) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(grpc.aio.AioRpcError):
                request = health_pb2.HealthCheckRequest(service=SERVICE)
                if (await stub.Check(request, wait_for_ready=True)).status == wanted:
                    return
            await asyncio.sleep(0.02)


async def test_health_follows_the_server_and_waiters_are_let_go_at_the_end(tmp_path, valkey):
    async with cache_process(tmp_path, valkey.url) as (process, channel):
        await until_status(channel, SERVING)
        valkey.kill()
        await until_status(channel, NOT_SERVING)
        valkey.start()
        await until_status(channel, SERVING)
        cache = cache_pb2_grpc.CacheServiceStub(channel)
        leased = cache_pb2.LookUpRequest(key=KEY, lease_ttl=Duration(seconds=60))
        assert (await cache.LookUp(leased)).lease.token
        waiter = cache.LookUp(cache_pb2.LookUpRequest(key=KEY, wait=Duration(seconds=60)))
        await asyncio.sleep(0.3)
        started = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert (await waiter).outcome == cache_pb2.LookUpResponse.OUTCOME_PENDING
        assert await process.wait() == 0
        assert time.monotonic() - started < 30, "it would have waited for 60 s"


async def test_losing_the_server_under_load_gives_clean_errors_alone(tmp_path, valkey):
    """On the services' own event loop, whose broken connections fail in ways of their own."""
    answer = cache_pb2.CachedAnswer(
        chunks=[cache_pb2.CachedChunk(text="x" * 20_000)],
        ends=[cache_pb2.CachedEnd(finish_reason=types_pb2.FINISH_REASON_STOP)],
    )
    failures: list[ServiceError] = []
    served = 0
    running = True

    async def caller(cache, number: int) -> None:
        nonlocal served
        key = cache_pb2.CacheKey(model="m", request=b"%d" % number)
        while running:
            try:
                await cache.Store(cache_pb2.StoreRequest(key=key, answer=answer), timeout=10)
                await cache.LookUp(cache_pb2.LookUpRequest(key=key), timeout=10)
                served += 1
            except grpc.aio.AioRpcError as error:
                failures.append(ServiceError.from_rpc_error(error, peer="cache"))
                await asyncio.sleep(0.01)

    async with cache_process(tmp_path, valkey.url) as (_, channel):
        await until_status(channel, SERVING)
        cache = cache_pb2_grpc.CacheServiceStub(channel)
        callers = [asyncio.create_task(caller(cache, number)) for number in range(16)]
        for _ in range(4):
            await asyncio.sleep(0.3)
            valkey.kill()
            await asyncio.sleep(0.2)
            valkey.start()
        before = served
        await asyncio.sleep(1.5)
        running = False
        await asyncio.gather(*callers)
    assert served > before
    assert failures
    assert {failure.reason for failure in failures} == {Reason.CACHE_BACKEND_UNAVAILABLE}


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "redis://:hunter2@127.0.0.1/db"])
async def test_an_unusable_url_ends_the_process_with_a_way_out(tmp_path, url):
    async with cache_process(tmp_path, url) as (process, _):
        _, errors = await asyncio.wait_for(process.communicate(), 15)
        assert process.returncode == 78
        assert b"valkey.url" in errors
        assert b"Traceback" not in errors
        assert b"hunter2" not in errors
