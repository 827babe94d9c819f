"""Asks one replica, and tells in a few words why it does not answer."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError, Message

# A replica that takes longer is shown as one that does not answer.
ANSWER_TIMEOUT_S = 1.0
# Polls are no part of any trace: this one is not recorded.
_UNRECORDED_TRACE = ("traceparent", f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00")

AnswerT = TypeVar("AnswerT", bound=Message)


class NotAnsweredError(Exception):
    """A replica has not answered; the text says why."""


async def ask(
    rpc: Callable[..., Awaitable[bytes]],
    request: Message,
    answer: type[AnswerT],
    authorization: str | None = None,
) -> AnswerT:
    """What a replica answers, asked in the name of an `authorization` header or nobody's. Raises
    NotAnsweredError after ANSWER_TIMEOUT_S at the latest."""
    metadata = [_UNRECORDED_TRACE]
    if authorization is not None:
        metadata.append(("authorization", authorization))
    asked = request.SerializeToString()
    try:
        return answer.FromString(await rpc(asked, timeout=ANSWER_TIMEOUT_S, metadata=metadata))
    except (grpc.RpcError, grpc.aio.UsageError, DecodeError, asyncio.CancelledError) as error:
        if _is_ours_to_end(error):
            raise
        raise NotAnsweredError(_why(error)) from error


def _is_ours_to_end(error: BaseException) -> bool:
    """Whether the poll is given up, in contrast to a connection that was closed while it was under
    way because its replica has left."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def _why(error: BaseException) -> str:
    if isinstance(error, DecodeError):
        return "answers with something else; is it a replica at all?"
    if not isinstance(error, grpc.aio.AioRpcError):
        return "its connection was closed"
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer within {ANSWER_TIMEOUT_S:g} s"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return "does not tell; is it of an older version?"
    # gRPC names the address over and over; what happened stands last.
    return details.rpartition(": ")[2] or code.name
