"""A tokenizer whose text of token 7 is `<7>`, as sessions on a shared stream, and its caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc

from meshserve.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from services.gateway.sessions import Session
from services.runtime.channels import MeshChannel
from services.runtime.errors import Reason, ServiceError, invalid_field
from services.runtime.exchanges import SessionPool
from services.runtime.multiplex import SessionHost
from services.runtime.response_streams import standing

POISON, CRASH, SILENCE = 666, 667, 668


def text_of(token_ids: list[int]) -> str:
    return "".join(f"<{token_id}>" for token_id in token_ids)


class EchoSession:
    """Answers tokens with their text; fails on POISON, crashes on CRASH."""

    def __init__(self, opening: tokenizer_pb2.DecodeInput) -> None:
        if opening.open.model == "absent":
            raise ServiceError(Reason.MODEL_NOT_FOUND, "no such model")
        self.finished = False
        self.closed: list[ServiceError | None] = []
        self._id = opening.session_id
        self._decoded = len(opening.open.decoded_token_ids)

    def feed(self, message: tokenizer_pb2.DecodeInput) -> tokenizer_pb2.DecodeOutput | None:
        token_ids = list(message.token_ids)
        if POISON in token_ids:
            raise invalid_field("inputs.token_ids", "poison")
        if CRASH in token_ids:
            raise RuntimeError("a defect")
        if SILENCE in token_ids or not (token_ids or message.finish):
            return None
        self._decoded += len(token_ids)
        self.finished = message.finish
        return tokenizer_pb2.DecodeOutput(
            session_id=self._id,
            text=text_of(token_ids),
            decoded_tokens=self._decoded,
            finished=self.finished,
        )

    def close(self, error: ServiceError | None) -> None:
        self.closed.append(error)


class EchoHost:
    """The server's side: counts messages, can drain."""

    def __init__(self, max_sessions: int = 4096) -> None:
        self.draining = asyncio.Event()
        self.opened: list[EchoSession] = []
        self.batches: list[int] = []
        self.streams = 0
        self.max_sessions = max_sessions

    def host(self) -> SessionHost[Any, Any, Any]:
        return SessionHost(
            inputs_of=lambda request: request.inputs,
            open_session=self._open,
            failed=lambda session_id, status: tokenizer_pb2.DecodeOutput(
                session_id=session_id, finished=True, error=status
            ),
            draining=self.draining,
            max_sessions=self.max_sessions,
        )

    def add_to(self, server: grpc.aio.Server) -> None:
        outer = self

        class Servicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
            async def StreamDecode(self, requests: Any, context: Any) -> AsyncIterator[Any]:
                outer.streams += 1
                async for outputs in outer.host().serve(outer._counted(requests)):
                    yield tokenizer_pb2.StreamDecodeResponse(outputs=outputs)

        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(Servicer(), server)

    @property
    def open_sessions(self) -> int:
        return sum(not session.closed for session in self.opened)

    def _open(self, opening: tokenizer_pb2.DecodeInput) -> EchoSession:
        session = EchoSession(opening)
        self.opened.append(session)
        return session

    async def _counted(self, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        async for request in requests:
            self.batches.append(len(request.inputs))
            yield request


def pool_over(channel: MeshChannel) -> SessionPool[Any, Any]:
    return SessionPool(
        "tokenizer",
        channel.replicas,
        open_stream=lambda replica: standing(
            tokenizer_pb2_grpc.TokenizerServiceStub(channel.at(replica)).StreamDecode
        ),
        make_request=lambda inputs: tokenizer_pb2.StreamDecodeRequest(inputs=inputs),
        outputs_of=lambda response: list(response.outputs),
    )


class Decoding:
    """One completion on the caller's side, which goes on where it was on a new stream."""

    def __init__(self, pool: SessionPool[Any, Any], model: str = "") -> None:
        self.answered: list[int] = []
        self.text = ""
        self._model = model
        self.session = Session(
            pool,
            self._message,
            lambda session_id: tokenizer_pb2.DecodeInput(session_id=session_id, cancel=True),
        )

    async def feed(self, *token_ids: int, finish: bool = False) -> str:
        output = await self.session.exchange((token_ids, finish))
        self.answered += token_ids
        assert output.decoded_tokens == len(self.answered)
        self.text += output.text
        return str(output.text)

    def _message(
        self, session_id: int, payload: tuple[tuple[int, ...], bool], opening: bool
    ) -> tokenizer_pb2.DecodeInput:
        token_ids, finish = payload
        message = tokenizer_pb2.DecodeInput(
            session_id=session_id, token_ids=token_ids, finish=finish
        )
        if opening:
            message.open.model = self._model
            message.open.decoded_token_ids.extend(self.answered)
        return message
