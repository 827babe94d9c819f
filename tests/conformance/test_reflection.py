"""Clients that know nothing of MeshServe: reflection, health, and gRPC as it comes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)

from tests.support.mesh import SERVICES, Mesh

SERVICE_NAMES = {
    "gateway": "meshserve.v1.InferenceService",
    "tokenizer": "meshserve.v1.TokenizerService",
    "engine": "meshserve.v1.EngineService",
    "cache": "meshserve.v1.CacheService",
    "safety": "meshserve.v1.SafetyService",
}
# Services whose short calls travel on a shared stream.
CARRYING = ("tokenizer", "safety")
CALL_SERVICE = "meshserve.v1.CallService"
SERVING = health_pb2.HealthCheckResponse.SERVING


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory, demo_model_path: Path) -> Iterator[Mesh]:
    with Mesh(tmp_path_factory.mktemp("reflected")) as started:
        yield started


class Reflected:
    """A client that is built from what the server says of itself."""

    def __init__(self, channel: Any) -> None:
        self.database = ProtoReflectionDescriptorDatabase(channel)
        self._pool = DescriptorPool(self.database)
        self._channel = channel

    def method(self, service: str, name: str) -> tuple[Any, type[Any]]:
        """The callable of a method, and the class of its requests."""
        found = self._pool.FindServiceByName(service).FindMethodByName(name)
        request, response = GetMessageClass(found.input_type), GetMessageClass(found.output_type)
        make = self._channel.unary_stream if found.server_streaming else self._channel.unary_unary
        call = make(
            f"/{service}/{name}",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        return call, request


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_lists_and_describes_itself(mesh: Mesh, service: str) -> None:
    with mesh.channel(service) as channel:
        reflected = Reflected(channel)
        assert set(reflected.database.get_services()) == {
            SERVICE_NAMES[service],
            *([CALL_SERVICE] if service in CARRYING else []),
            *(
                ["meshserve.v1.AdminService", "meshserve.v1.MeshService"]
                if service == "gateway"
                else []
            ),
            "meshserve.v1.MonitorService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        pool = DescriptorPool(reflected.database)
        described = pool.FindServiceByName(SERVICE_NAMES[service])
        assert described.methods
        for method in described.methods:
            assert method.input_type.file.package.startswith(("meshserve.v1", "google."))


def test_an_answer_can_be_had_from_reflection_alone(mesh: Mesh) -> None:
    with mesh.channel() as channel:
        generate, request = Reflected(channel).method(SERVICE_NAMES["gateway"], "Generate")
        message = request(text="The capital of France is")
        message.sampling.temperature = 0
        message.stopping.max_tokens = 6
        answer = generate(message, timeout=60)
    assert "Paris" in answer.choices[0].text
    assert answer.usage.completion_tokens == 6


def test_a_stream_can_be_had_from_reflection_alone(mesh: Mesh) -> None:
    with mesh.channel() as channel:
        stream, request = Reflected(channel).method(SERVICE_NAMES["gateway"], "StreamChat")
        message = request()
        message.request.conversation.messages.add(role=2, content="What is the capital of France?")
        message.request.sampling.temperature = 0
        events = list(stream(message, timeout=60))
    kinds = [event.WhichOneof("event") for event in events]
    assert kinds[0] == "started"
    assert kinds[-1] == "complete"
    assert set(kinds[1:-1]) == {"chunk"}
    text = "".join(delta.content for event in events for delta in event.chunk.deltas)
    assert "Paris" in text


async def test_the_asyncio_kind_of_client_can_do_the_same(mesh: Mesh) -> None:
    """Described over a blocking channel, called over an asynchronous one."""
    with mesh.channel() as blocking:
        pool = DescriptorPool(ProtoReflectionDescriptorDatabase(blocking))
        method = pool.FindServiceByName(SERVICE_NAMES["gateway"]).FindMethodByName("StreamGenerate")
        request, response = GetMessageClass(method.input_type), GetMessageClass(method.output_type)
    async with grpc.aio.insecure_channel(mesh.target) as channel:
        stream = channel.unary_stream(
            f"/{SERVICE_NAMES['gateway']}/StreamGenerate",
            request_serializer=request.SerializeToString,
            response_deserializer=response.FromString,
        )
        message = request()
        message.request.text = "One, two, three,"
        message.request.sampling.temperature = 0
        message.request.stopping.max_tokens = 5
        call = stream(message, timeout=60)
        events = [event async for event in call]
        assert await call.code() is grpc.StatusCode.OK
    assert events[-1].complete.usage.completion_tokens == 5


@pytest.mark.parametrize("service", SERVICES)
def test_health_is_told_by_name(mesh: Mesh, service: str) -> None:
    with mesh.channel(service) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE_NAMES[service]):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert answer.status == SERVING
            watch = stub.Watch(health_pb2.HealthCheckRequest(service=name), timeout=5)
            assert next(iter(watch)).status == SERVING
            watch.cancel()
        with pytest.raises(grpc.RpcError) as error:
            stub.Check(health_pb2.HealthCheckRequest(service="no.such.Service"), timeout=5)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_is_told_to_asyncio_clients_too(mesh: Mesh) -> None:
    for service in SERVICES:
        address = f"127.0.0.1:{mesh.ports[service]}"
        async with grpc.aio.insecure_channel(address) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            request = health_pb2.HealthCheckRequest(service=SERVICE_NAMES[service])
            assert (await stub.Check(request, timeout=5)).status == SERVING
