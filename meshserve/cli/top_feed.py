"""Pictures of the mesh as they come from a gateway, for `meshserve top`."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from meshserve.cli.connection import Connection
from meshserve.transport import make_endpoint
from meshserve.v1 import mesh_pb2, mesh_pb2_grpc
from meshserve.wire.statuses import error_from_rpc


async def watch(connection: Connection, interval_s: float) -> AsyncGenerator[mesh_pb2.MeshSnapshot]:
    """The mesh at once and then at an interval, until the connection breaks. Raises
    MeshServeError."""
    endpoint = make_endpoint(
        connection.target,
        api_key=connection.api_key,
        timeout=None,
        tls=connection.tls,
        metadata=None,
    )
    channel = (
        grpc.aio.insecure_channel(endpoint.target, endpoint.channel_options)
        if endpoint.credentials is None
        else grpc.aio.secure_channel(
            endpoint.target, endpoint.credentials, endpoint.channel_options
        )
    )
    request = mesh_pb2.WatchMeshRequest(interval_ms=round(1000 * interval_s))
    async with channel:
        call: Any = mesh_pb2_grpc.MeshServiceStub(channel).WatchMesh(
            request, metadata=endpoint.call_metadata(None)
        )
        try:
            async for response in call:
                yield response.mesh
        except grpc.RpcError as error:
            raise error_from_rpc(error, target=endpoint.target) from error


def plain(message: Message) -> dict[str, Any]:
    """A message as JSON has it: the contract's own names, numbers as numbers, enums as words,
    times in ISO 8601. What is absent is null."""
    return {field.name: _plain_field(message, field) for field in message.DESCRIPTOR.fields}


def _plain_field(message: Message, field: Any) -> Any:
    value = getattr(message, field.name)
    if field.is_repeated:
        return [_plain_value(each, field) for each in value]
    if field.has_presence and not message.HasField(field.name):
        return None
    return _plain_value(value, field)


def _plain_value(value: Any, field: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Message):
        return plain(value)
    if field.enum_type is not None:
        return enum_word(field.enum_type.values_by_number[value].name, field.enum_type.name)
    return value


def enum_word(value: str, enum: str) -> str:
    """`REPLICA_STATE_SERVING` of `ReplicaState` as `serving`."""
    prefix = "".join(f"_{letter}" if letter.isupper() else letter for letter in enum).upper()
    return value.removeprefix(f"{prefix.removeprefix('_')}_").lower()
