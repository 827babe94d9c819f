"""Generations on shared streams: spread over the replicas, tried again where that is safe."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import grpc
import pytest

from meshserve.v1 import engine_pb2, engine_pb2_grpc
from services.gateway import engine_loads
from services.gateway.engine_calls import EngineCall, EngineCalls
from services.gateway.engine_loads import EngineLoads
from services.runtime import deadline
from services.runtime.channels import connect
from services.runtime.errors import Reason, ServiceError
from services.runtime.response_streams import standing
from services.runtime.server_calls import CallInterceptor
from services.runtime.telemetry import Metrics
from tests.fakes.scripted_mesh import (
    Engine,
    EngineRequest,
    EngineResponse,
    chunk,
    complete,
)
from tests.support.ports import free_ports
from tests.support.waiting import until

METHOD = "meshserve.v1.EngineService/Generate"


class Replicas:
    """Scripted engines behind one target, and the calls to them."""

    def __init__(self, count: int) -> None:
        self.engines = [Engine() for _ in range(count)]
        self.metrics = Metrics("gateway")
        self._ports = free_ports(count)
        self._servers: list[grpc.aio.Server | None] = [None] * count
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Replicas:
        for number in range(len(self.engines)):
            await self.start(number)
        self.calls = self.gateway(*range(len(self.engines)))
        return self

    def gateway(self, *numbers: int) -> EngineCalls:
        """The calls of a gateway that knows some of the engines."""
        channel = connect(
            ",".join(f"127.0.0.1:{self._ports[number]}" for number in numbers),
            peer="engine",
            health_service="meshserve.v1.EngineService",
            metrics=self.metrics,
        )
        calls = EngineCalls(
            channel.replicas,
            lambda replica: standing(
                engine_pb2_grpc.EngineServiceStub(channel.at(replica)).GenerateMany
            ),
            channel.instruments,
            2**20,
        )
        loads = EngineLoads(channel)
        self._stack.push_async_callback(channel.close)
        self._stack.callback(loads.close)
        self._stack.callback(calls.close)
        return calls

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()
        for number, server in enumerate(self._servers):
            if server is not None:
                await self.kill(number)

    async def start(self, number: int) -> None:
        server = grpc.aio.server(
            interceptors=[CallInterceptor(Metrics("engine"))], options=[("grpc.so_reuseport", 0)]
        )
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self.engines[number], server)
        server.add_insecure_port(f"127.0.0.1:{self._ports[number]}")
        await server.start()
        self._servers[number] = server

    async def kill(self, number: int) -> None:
        server = self._servers[number]
        assert server is not None
        self._servers[number] = None
        await server.stop(0)

    def generate(self, name: str = "r") -> EngineCall:
        return self.calls.generate(EngineRequest(request_id=name))

    def counted(self, code: str) -> float | None:
        labels = {"method": METHOD, "code": code}
        return self.metrics.registry.get_sample_value("meshserve_rpc_client_calls_total", labels)


async def waits(request: EngineRequest) -> AsyncIterator[EngineResponse]:
    yield chunk((0, [1]))
    await asyncio.sleep(3600)
    yield complete()


async def silent(request: EngineRequest) -> AsyncIterator[EngineResponse]:
    await asyncio.sleep(3600)
    yield complete()


async def two_tokens(call: EngineCall) -> list[int]:
    return [
        token_id
        async for output in call
        for delta in output.chunk.deltas
        for token_id in delta.token_ids
    ]


async def test_requests_are_spread_over_all_replicas() -> None:
    async with Replicas(3) as replicas:
        await until(lambda: all(replica.takes_calls for replica in replicas.calls.replicas))
        for engine in replicas.engines:
            engine.script = waits
        calls = [replicas.generate(f"r{number}") for number in range(12)]
        for call in calls:
            await anext(call)
        assert [engine.active for engine in replicas.engines] == [4, 4, 4]
        for call in calls:
            call.cancel()
        await until(lambda: not any(engine.active for engine in replicas.engines))


async def test_what_engines_do_for_other_gateways_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_loads, "REPORT_INTERVAL_MS", 10)
    async with Replicas(2) as replicas:
        for engine in replicas.engines:
            engine.script = waits
        other = replicas.gateway(0)
        theirs = [other.generate(EngineRequest(request_id=f"o{number}")) for number in range(4)]
        for call in theirs:
            await anext(call)
        await until(lambda: sum(each.elsewhere for each in replicas.calls.replicas) == 4)
        ours = [replicas.generate(f"r{number}") for number in range(6)]
        for call in ours:
            await anext(call)
        assert [engine.active for engine in replicas.engines] == [5, 5]
        for call in [*theirs, *ours]:
            call.cancel()
        await until(lambda: not any(each.load for each in replicas.calls.replicas))


async def test_a_replica_that_comes_later_gets_its_share() -> None:
    async with Replicas(2) as replicas:
        await replicas.kill(1)
        await two_tokens(replicas.generate())
        await replicas.start(1)
        async with asyncio.timeout(20):
            while not replicas.engines[1].requests:
                await two_tokens(replicas.generate())
                await asyncio.sleep(0.05)


async def test_a_request_that_has_heard_nothing_goes_to_another_replica() -> None:
    async with Replicas(2) as replicas:
        for engine in replicas.engines:
            engine.script = silent
        call = replicas.generate()
        answer = asyncio.create_task(two_tokens(call))
        await until(lambda: any(engine.active for engine in replicas.engines))
        lost = next(n for n, engine in enumerate(replicas.engines) if engine.active)

        async def speaks(request: EngineRequest) -> AsyncIterator[EngineResponse]:
            yield chunk((0, [1, 2]))
            yield complete()

        replicas.engines[1 - lost].script = speaks
        await replicas.kill(lost)
        assert await answer == [1, 2]
        assert replicas.counted("OK") == 1


async def test_a_request_that_has_begun_is_unavailable_with_the_others_on_its_stream() -> None:
    async with Replicas(1) as replicas:
        replicas.engines[0].script = waits
        calls = [replicas.generate(f"r{number}") for number in range(3)]
        for call in calls:
            assert (await anext(call)).chunk.deltas[0].token_ids == [1]
        await replicas.kill(0)
        for call in calls:
            with pytest.raises(ServiceError) as raised:
                await anext(call)
            assert raised.value.reason is Reason.SERVICE_UNAVAILABLE
            assert raised.value.retry_after_s
        assert replicas.counted("UNAVAILABLE") == 3


async def test_a_request_that_has_begun_is_not_begun_again_elsewhere() -> None:
    async with Replicas(2) as replicas:
        for engine in replicas.engines:
            engine.script = waits
        call = replicas.generate()
        await anext(call)
        (begun,) = (n for n, engine in enumerate(replicas.engines) if engine.requests)
        await replicas.kill(begun)
        with pytest.raises(ServiceError) as raised:
            await anext(call)
        assert raised.value.reason is Reason.SERVICE_UNAVAILABLE
        assert not replicas.engines[1 - begun].requests


async def test_what_was_lost_with_a_stream_is_under_way_no_more_and_the_next_has_a_new_one() -> (
    None
):
    async with Replicas(1) as replicas:
        replicas.engines[0].script = waits
        call = replicas.generate()
        await anext(call)
        (replica,) = replicas.calls.replicas
        assert replica.in_flight == 1
        await replicas.kill(0)
        with pytest.raises(ServiceError):
            await anext(call)
        assert replica.in_flight == 0
        await replicas.start(0)
        await until(lambda: replica.takes_calls)
        again = replicas.generate()
        assert (await anext(again)).chunk.deltas[0].token_ids == [1]
        again.cancel()


async def test_an_engine_that_is_away_is_said_to_be_so() -> None:
    async with Replicas(1) as replicas:
        await replicas.kill(0)
        async with asyncio.timeout(15):
            with pytest.raises(ServiceError) as raised:
                await two_tokens(replicas.generate())
        assert raised.value.reason is Reason.SERVICE_UNAVAILABLE


async def test_an_error_of_one_request_is_its_own() -> None:
    async def script(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        yield chunk((0, [1]))
        if request.request_id == "bad":
            raise ServiceError(Reason.SEQUENCE_FAILED, "no")
        yield chunk((0, [2]))
        yield complete()

    async with Replicas(1) as replicas:
        replicas.engines[0].script = script
        bad, good = replicas.generate("bad"), replicas.generate("good")
        assert (await anext(bad)).chunk.deltas[0].token_ids == [1]
        with pytest.raises(ServiceError) as raised:
            await anext(bad)
        assert raised.value.reason is Reason.SEQUENCE_FAILED
        assert await two_tokens(good) == [1, 2]


async def test_a_deadline_ends_the_request_here_and_there() -> None:
    async with Replicas(1) as replicas:
        replicas.engines[0].script = waits

        async def late() -> None:
            deadline.set_remaining(0.3)
            async with replicas.generate() as call:
                async for _ in call:
                    pass

        with pytest.raises(ServiceError) as raised:
            await asyncio.create_task(late())
        assert raised.value.reason is Reason.DEADLINE_EXCEEDED
        await until(lambda: replicas.engines[0].left == 1)


async def test_a_request_that_is_left_is_given_up_and_counted_as_cancelled() -> None:
    async with Replicas(1) as replicas:
        replicas.engines[0].script = waits
        async with replicas.generate() as call:
            await anext(call)
        await until(lambda: replicas.engines[0].left == 1)
        assert replicas.counted("CANCELLED") == 1


async def test_what_a_slow_reader_has_not_read_comes_at_once() -> None:
    async def script(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        for number in range(5):
            yield chunk((0, [number]), *([(1, [10 + number])] if number else []), logprobs=True)
        yield complete(1)
        yield complete(0)

    async with Replicas(1) as replicas:
        replicas.engines[0].script = script
        async with replicas.generate() as call:
            await until(lambda: call._is_over)
            outputs: list[engine_pb2.GenerationOutput] = [output async for output in call]
        (output,) = outputs
        assert {delta.index: list(delta.token_ids) for delta in output.chunk.deltas} == {
            0: [0, 1, 2, 3, 4],
            1: [11, 12, 13, 14],
        }
        assert [len(delta.logprobs.positions) for delta in output.chunk.deltas] == [5, 4]
        assert [end.index for end in output.completes] == [1, 0]


async def test_a_request_too_large_for_the_stream_fails_alone() -> None:
    async with Replicas(1) as replicas:
        with pytest.raises(ServiceError) as raised:
            replicas.generate("x" * 2**20)
        assert raised.value.reason is Reason.MESSAGE_TOO_LARGE
        assert await two_tokens(replicas.generate())
