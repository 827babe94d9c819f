"""Short calls that travel together on one stream, the answering side."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from opentelemetry import context as otel_context

from meshserve.v1 import calls_pb2, calls_pb2_grpc
from services.runtime import deadline
from services.runtime.carried_calls import CarriedCall, CarriedCalls
from services.runtime.errors import Reason, ServiceError, invalid_field, to_session_status
from services.runtime.telemetry import Metrics

log = logging.getLogger(__name__)

MAX_OPEN_CALLS = 4096
# What has been answered goes in several messages above this size.
MAX_MESSAGE_BYTES = 2**20


class CallHost(calls_pb2_grpc.CallServiceServicer):
    """Answers by the unary methods of a server's other services.

    Args:
        metrics: those of the service.
        draining: once set no call is begun, and each stream ends with its last one.
    """

    def __init__(self, metrics: Metrics, draining: asyncio.Event) -> None:
        self.draining = draining
        self._metrics = metrics
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._methods: dict[str, _Method] = {}

    def beside(self, server: grpc.aio.Server) -> Any:
        """What services register at, so that their methods can be carried as well. They see no
        gRPC context then, but None."""
        return _NotingServer(server, self._handlers)

    async def CarryCalls(  # noqa: N802
        self,
        request_iterator: AsyncIterator[calls_pb2.CarryCallsRequest],
        context: grpc.aio.ServicerContext[
            calls_pb2.CarryCallsRequest, calls_pb2.CarryCallsResponse
        ],
    ) -> AsyncIterator[calls_pb2.CarryCallsResponse]:
        """The answers to many calls, as they are found."""
        async with aclosing(_Stream(self).serve(request_iterator)) as messages:
            async for message in messages:
                yield message

    def method(self, name: str) -> _Method:
        """A method by its full name. Raises ServiceError."""
        known = self._methods.get(name)
        if known is not None:
            return known
        details = _Details(f"/{name}")
        for handler in self._handlers:
            found: Any = handler.service(details)  # type: ignore[arg-type]
            if found is not None and found.unary_unary is not None:
                method = _Method(found, CarriedCalls(name, self._metrics))
                self._methods[name] = method
                return method
        raise invalid_field("inputs.method", "no method of this name can be carried")


@dataclass(frozen=True, slots=True)
class _Details:
    """What a handler is found by."""

    method: str
    invocation_metadata: tuple[()] = ()


@dataclass(frozen=True, slots=True)
class _Method:
    handler: Any
    records: CarriedCalls

    async def answer(self, request: bytes) -> bytes:
        """The serialized response. Raises what the servicer raises."""
        try:
            message = self.handler.request_deserializer(request)
        except (DecodeError, ValueError):
            raise ServiceError(
                Reason.MALFORMED_MESSAGE, "the request is not a message of the expected type"
            ) from None
        response = await self.handler.unary_unary(message, None)
        return bytes(self.handler.response_serializer(response))


class _NotingServer:
    """Passes handlers on to the server, and notes them."""

    def __init__(self, server: grpc.aio.Server, handlers: list[grpc.GenericRpcHandler]) -> None:
        self._server = server
        self._handlers = handlers

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Called by generated code."""
        self._handlers.extend(handlers)
        self._server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service_name: str, handlers: Any) -> None:
        """Called by generated code."""
        self._server.add_registered_method_handlers(service_name, handlers)


class _Stream:
    """One caller's stream: a task for each call, and what they have found."""

    def __init__(self, host: CallHost) -> None:
        self._host = host
        self._open: dict[int, asyncio.Task[None]] = {}
        self._found: list[calls_pb2.CarriedResponse] = []
        self._something = asyncio.Event()

    async def serve(
        self, requests: AsyncIterator[calls_pb2.CarryCallsRequest]
    ) -> AsyncGenerator[calls_pb2.CarryCallsResponse]:
        """Yields messages until the caller is done, or the last call of a replica that drains has
        ended. Leaving it cancels the calls."""
        reading = asyncio.create_task(self._read(requests))
        drain = asyncio.create_task(self._host.draining.wait())
        for task in (reading, drain):
            task.add_done_callback(lambda _: self._something.set())
        try:
            while True:
                await self._something.wait()
                self._something.clear()
                while self._found:
                    yield self._message()
                if not self._open and (reading.done() or drain.done()):
                    if reading.done():
                        await reading
                    return
        finally:
            reading.cancel()
            drain.cancel()
            for call in self._open.values():
                call.cancel()

    async def _read(self, requests: AsyncIterator[calls_pb2.CarryCallsRequest]) -> None:
        async for request in requests:
            for message in request.inputs:
                try:
                    self._take(message)
                except ServiceError as error:
                    self._answer(message.session_id, error=error)

    def _take(self, message: calls_pb2.CarriedRequest) -> None:
        session_id = message.session_id
        if message.cancel:
            task = self._open.get(session_id)
            if task is not None:
                task.cancel()
            return
        if session_id in self._open:
            raise invalid_field("inputs.session_id", f"call {session_id} is open already")
        if self._host.draining.is_set():
            raise ServiceError(Reason.DRAINING, "the replica is shutting down", retry_after_s=0.1)
        if len(self._open) >= MAX_OPEN_CALLS:
            raise ServiceError(
                Reason.QUEUE_FULL,
                f"the stream holds {MAX_OPEN_CALLS} calls already",
                retry_after_s=1.0,
            )
        method = self._host.method(message.method)
        call = method.records.begin(message.trace)
        self._open[session_id] = asyncio.create_task(self._run(message, method, call))

    async def _run(
        self, message: calls_pb2.CarriedRequest, method: _Method, call: CarriedCall
    ) -> None:
        # The task has a context of its own, so what is set here ends with the call.
        deadline.set_remaining(
            message.timeout_ms / 1000 if message.HasField("timeout_ms") else None
        )
        otel_context.attach(call.context)
        failure: ServiceError | None = None
        response = b""
        try:
            response = await method.answer(message.request)
        except asyncio.CancelledError:
            self._end(message.session_id)
            call.end(ServiceError(Reason.CANCELLED, "the caller gave it up"))
            raise
        except ServiceError as error:
            failure = error
        except Exception as error:
            log.error("unexpected error", exc_info=error, extra={"method": message.method})
            failure = ServiceError(Reason.INTERNAL, "internal error; the server's log has the rest")
        call.end(failure)
        self._end(message.session_id)
        self._answer(message.session_id, response, failure)

    def _end(self, session_id: int) -> None:
        del self._open[session_id]
        self._something.set()

    def _answer(
        self, session_id: int, response: bytes = b"", error: ServiceError | None = None
    ) -> None:
        self._found.append(
            calls_pb2.CarriedResponse(
                session_id=session_id,
                response=response,
                error=None if error is None else to_session_status(error),
            )
        )
        self._something.set()

    def _message(self) -> calls_pb2.CarryCallsResponse:
        size_bytes = count = 0
        while count < len(self._found) and size_bytes < MAX_MESSAGE_BYTES:
            size_bytes += self._found[count].ByteSize()
            count += 1
        message = calls_pb2.CarryCallsResponse(outputs=self._found[:count])
        del self._found[:count]
        return message
