"""Answers that come message by message, as server-sent events.

A stream that ends well ends with the event `done`, one that fails with the event `error`; what ends
with neither was cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from typing import Any

from aiohttp import web
from google.protobuf import json_format
from google.protobuf.message import Message

from services.gateway.http.calls import Call, until_deadline
from services.gateway.http.errors import error_document
from services.runtime.errors import ServiceError

HEADERS = {
    "Content-Type": "text/event-stream; charset=utf-8",
    "Cache-Control": "no-store",
    # nginx would gather the events.
    "X-Accel-Buffering": "no",
}
# A reader that takes nothing for so long is gone.
WRITE_TIMEOUT_S = 30.0
# A comment now and then, so that proxies keep a quiet stream open and a lost reader shows.
HEARTBEAT_S = 15.0


def to_json(message: Message) -> str:
    """The JSON form of a message, on one line and with the contract's own field names."""
    return json_format.MessageToJson(message, preserving_proto_field_name=True, indent=None)


async def answer_stream(call: Call, messages: AsyncGenerator[Message]) -> web.StreamResponse:
    """Sends messages until they end, the deadline passes, or the reader goes away, which closes
    `messages`. An error before the first message is raised; one after it is sent."""
    async with aclosing(messages):
        async with until_deadline():
            first = await anext(messages)
        response = await _open(call)
        try:
            async with until_deadline():
                await _send(response, to_json(first))
                async for message in messages:
                    await _send(response, to_json(message))
                await _send(response, "{}", "done")
        except ServiceError as error:
            await _send(response, json.dumps(error_document(error)), "error")
    await response.write_eof()
    return response


async def answer_watch(
    call: Call, documents: AsyncGenerator[str], draining: asyncio.Event
) -> web.StreamResponse:
    """Sends JSON documents as they change, until the reader goes away or the gateway shuts down."""
    async with aclosing(documents):
        first = await anext(documents)
        response = await _open(call)
        try:
            await _send(response, first)
            async with aclosing(_with_heartbeats(documents, draining)) as beats:
                async for document in beats:
                    if document is None:
                        await _write(response, b":\n\n")
                    else:
                        await _send(response, document)
        except ServiceError as error:
            await _send(response, json.dumps(error_document(error)), "error")
    await response.write_eof()
    return response


async def _with_heartbeats(
    documents: AsyncIterator[str], draining: asyncio.Event
) -> AsyncGenerator[str | None]:
    """The documents, and None whenever there has been none for a while."""
    ending = asyncio.create_task(draining.wait())
    following: asyncio.Task[Any] | None = None
    try:
        while not ending.done():
            following = following or asyncio.ensure_future(anext(documents, None))
            done, _ = await asyncio.wait(
                {following, ending},
                timeout=HEARTBEAT_S,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if following in done:
                document, following = following.result(), None
                if document is None:
                    return
                yield document
            elif not done:
                yield None
    finally:
        for task in (ending, following):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, ServiceError):
                    await task


async def _open(call: Call) -> web.StreamResponse:
    response = web.StreamResponse(headers=HEADERS)
    await response.prepare(call.request)
    return response


async def _send(response: web.StreamResponse, document: str, event: str = "message") -> None:
    await _write(response, f"event: {event}\ndata: {document}\n\n".encode())


async def _write(response: web.StreamResponse, data: bytes) -> None:
    async with asyncio.timeout(WRITE_TIMEOUT_S):
        await response.write(data)
