"""InferenceService over gRPC: the front door that speaks our own contract."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from meshserve.v1 import (
    gateway_pb2,
    gateway_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
)
from services.gateway.coalesce import at_intervals
from services.gateway.context import RequestContext, Tenant
from services.gateway.encoding.calls import Encodings
from services.gateway.events import Event
from services.gateway.field_paths import renamed_fields
from services.gateway.inference import Inference
from services.gateway.models import ModelDirectory
from services.gateway.responses import (
    chat_event,
    chat_response,
    generate_event,
    generate_response,
    started,
)
from services.gateway.stages.authenticate import Authenticator
from services.gateway.stages.tokenize import encode_request
from services.gateway.validation import check_conversation, prompt_bytes, raise_violations
from services.runtime import deadline
from services.runtime.errors import Reason, ServiceError, invalid_field
from services.runtime.settings import GatewaySettings

MAX_STREAM_INTERVAL_MS = 10_000
MAX_PAGE_SIZE = 1000
DEFAULT_PAGE_SIZE = 100


class InferenceServicer(gateway_pb2_grpc.InferenceServiceServicer):
    """Turns messages into contexts, and events into messages."""

    def __init__(
        self,
        settings: GatewaySettings,
        inference: Inference,
        encodings: Encodings,
        models: ModelDirectory,
        authenticator: Authenticator,
        tokenizer: tokenizer_pb2_grpc.TokenizerServiceAsyncStub,
    ) -> None:
        self._settings = settings
        self._inference = inference
        self._encodings = encodings
        self._models = models
        self._authenticator = authenticator
        self._tokenizer = tokenizer

    async def Generate(  # noqa: N802
        self, request: gateway_pb2.GenerateRequest, context: Any
    ) -> gateway_pb2.GenerateResponse:
        """Completes a prompt."""
        arrival = self._inference.request(
            request, "text_completion", context.invocation_metadata(), streaming=False
        )
        with arrival as call:
            await self._exhaust(call)
            return generate_response(call)

    async def StreamGenerate(  # noqa: N802
        self, request: gateway_pb2.StreamGenerateRequest, context: Any
    ) -> AsyncGenerator[gateway_pb2.StreamGenerateResponse]:
        """Completes a prompt, message by message."""
        arrival = self._inference.request(
            request.request, "text_completion", context.invocation_metadata(), streaming=True
        )
        opened = False
        with arrival as call:
            async with aclosing(self._stream(call, request.stream_options)) as events:
                async for event in events:
                    if not opened:
                        opened = True
                        yield gateway_pb2.StreamGenerateResponse(
                            request_id=call.request_id, started=started(call)
                        )
                    yield generate_event(call, event)

    async def Chat(  # noqa: N802
        self, request: gateway_pb2.ChatRequest, context: Any
    ) -> gateway_pb2.ChatResponse:
        """Answers a conversation."""
        arrival = self._inference.request(
            _as_generation(request), "chat", context.invocation_metadata(), streaming=False
        )
        with arrival as call:
            _check_tool_choice(request, "tool_choice")
            await self._exhaust(call)
            return chat_response(call)

    async def StreamChat(  # noqa: N802
        self, request: gateway_pb2.StreamChatRequest, context: Any
    ) -> AsyncGenerator[gateway_pb2.StreamChatResponse]:
        """Answers a conversation, message by message."""
        arrival = self._inference.request(
            _as_generation(request.request), "chat", context.invocation_metadata(), streaming=True
        )
        opened = False
        with arrival as call:
            _check_tool_choice(request.request, "request.tool_choice")
            async with aclosing(self._stream(call, request.stream_options)) as events:
                async for event in events:
                    if not opened:
                        opened = True
                        yield gateway_pb2.StreamChatResponse(
                            request_id=call.request_id, started=started(call)
                        )
                    yield chat_event(call, event)

    async def CountTokens(  # noqa: N802
        self, request: gateway_pb2.CountTokensRequest, context: Any
    ) -> gateway_pb2.CountTokensResponse:
        """Counts the tokens of an input."""
        tenant = self._tenant(context)
        kind = request.WhichOneof("input")
        if kind is None:
            raise invalid_field("input", "one of text and conversation is needed")
        size, limit = prompt_bytes(request), self._settings.max_prompt_bytes
        if size > limit:
            raise ServiceError(
                Reason.PROMPT_TOO_LONG,
                f"the prompt has {size} bytes; at most {limit} are taken",
                field_violations=[(kind, f"at most {limit} bytes")],
            )
        request.model = self._models.find_allowed(request.model, "", tenant.models).model
        if kind == "conversation":
            raise_violations(check_conversation(request.conversation))
            rendered = await self._tokenizer.ApplyChatTemplate(
                tokenizer_pb2.ApplyChatTemplateRequest(
                    model=request.model, conversation=request.conversation
                )
            )
            tokens = len(rendered.token_ids)
        else:
            with renamed_fields({"texts[0]": "text"}):
                encoded = await self._tokenizer.Encode(encode_request(request))
            tokens = len(encoded.encoded[0].token_ids)
        return gateway_pb2.CountTokensResponse(tokens=tokens, model=request.model)

    async def ListModels(  # noqa: N802
        self, request: gateway_pb2.ListModelsRequest, context: Any
    ) -> gateway_pb2.ListModelsResponse:
        """Lists the models that the caller may use. A page token is the name it begins after."""
        tenant = self._tenant(context)
        size = min(request.page_size or DEFAULT_PAGE_SIZE, MAX_PAGE_SIZE)
        models = [
            model
            for model in self._models.describe_all(tenant.models)
            if model.name > request.page_token
        ]
        page = models[:size]
        return gateway_pb2.ListModelsResponse(
            models=page, next_page_token=page[-1].name if len(models) > size else ""
        )

    async def GetModel(  # noqa: N802
        self, request: gateway_pb2.GetModelRequest, context: Any
    ) -> gateway_pb2.GetModelResponse:
        """Describes one model."""
        tenant = self._tenant(context)
        name = self._models.find_allowed(request.model, "", tenant.models).model
        return gateway_pb2.GetModelResponse(model=self._models.describe(name, tenant.models))

    async def Embed(  # noqa: N802
        self, request: gateway_pb2.EmbedRequest, context: Any
    ) -> gateway_pb2.EmbedResponse:
        """The vectors of texts."""
        return await self._encodings.embed(request, context.invocation_metadata())

    async def Classify(  # noqa: N802
        self, request: gateway_pb2.ClassifyRequest, context: Any
    ) -> gateway_pb2.ClassifyResponse:
        """The classes of texts."""
        return await self._encodings.classify(request, context.invocation_metadata())

    async def Score(  # noqa: N802
        self, request: gateway_pb2.ScoreRequest, context: Any
    ) -> gateway_pb2.ScoreResponse:
        """The scores of documents against a query."""
        return await self._encodings.score(request, context.invocation_metadata())

    async def _exhaust(self, call: RequestContext) -> None:
        async with aclosing(self._inference.events(call)) as events:
            async for _ in events:
                pass

    def _stream(
        self, call: RequestContext, options: gateway_pb2.StreamOptions
    ) -> AsyncGenerator[Event]:
        if options.min_interval_ms > MAX_STREAM_INTERVAL_MS:
            raise invalid_field(
                "stream_options.min_interval_ms", f"at most {MAX_STREAM_INTERVAL_MS}"
            )
        events = self._inference.events(call)
        if options.min_interval_ms:
            return at_intervals(events, options.min_interval_ms / 1000)
        return events

    def _tenant(self, context: Any) -> Tenant:
        """Who makes a call that is no inference; its deadline gets a default, too."""
        if deadline.remaining_s() is None:
            deadline.set_remaining(self._settings.default_timeout_s)
        metadata = dict(context.invocation_metadata() or ())
        return self._authenticator.tenant(metadata.get("authorization"))


def _as_generation(request: gateway_pb2.ChatRequest) -> gateway_pb2.GenerateRequest:
    """A conversation as a generation: the stages know one kind of request."""
    generation = gateway_pb2.GenerateRequest(
        model=request.model,
        conversation=request.conversation,
        priority=request.priority,
        request_id=request.request_id,
        truncation=request.truncation,
        adapter=request.adapter,
    )
    for field in ("sampling", "stopping", "constraint", "cache_control", "output"):
        if request.HasField(field):
            getattr(generation, field).CopyFrom(getattr(request, field))
    if request.tool_choice == gateway_pb2.TOOL_CHOICE_NONE:
        del generation.conversation.tools[:]
    return generation


def _check_tool_choice(request: gateway_pb2.ChatRequest, path: str) -> None:
    if request.tool_choice not in gateway_pb2.ToolChoice.values():
        raise invalid_field(path, "must be a choice that the contract has")
    if request.tool_choice == gateway_pb2.TOOL_CHOICE_REQUIRED:
        raise ServiceError(
            Reason.CAPABILITY_MISSING,
            "a tool call cannot be forced so far",
            metadata={"capability": "TOOL_CHOICE_REQUIRED"},
        )
