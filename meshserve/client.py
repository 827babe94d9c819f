"""The synchronous client."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc

from meshserve.accumulators import ChatAccumulator, CompletionAccumulator
from meshserve.admin import Admin
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
from meshserve.streams import Stream
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

CompletionStream = Stream[gateway_pb2.StreamGenerateResponse, CompletionChunk, Completion]
ChatStream = Stream[gateway_pb2.StreamChatResponse, ChatChunk, ChatCompletion]


class Client:
    """Talks to a MeshServe gateway. May be shared by threads; close it when done.

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
        endpoint = self._endpoint
        if endpoint.credentials is None:
            self._channel = grpc.insecure_channel(endpoint.target, endpoint.channel_options)
        else:
            self._channel = grpc.secure_channel(
                endpoint.target, endpoint.credentials, endpoint.channel_options
            )
        self._closed = False
        self._stub = gateway_pb2_grpc.InferenceServiceStub(self._channel)
        admin = admin_pb2_grpc.AdminServiceStub(self._channel)
        self.admin = Admin(
            lambda method, request, timeout: self._call(
                getattr(admin, method), request, timeout, None
            )
        )

    def generate(
        self,
        prompt: Prompt,
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[GenerateOptions],
    ) -> Completion:
        """Completes text, token ids or a conversation, and answers once it is done."""
        request = requests.generate_request(prompt, options)
        return responses.completion(self._call(self._stub.Generate, request, timeout, metadata))

    def stream_generate(
        self,
        prompt: Prompt,
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
        min_interval_ms: int | None = None,
        **options: Unpack[GenerateOptions],
    ) -> CompletionStream:
        """Completes a prompt and answers as it is generated.

        `min_interval_ms` spares messages: later text is held back for that long.
        """
        request = requests.stream_generate_request(prompt, options, min_interval_ms)
        accumulator = CompletionAccumulator(
            request.request.sampling.n or 1, request.request.request_id
        )
        attempts = self._attempts(self._stub.StreamGenerate, request, timeout, metadata)
        return Stream(attempts, accumulator, self._endpoint.target)

    def chat(
        self,
        messages: str | Messages,
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatCompletion:
        """Answers a conversation; plain text is one message of the user."""
        request = requests.chat_request(messages, options)
        return responses.chat_completion(self._call(self._stub.Chat, request, timeout, metadata))

    def stream_chat(
        self,
        messages: str | Messages,
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
        min_interval_ms: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> ChatStream:
        """Answers a conversation as the answer is generated."""
        request = requests.stream_chat_request(messages, options, min_interval_ms)
        accumulator = ChatAccumulator(request.request.sampling.n or 1, request.request.request_id)
        attempts = self._attempts(self._stub.StreamChat, request, timeout, metadata)
        return Stream(attempts, accumulator, self._endpoint.target)

    def count_tokens(
        self,
        prompt: str | Messages,
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[CountOptions],
    ) -> TokenCount:
        """Counts the tokens that an input would cost."""
        request = requests.count_tokens_request(prompt, options)
        return responses.token_count(self._call(self._stub.CountTokens, request, timeout, metadata))

    def embed(
        self,
        texts: str | Sequence[str],
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[EmbedOptions],
    ) -> Embeddings:
        """Turns texts into vectors."""
        request = encodings.embed_request(texts, options)
        return encodings.embeddings(self._call(self._stub.Embed, request, timeout, metadata))

    def classify(
        self,
        texts: str | Sequence[str],
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
        **options: Unpack[ClassifyOptions],
    ) -> Classifications:
        """Sorts texts into the classes of a model."""
        request = encodings.classify_request(texts, options)
        return encodings.classifications(
            self._call(self._stub.Classify, request, timeout, metadata)
        )

    def score(
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
        return encodings.scores(self._call(self._stub.Score, request, timeout, metadata))

    def models(
        self,
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
    ) -> list[Model]:
        """The models that this caller may use, by name."""
        return list(self._iter_models(timeout, metadata))

    def model(
        self,
        name: str = "",
        *,
        timeout: Timeout = USE_CLIENT_DEFAULT,
        metadata: Mapping[str, str] | None = None,
    ) -> Model:
        """One model by name or alias; without a name, the server's default model."""
        request = requests.get_model_request(name)
        return responses.model(self._call(self._stub.GetModel, request, timeout, metadata).model)

    def close(self) -> None:
        """Closes the connection; calls in flight are cancelled. May be called again."""
        self._closed = True
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Client({self._endpoint.target!r})"

    def _iter_models(self, timeout: Timeout, metadata: Mapping[str, str] | None) -> Iterator[Model]:
        request = gateway_pb2.ListModelsRequest()
        while True:
            page = self._call(self._stub.ListModels, request, timeout, metadata)
            yield from (responses.model(source) for source in page.models)
            if not page.next_page_token:
                return
            request = gateway_pb2.ListModelsRequest(page_token=page.next_page_token)

    def _call(
        self, method: Any, request: Any, timeout: Timeout, metadata: Mapping[str, str] | None
    ) -> Any:
        attempts = self._attempts(method, request, timeout, metadata)
        while True:
            try:
                return attempts.begin()
            except grpc.RpcError as error:
                pause_s = attempts.pause_s(error)
                if pause_s is None:
                    raise error_from_rpc(
                        error,
                        target=self._endpoint.target,
                        request_id=requests.request_id_of(request),
                    ) from error
            time.sleep(pause_s)

    def _attempts(
        self, method: Any, request: Any, timeout: Timeout, metadata: Mapping[str, str] | None
    ) -> Attempts:
        self._check_open()
        headers = self._endpoint.call_metadata(metadata)
        return Attempts(
            lambda timeout_s: method(request, timeout=timeout_s, metadata=headers),
            self._endpoint.deadline(timeout),
        )

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("this client is closed; make a new one")
