"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from meshserve.accumulators import ChatAccumulator, CompletionAccumulator
from meshserve.admin import AsyncAdmin
from meshserve.async_streams import AsyncStream
from meshserve.attempts import Attempts
from meshserve.encodings import Classifications, Embeddings, Scores
from meshserve.options import (
    ChatOptions,
    ClassifyOptions,
    CountOptions,
    EmbedOptions,
    GenerateOptions,
    Messages,
    Prompt,
    ScoreOptions,
)
from meshserve.transport import (
    DEFAULT_TARGET,
    DEFAULT_TIMEOUT_S,
    TLS,
    USE_CLIENT_DEFAULT,
    Timeout,
    make_endpoint,
)
from meshserve.types import (
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    Model,
    TokenCount,
)
from meshserve.v1 import admin_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from meshserve.wire import encodings, requests, responses
from meshserve.wire.statuses import error_from_rpc

AsyncCompletionStream = AsyncStream[gateway_pb2.StreamGenerateResponse, CompletionChunk, Completion]
AsyncChatStream = AsyncStream[gateway_pb2.StreamChatResponse, ChatChunk, ChatCompletion]


class AsyncClient:
    """Talks to a MeshServe gateway from asyncio. Shared by the tasks of one event loop.

    Args:
        target: `HOST:PORT`, or a gRPC target such as `dns:///name:port` or `unix:path`.
        api_key: sent with every call. Default: the environment's MESHSERVE_API_KEY, if set.
        timeout: seconds that an answer may take as a whole, None for no limit.
        tls: True for TLS with public CAs, or a `TLS` for more.
        metadata: sent with every call.

    Every method raises a MeshServeError, and takes `timeout` and `metadata` of its own.

    Attributes:
        admin: what operators may do.
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
        tls: bool | TLS = False,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._endpoint = make_endpoint(
            target, api_key=api_key, timeout=timeout, tls=tls, metadata=metadata
        )
        # A channel of grpc.aio belongs to an event loop, and there need not be one yet.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channel: grpc.aio.Channel | None = None
        self._stub: Any = None
        self._admin_stub: Any = None
        self._closed = False
        self.admin = AsyncAdmin(
            lambda method, request, timeout: self._call(f"admin.{method}", request, timeout, None)
        )

    async def generate(
        self,
        prompt: Prompt,
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Completes text, token ids or a conversation, and answers once it is done."""
        request = requests.generate_request(prompt, options)
        return responses.completion(await self._call("Generate", request, timeout, metadata))

    def stream_generate(
        self,
        prompt: Prompt,
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
        min_interval_ms: int | None = None,
        **options: Unpack[GenerateOptions],
    ) -> AsyncCompletionStream:
        """Completes a prompt and answers as it is generated.

        `min_interval_ms` spares messages: later text is held back for that long.
        """
        request = requests.stream_generate_request(prompt, options, min_interval_ms)
        accumulator = CompletionAccumulator(
            request.request.sampling.n or 1, request.request.request_id
        )
        attempts = self._attempts("StreamGenerate", request, timeout, metadata)
        return AsyncStream(attempts, accumulator, self._endpoint.target)

    async def chat(
        self,
        messages: str | Messages,
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion:
        """Answers a conversation; plain text is one message of the user."""
        request = requests.chat_request(messages, options)
        return responses.chat_completion(await self._call("Chat", request, timeout, metadata))

    def stream_chat(
        self,
        messages: str | Messages,
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
        min_interval_ms: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> AsyncChatStream:
        """Answers a conversation as the answer is generated."""
        request = requests.stream_chat_request(messages, options, min_interval_ms)
        accumulator = ChatAccumulator(request.request.sampling.n or 1, request.request.request_id)
        attempts = self._attempts("StreamChat", request, timeout, metadata)
        return AsyncStream(attempts, accumulator, self._endpoint.target)

    async def count_tokens(
        self,
        prompt: str | Messages,
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[CountOptions],
    ) -> TokenCount:
        """Counts the tokens that an input would cost."""
        request = requests.count_tokens_request(prompt, options)
        return responses.token_count(await self._call("CountTokens", request, timeout, metadata))

    async def embed(
        self,
        texts: str | Sequence[str],
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[EmbedOptions],
    ) -> Embeddings:
        """Turns texts into vectors."""
        request = encodings.embed_request(texts, options)
        return encodings.embeddings(await self._call("Embed", request, timeout, metadata))

    async def classify(
        self,
        texts: str | Sequence[str],
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> Classifications:
        """Sorts texts into the classes of a model."""
        request = encodings.classify_request(texts, options)
        return encodings.classifications(await self._call("Classify", request, timeout, metadata))

    async def score(
        self,
        query: str,
        documents: Sequence[str],
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[ScoreOptions],
    ) -> Scores:
        """Scores how well documents fit a query."""
        request = encodings.score_request(query, documents, options)
        return encodings.scores(await self._call("Score", request, timeout, metadata))

    async def models(
        self,
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
    ) -> list[Model]:
        """The models that this caller may use, by name."""
        return [model async for model in self._iter_models(timeout, metadata)]

    async def model(
        self,
        name: str = "",
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
    ) -> Model:
        """One model by name or alias; without a name, the server's default model."""
        request = requests.get_model_request(name)
        return responses.model((await self._call("GetModel", request, timeout, metadata)).model)

    async def aclose(self) -> None:
        """Closes the connection; calls in flight are cancelled. May be called again."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __repr__(self) -> str:
        return f"AsyncClient({self._endpoint.target!r})"

    async def _iter_models(
        self, timeout: Timeout, metadata: Mapping[str, str] | None
    ) -> AsyncIterator[Model]:
        request = gateway_pb2.ListModelsRequest()
        while True:
            page = await self._call("ListModels", request, timeout, metadata)
            for source in page.models:
                yield responses.model(source)
            if not page.next_page_token:
                return
            request = gateway_pb2.ListModelsRequest(page_token=page.next_page_token)

    async def _call(
        self, method: str, request: Any, timeout: Timeout, metadata: Mapping[str, str] | None
    ) -> Any:
        attempts = self._attempts(method, request, timeout, metadata)
        while True:
            try:
                return await attempts.begin()
            except grpc.RpcError as error:
                pause_s = attempts.pause_s(error)
                if pause_s is None:
                    raise error_from_rpc(
                        error,
                        target=self._endpoint.target,
                        request_id=requests.request_id_of(request),
                    ) from error
            await asyncio.sleep(pause_s)

    def _attempts(
        self, method: str, request: Any, timeout: Timeout, metadata: Mapping[str, str] | None
    ) -> Attempts:
        call = self._connect(method)
        headers = self._endpoint.call_metadata(metadata)
        return Attempts(
            lambda timeout_s: call(request, timeout=timeout_s, metadata=headers),
            self._endpoint.deadline(timeout),
        )

    def _connect(self, method: str) -> Any:
        """The callable of a method, `admin.` before those of AdminService, on a channel of the
        running event loop."""
        if self._closed:
            raise RuntimeError("this client is closed; make a new one")
        loop = asyncio.get_running_loop()
        if self._channel is None:
            self._loop = loop
            endpoint = self._endpoint
            if endpoint.credentials is None:
                self._channel = grpc.aio.insecure_channel(endpoint.target, endpoint.channel_options)
            else:
                self._channel = grpc.aio.secure_channel(
                    endpoint.target, endpoint.credentials, endpoint.channel_options
                )
            self._stub = gateway_pb2_grpc.InferenceServiceStub(self._channel)
            self._admin_stub = admin_pb2_grpc.AdminServiceStub(self._channel)
        elif self._loop is not loop:
            raise RuntimeError("this client belongs to another event loop; make one per loop")
        service, _, name = method.rpartition(".")
        return getattr(self._admin_stub if service else self._stub, name)
