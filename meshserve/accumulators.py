"""Puts the messages of a stream together, without I/O, for both clients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import datetime
from typing import Generic, TypeVar

import grpc

from meshserve.errors import IncompleteStreamError
from meshserve.types import (
    ChatChoice,
    ChatChunk,
    ChatCompletion,
    Choice,
    Completion,
    CompletionChunk,
    Message,
    PositionLogprobs,
    SafetyVerdict,
    Usage,
)
from meshserve.v1 import gateway_pb2
from meshserve.wire import responses

ResponseT = TypeVar(
    "ResponseT", bound=gateway_pb2.StreamGenerateResponse | gateway_pb2.StreamChatResponse
)
ChunkT = TypeVar("ChunkT", bound=CompletionChunk | ChatChunk)
ResultT = TypeVar("ResultT", bound=Completion | ChatCompletion)


class Accumulator(ABC, Generic[ResponseT, ChunkT, ResultT]):
    """Grows one answer out of the messages of a stream.

    Invariant: a result exists only once each of the `expected_choices` choices has said how it
    ended, and nothing is added to a choice after that.
    """

    def __init__(self, expected_choices: int, request_id: str) -> None:
        self.request_id = request_id
        self.model = ""
        self.adapter = ""
        self.create_time: datetime | None = None
        self.prompt_tokens: int | None = None
        self.prompt_logprobs: tuple[PositionLogprobs, ...] = ()
        self.prompt_safety: SafetyVerdict | None = None
        self._expected_choices = expected_choices
        self._chunks: dict[int, list[ChunkT]] = {}
        self._ends: dict[int, gateway_pb2.GenerationComplete] = {}

    def feed(self, response: ResponseT) -> list[ChunkT]:
        """Takes one message and returns what it adds. Raises IncompleteStreamError."""
        self.request_id = response.request_id or self.request_id
        kind = response.WhichOneof("event")
        if kind == "started":
            self._start(response.started)
            return []
        if kind == "complete":
            self._ends[response.complete.index] = response.complete
            return []
        chunks = self._chunks_of(response) if kind == "chunk" else []
        for chunk in chunks:
            if chunk.index in self._ends:
                raise self._broken(f"choice {chunk.index} went on after its end")
            self._chunks.setdefault(chunk.index, []).append(chunk)
        return chunks

    @property
    def usage(self) -> Usage:
        """Tokens of the choices that have ended so far."""
        return responses.total_usage(responses.usage(end.usage) for end in self._ends.values())

    @property
    def cached(self) -> bool:
        """Whether the answer came from the response cache; known once a choice has ended."""
        return any(end.cached for end in self._ends.values())

    def text_of(self, index: int) -> str:
        """Text of one choice so far."""
        return "".join(chunk.text for chunk in self._chunks.get(index, ()))

    def check_complete(self) -> None:
        """Raises IncompleteStreamError unless every choice has ended."""
        missing = max(self._expected_choices, len(self._chunks)) - len(self._ends)
        unfinished = self._chunks.keys() - self._ends.keys()
        if missing > 0 or unfinished:
            raise self._broken("the stream ended before the answer was complete")

    @abstractmethod
    def result(self) -> ResultT:
        """The whole answer. Raises IncompleteStreamError."""

    @abstractmethod
    def _chunks_of(self, response: ResponseT) -> list[ChunkT]: ...

    def _start(self, started: gateway_pb2.GenerationStarted) -> None:
        self.model = started.model
        self.adapter = started.adapter
        if started.HasField("create_time"):
            self.create_time = responses.timestamp(started.create_time)
        self.prompt_tokens = started.prompt_tokens or None
        self.prompt_logprobs = responses.logprobs(started.prompt_logprobs)
        if started.HasField("prompt_safety"):
            self.prompt_safety = responses.verdict(started.prompt_safety)

    def _logprobs_of(self, index: int) -> tuple[PositionLogprobs, ...]:
        return tuple(at for chunk in self._chunks.get(index, ()) for at in chunk.logprobs)

    def _token_ids_of(self, index: int) -> tuple[int, ...]:
        return tuple(id_ for chunk in self._chunks.get(index, ()) for id_ in chunk.token_ids)

    def _broken(self, message: str) -> IncompleteStreamError:
        return IncompleteStreamError(
            message, code=grpc.StatusCode.DATA_LOSS, request_id=self.request_id
        )


class CompletionAccumulator(
    Accumulator[gateway_pb2.StreamGenerateResponse, CompletionChunk, Completion]
):
    """Grows a Completion."""

    def _chunks_of(self, response: gateway_pb2.StreamGenerateResponse) -> list[CompletionChunk]:
        return [responses.completion_chunk(delta) for delta in response.chunk.deltas]

    def result(self) -> Completion:
        self.check_complete()
        return Completion(
            request_id=self.request_id,
            model=self.model,
            adapter=self.adapter,
            choices=tuple(self._choice(index) for index in sorted(self._ends)),
            usage=self.usage,
            cached=self.cached,
            create_time=self.create_time,
            prompt_logprobs=self.prompt_logprobs,
            prompt_safety=self.prompt_safety,
        )

    def _choice(self, index: int) -> Choice:
        end = self._ends[index]
        return Choice(
            index=index,
            text=self.text_of(index),
            finish_reason=responses.finish_reason(end.finish_reason),
            matched_stop=responses.matched_stop(end.matched_stop),
            token_ids=self._token_ids_of(index),
            logprobs=self._logprobs_of(index),
            safety=responses.verdict(end.safety) if end.HasField("safety") else None,
            timings=responses.timings(end.timings) if end.HasField("timings") else None,
        )


class ChatAccumulator(Accumulator[gateway_pb2.StreamChatResponse, ChatChunk, ChatCompletion]):
    """Grows a ChatCompletion."""

    def _chunks_of(self, response: gateway_pb2.StreamChatResponse) -> list[ChatChunk]:
        return [responses.chat_chunk(delta) for delta in response.chunk.deltas]

    def result(self) -> ChatCompletion:
        self.check_complete()
        return ChatCompletion(
            request_id=self.request_id,
            model=self.model,
            adapter=self.adapter,
            choices=tuple(self._choice(index) for index in sorted(self._ends)),
            usage=self.usage,
            cached=self.cached,
            create_time=self.create_time,
            prompt_logprobs=self.prompt_logprobs,
            prompt_safety=self.prompt_safety,
        )

    def _choice(self, index: int) -> ChatChoice:
        end = self._ends[index]
        chunks = self._chunks.get(index, [])
        return ChatChoice(
            index=index,
            message=Message(
                role="assistant",
                content=self.text_of(index),
                tool_calls=tuple(call for chunk in chunks for call in chunk.tool_calls),
                reasoning_content="".join(chunk.reasoning_content for chunk in chunks),
            ),
            finish_reason=responses.finish_reason(end.finish_reason),
            matched_stop=responses.matched_stop(end.matched_stop),
            token_ids=self._token_ids_of(index),
            logprobs=self._logprobs_of(index),
            safety=responses.verdict(end.safety) if end.HasField("safety") else None,
            timings=responses.timings(end.timings) if end.HasField("timings") else None,
        )
