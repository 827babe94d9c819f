"""A service with all four RPC shapes whose requests are small commands, and its client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from google.protobuf.wrappers_pb2 import StringValue

from services.runtime import deadline
from services.runtime.errors import Reason, ServiceError

SERVICE = "test.Shapes"
SECRET = "the password is hunter2"


class Shapes:
    """Does what each request says; `peer`, if given, is asked by the command `peer COMMAND`."""

    def __init__(self, name: str = "", peer: ShapesStub | None = None) -> None:
        self.name = name
        self.peer = peer
        self.calls = 0
        self.began = asyncio.Event()
        self.released = asyncio.Event()
        self.remaining_s: list[float | None] = []

    def add_to(self, server: grpc.aio.Server) -> None:
        text = {
            "request_deserializer": StringValue.FromString,
            "response_serializer": StringValue.SerializeToString,
        }
        handlers = {
            "Unary": grpc.unary_unary_rpc_method_handler(self.unary, **text),
            "FanOut": grpc.unary_stream_rpc_method_handler(self.fan_out, **text),
            "Collect": grpc.stream_unary_rpc_method_handler(self.collect, **text),
            "Exchange": grpc.stream_stream_rpc_method_handler(self.exchange, **text),
        }
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, handlers)])

    async def unary(self, request: StringValue, context: Any) -> Any:
        self.calls += 1
        return await self._obey(request.value, context)

    async def fan_out(self, request: StringValue, context: Any) -> AsyncIterator[Any]:
        """Answers each command of a list separated by semicolons."""
        self.calls += 1
        try:
            for command in request.value.split(";"):
                yield await self._obey(command, context)
        finally:
            self.released.set()

    async def collect(self, requests: AsyncIterator[StringValue], context: Any) -> Any:
        self.calls += 1
        try:
            answers = [await self._obey(request.value, context) async for request in requests]
        finally:
            self.released.set()
        return StringValue(value=" ".join(answer.value for answer in answers))

    async def exchange(
        self, requests: AsyncIterator[StringValue], context: Any
    ) -> AsyncIterator[Any]:
        self.calls += 1
        try:
            async for request in requests:
                yield await self._obey(request.value, context)
        finally:
            self.released.set()

    async def _obey(self, text: str, context: Any) -> Any:
        command, _, argument = text.partition(" ")
        self.remaining_s.append(deadline.remaining_s())
        match command:
            case "raise":
                raise ServiceError(Reason(argument), "as asked", retry_after_s=1.5)
            case "crash":
                raise RuntimeError(SECRET)
            case "unserializable":
                return SECRET
            case "abort":
                await context.abort(grpc.StatusCode.NOT_FOUND, "not here")
            case "set_code":
                context.set_code(grpc.StatusCode.DATA_LOSS)
                return None
            case "sleep":
                await self._sleep(float(argument))
            case "large":
                return StringValue(value="x" * int(argument))
            case "peer":
                assert self.peer is not None
                await asyncio.sleep(0.05)
                return await self.peer.unary(StringValue(value=argument))
            case "name":
                return StringValue(value=self.name)
        return StringValue(value=argument)

    async def _sleep(self, seconds: float) -> None:
        self.began.set()
        try:
            await asyncio.sleep(seconds)
        finally:
            self.released.set()


class ShapesStub:
    """Its methods over a channel, as generated stubs have them."""

    def __init__(self, channel: Any) -> None:
        text = (StringValue.SerializeToString, StringValue.FromString)
        self.unary = channel.unary_unary(f"/{SERVICE}/Unary", *text)
        self.fan_out = channel.unary_stream(f"/{SERVICE}/FanOut", *text)
        self.collect = channel.stream_unary(f"/{SERVICE}/Collect", *text)
        self.exchange = channel.stream_stream(f"/{SERVICE}/Exchange", *text)
        # What a broken caller sends.
        self.unary_bytes = channel.unary_unary(f"/{SERVICE}/Unary", bytes, StringValue.FromString)
        self.exchange_bytes = channel.stream_stream(
            f"/{SERVICE}/Exchange", bytes, StringValue.FromString
        )
