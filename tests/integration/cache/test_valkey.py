"""The client and the embedded server as services use them, cluster included."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from google.protobuf.duration_pb2 import Duration

from meshserve.v1 import cache_pb2, types_pb2
from services.runtime.valkey import (
    EmbeddedValkey,
    RateLimiter,
    Script,
    ValkeyRefusedError,
    ValkeyUnavailableError,
    connect,
)
from tests.support.ports import free_ports


def free_port() -> int:
    return free_ports(1)[0]


@contextlib.contextmanager
def running(command: list[str], log: Path):
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.terminate()
        assert process.wait(10) == 0, log.read_text()


async def until_answering(client) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                return await client.ping()
            except ValkeyUnavailableError:
                await asyncio.sleep(0.02)


async def test_the_embedded_server_on_a_port_asks_for_its_password(tmp_path):
    server = EmbeddedValkey(tmp_path, port=free_port(), password=EmbeddedValkey.new_password())
    with running(server.command(), tmp_path / "log"):
        async with connect(server.url) as client:
            await until_answering(client)
            await client.execute("SET", "k", b"\xff\x00")
            assert await client.execute("GET", "k") == b"\xff\x00"
        async with connect(f"redis://127.0.0.1:{server.port}") as stranger:
            with pytest.raises((ValkeyUnavailableError, ValkeyRefusedError)):
                await stranger.execute("GET", "k")


async def test_the_embedded_server_evicts_what_has_a_ttl_and_keeps_the_rest(short_path):
    server = EmbeddedValkey(short_path, unix_socket=short_path / "s", max_memory_bytes=12 * 2**20)
    with running(server.command(), short_path / "log"):
        async with connect(server.url) as client:
            await until_answering(client)
            await client.execute("SET", "quota", "7")
            for number in range(300):
                await client.execute("SET", f"answer:{number}", b"x" * 100_000, "EX", 600)
            assert await client.execute("GET", "quota") == b"7"
            assert 10 < len(await client.execute("KEYS", "answer:*")) < 300


async def test_the_embedded_server_leaves_nothing_on_disk(short_path):
    server = EmbeddedValkey(short_path, unix_socket=short_path / "s")
    with running(server.command(), short_path / "log"):
        async with connect(server.url) as client:
            await until_answering(client)
            await client.execute("SET", "k", "v")
    assert {path.name for path in short_path.iterdir()} == {"valkey.conf", "log"}


@pytest.mark.parametrize("scheme", ["redis", "redis+cluster"])
async def test_nobody_at_the_address_fails_at_once_and_every_time(scheme):
    async with connect(f"{scheme}://127.0.0.1:{free_port()}") as client:
        for _ in range(3):
            started = time.monotonic()
            with pytest.raises(ValkeyUnavailableError):
                await client.execute("GET", "k")
            assert time.monotonic() - started < 0.3


async def test_an_address_that_swallows_packets_costs_one_timeout():
    """A listener that never accepts, with its queue full, drops further connections."""
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        port = deaf.getsockname()[1]
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        async with connect(f"redis://127.0.0.1:{port}") as client:
            with pytest.raises(ValkeyUnavailableError):
                await client.execute("GET", "k")
            started = time.monotonic()
            for _ in range(100):
                with pytest.raises(ValkeyUnavailableError):
                    await client.execute("GET", "k")
            assert time.monotonic() - started < 10, "a time-out each would take 50 s"
        for filler in fillers:
            filler.close()


async def test_scripts_run_after_the_server_forgot_them(client):
    script = Script("return {KEYS[1], ARGV[1]}")
    for _ in range(2):
        assert await client.run_script(script, ["k"], [b"\x00v"]) == [b"k", b"\x00v"]
        await client.execute("SCRIPT", "FLUSH")


async def test_commands_sent_together_are_answered_in_order(client):
    answers = await client.execute_many(
        ("SET", "a", "1"), ("INCR", "a"), ("GET", "a"), ("MGET", "a", "nothing")
    )
    assert answers[1:] == [2, b"2", [b"2", None]]


async def test_a_mistake_in_one_command_is_no_outage(client):
    await client.execute("RPUSH", "list", "x")
    with pytest.raises(ValkeyRefusedError):
        await client.execute("GET", "list")
    assert await client.execute("LLEN", "list") == 1


# Scripts see one and the same TIME from beginning to end, so this goes by the processor's.
BUSY = Script("""
local until_s = os.clock() + tonumber(ARGV[1])
while os.clock() < until_s do end
return ARGV[2]
""")


async def test_a_queue_of_callers_is_not_taken_for_an_outage(client):
    """All get their own answer, although the last ones wait longer than a command may take."""
    values = [b"%d" % number for number in range(1500)]
    started = time.monotonic()
    answers = await asyncio.gather(
        *(client.run_script(BUSY, [], [0.001, value]) for value in values)
    )
    assert answers == values
    assert time.monotonic() - started > 1.2


async def test_one_slow_command_closes_nobody_out(valkey):
    """A command that waits for what does not come times out alone; the server does answer."""
    async with connect(valkey.url, command_timeout_s=0.3) as client:
        slow = asyncio.create_task(client.execute("BLPOP", "nothing", 5))
        async with asyncio.timeout(5):
            while not slow.done():
                await client.execute("SET", "k", "v")
        with pytest.raises(ValkeyUnavailableError):
            await slow
        for _ in range(50):
            assert await client.execute("GET", "k") == b"v"
            await asyncio.sleep(0.005)


async def test_a_closed_client_says_so(valkey):
    client = connect(valkey.url)
    await client.ping()
    await client.close()
    with pytest.raises(ValkeyUnavailableError):
        await client.ping()


@pytest.fixture
async def cluster(tmp_path) -> AsyncIterator[str]:
    """URL of a cluster of three nodes, made of the embedded server's binary."""
    ports = free_ports(3)
    bounds = [0, 5461, 10923, 16384]
    async with contextlib.AsyncExitStack() as stack:
        nodes = []
        for index, port in enumerate(ports):
            command = EmbeddedValkey(tmp_path / str(port), port=port).command()
            stack.enter_context(
                running([*command, "--cluster-enabled", "yes"], tmp_path / f"{port}.log")
            )
            node = await stack.enter_async_context(connect(f"redis://127.0.0.1:{port}"))
            await until_answering(node)
            await node.execute("CLUSTER", "ADDSLOTSRANGE", bounds[index], bounds[index + 1] - 1)
            await node.execute("CLUSTER", "SET-CONFIG-EPOCH", index + 1)
            nodes.append(node)
        for port in ports[1:]:
            await nodes[0].execute("CLUSTER", "MEET", "127.0.0.1", port)
        async with asyncio.timeout(20):
            while not all([await knows_all(node) for node in nodes]):
                await asyncio.sleep(0.05)
        yield "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)


async def knows_all(node) -> bool:
    info = await node.run_script(Script("return redis.call('CLUSTER', 'INFO')"), [])
    return b"cluster_state:ok" in info and b"cluster_known_nodes:3" in info


async def test_the_cache_and_the_rate_limit_work_on_a_cluster(cluster, make_cache):
    stop = types_pb2.FINISH_REASON_STOP
    answer = cache_pb2.CachedAnswer(ends=[cache_pb2.CachedEnd(finish_reason=stop)])
    wanted = [
        cache_pb2.CacheKey(scope=scope, model=model, request=b"%d" % number)
        for scope in ("a", "b")
        for model in ("m1", "m2")
        for number in range(10)
    ]

    async def outcomes(cache) -> list[int]:
        found = await asyncio.gather(
            *(cache.LookUp(cache_pb2.LookUpRequest(key=key)) for key in wanted)
        )
        return [each.outcome == cache_pb2.LookUpResponse.OUTCOME_HIT for each in found]

    async with make_cache(url=cluster) as cache:
        for key in wanted:
            request = cache_pb2.LookUpRequest(key=key, lease_ttl=Duration(seconds=5))
            token = (await cache.LookUp(request)).lease.token
            request = cache_pb2.StoreRequest(key=key, answer=answer, lease_token=token)
            assert (await cache.Store(request)).stored
        assert all(await outcomes(cache))
        assert (await cache.GetStats(cache_pb2.GetStatsRequest())).entries == 40
        forgotten = await cache.Invalidate(cache_pb2.InvalidateRequest(scope="a"))
        assert forgotten.invalidated == 20
        assert await outcomes(cache) == [key.scope == "b" for key in wanted]
        assert (await cache.Invalidate(cache_pb2.InvalidateRequest(model="m1"))).invalidated == 10
        assert (
            await cache.Invalidate(cache_pb2.InvalidateRequest(key=wanted[-1]))
        ).invalidated == 1
        assert (await cache.GetStats(cache_pb2.GetStatsRequest())).entries == 9
        assert (await cache.Invalidate(cache_pb2.InvalidateRequest(all=True))).invalidated == 9
        assert not any(await outcomes(cache))
    async with connect(cluster) as client:
        limiter = RateLimiter(client)
        for number in range(30):
            key = f"tenant-{number}"
            assert (await limiter.acquire(key, limit_per_minute=1, burst=1)).allowed
            assert not (await limiter.acquire(key, limit_per_minute=1, burst=1)).allowed
        await client.ping()
