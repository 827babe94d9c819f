"""The RPCs of the tokenizer: checks what comes in, works off the event loop, answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import grpc

from meshserve.v1 import tokenizer_pb2, tokenizer_pb2_grpc, types_pb2
from services.runtime.errors import Reason, ServiceError, invalid_field
from services.runtime.multiplex import SessionHost
from services.runtime.settings import TokenizerSettings
from services.runtime.telemetry import Metrics
from services.tokenizer.chat_template import RenderLimits
from services.tokenizer.conversation import template_input
from services.tokenizer.decode_session import DecodeSession
from services.tokenizer.encoder_messages import check_inputs, encode_inputs
from services.tokenizer.errors import (
    ChatTemplateError,
    InvalidTextError,
    NoChatTemplateError,
    UnknownTokenIdError,
)
from services.tokenizer.model_tokenizer import ModelTokenizer
from services.tokenizer.models import ServedModels

# Shorter requests take less time than the way to a thread and back.
INLINE_BYTES = 512
# Longer requests have a thread of their own, so that short ones never wait for them all.
LARGE_REQUEST_BYTES = 1 << 18

Answer = TypeVar("Answer")


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Answers for the models that it is given."""

    def __init__(
        self,
        settings: TokenizerSettings,
        models: ServedModels,
        metrics: Metrics,
        draining: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._models = models
        self._draining = draining
        self._encoded_tokens = metrics.counter("meshserve_tokenizer_encoded_tokens")
        self._decoded_tokens = metrics.counter("meshserve_tokenizer_decoded_tokens")
        self._sessions = metrics.gauge("meshserve_tokenizer_decode_sessions")
        self._short = ThreadPoolExecutor(settings.workers, thread_name_prefix="encode")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="encode-long")

    def close(self) -> None:
        """Ends the threads."""
        self._short.shutdown(wait=False, cancel_futures=True)
        self._long.shutdown(wait=False, cancel_futures=True)

    async def Encode(  # noqa: N802
        self,
        request: tokenizer_pb2.EncodeRequest,
        context: grpc.aio.ServicerContext[
            tokenizer_pb2.EncodeRequest, tokenizer_pb2.EncodeResponse
        ],
    ) -> tokenizer_pb2.EncodeResponse:
        """Texts to token ids."""
        name, tokenizer = self._models.find(request.model)
        if not request.texts:
            raise invalid_field("texts", "at least one text is needed")
        for index, text in enumerate(request.texts):
            self._check_size(_utf8_bytes(text), f"texts[{index}]")
        size_bytes = request.ByteSize()
        response = (
            _encode(tokenizer, request)
            if size_bytes <= INLINE_BYTES
            else await self._work(size_bytes, partial(_encode, tokenizer, request))
        )
        self._encoded_tokens.labels(name).inc(
            sum(len(entry.token_ids) for entry in response.encoded)
        )
        return response

    async def EncodeInputs(  # noqa: N802
        self,
        request: tokenizer_pb2.EncodeInputsRequest,
        context: grpc.aio.ServicerContext[
            tokenizer_pb2.EncodeInputsRequest, tokenizer_pb2.EncodeInputsResponse
        ],
    ) -> tokenizer_pb2.EncodeInputsResponse:
        """Texts, or pairs of them, to inputs of an encoder."""
        name, tokenizer = self._models.find(request.model)
        check_inputs(request)
        for field in ("texts", "second_texts"):
            for index, text in enumerate(getattr(request, field)):
                self._check_size(_utf8_bytes(text), f"{field}[{index}]")
        size_bytes = request.ByteSize()
        response = (
            encode_inputs(tokenizer.inputs, request)
            if size_bytes <= INLINE_BYTES
            else await self._work(size_bytes, partial(encode_inputs, tokenizer.inputs, request))
        )
        self._encoded_tokens.labels(name).inc(sum(len(each.token_ids) for each in response.inputs))
        return response

    async def Decode(  # noqa: N802
        self,
        request: tokenizer_pb2.DecodeRequest,
        context: grpc.aio.ServicerContext[
            tokenizer_pb2.DecodeRequest, tokenizer_pb2.DecodeResponse
        ],
    ) -> tokenizer_pb2.DecodeResponse:
        """Token ids to texts."""
        name, tokenizer = self._models.find(request.model)
        size_bytes = request.ByteSize()
        response = (
            _decode(tokenizer, request)
            if size_bytes <= INLINE_BYTES
            else await self._work(size_bytes, partial(_decode, tokenizer, request))
        )
        self._decoded_tokens.labels(name).inc(sum(len(entry.ids) for entry in request.sequences))
        return response

    async def StreamDecode(  # noqa: N802
        self,
        request_iterator: AsyncIterator[tokenizer_pb2.StreamDecodeRequest],
        context: grpc.aio.ServicerContext[
            tokenizer_pb2.StreamDecodeRequest, tokenizer_pb2.StreamDecodeResponse
        ],
    ) -> AsyncIterator[tokenizer_pb2.StreamDecodeResponse]:
        """Token ids of many sequences to text, as they come."""
        host: SessionHost[
            tokenizer_pb2.StreamDecodeRequest,
            tokenizer_pb2.DecodeInput,
            tokenizer_pb2.DecodeOutput,
        ] = SessionHost(
            inputs_of=lambda request: request.inputs,
            open_session=self._open_session,
            failed=_failed_output,
            draining=self._draining,
        )
        async for outputs in host.serve(request_iterator):
            yield tokenizer_pb2.StreamDecodeResponse(outputs=outputs)

    async def ApplyChatTemplate(  # noqa: N802
        self,
        request: tokenizer_pb2.ApplyChatTemplateRequest,
        context: grpc.aio.ServicerContext[
            tokenizer_pb2.ApplyChatTemplateRequest, tokenizer_pb2.ApplyChatTemplateResponse
        ],
    ) -> tokenizer_pb2.ApplyChatTemplateResponse:
        """A conversation to its prompt."""
        name, tokenizer = self._models.find(request.model)
        if not request.HasField("conversation"):
            raise invalid_field("conversation", "is required")
        if request.conversation.chat_template and not self._settings.allow_request_templates:
            raise invalid_field(
                "conversation.chat_template",
                "templates in requests are not allowed here (tokenizer.allow_request_templates)",
            )
        self._check_size(request.conversation.ByteSize(), "conversation")
        limits = RenderLimits(
            timeout_s=self._settings.template_timeout_s,
            max_bytes=self._settings.max_rendered_bytes,
        )
        response = await self._work(
            request.ByteSize(), partial(_apply_chat_template, tokenizer, request, limits)
        )
        self._encoded_tokens.labels(name).inc(len(response.token_ids))
        return response

    async def GetTokenizerInfo(  # noqa: N802
        self,
        request: tokenizer_pb2.GetTokenizerInfoRequest,
        context: grpc.aio.ServicerContext[
            tokenizer_pb2.GetTokenizerInfoRequest, tokenizer_pb2.GetTokenizerInfoResponse
        ],
    ) -> tokenizer_pb2.GetTokenizerInfoResponse:
        """What the tokenizer of a model is."""
        name, tokenizer = self._models.find(request.model)
        return tokenizer_pb2.GetTokenizerInfoResponse(
            model=name,
            vocabulary_size=tokenizer.vocabulary_size,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_ids=tokenizer.eos_token_ids,
            has_chat_template=tokenizer.has_chat_template,
            kind=tokenizer.kind,
            revision=tokenizer.revision,
        )

    def _open_session(self, opening: tokenizer_pb2.DecodeInput) -> DecodeSession:
        name, tokenizer = self._models.find(opening.open.model)
        return DecodeSession(opening, tokenizer, self._decoded_tokens.labels(name), self._sessions)

    def _check_size(self, size_bytes: int, path: str) -> None:
        limit = self._settings.max_text_bytes
        if size_bytes > limit:
            problem = f"has {size_bytes} bytes, more than the {limit} that are taken"
            raise ServiceError(
                Reason.PROMPT_TOO_LONG,
                f"{path} {problem}",
                field_violations=[(path, problem)],
                metadata={"limit_bytes": str(limit), "size_bytes": str(size_bytes)},
            )

    async def _work(self, size_bytes: int, task: Callable[[], Answer]) -> Answer:
        executor = self._long if size_bytes > LARGE_REQUEST_BYTES else self._short
        return await asyncio.get_running_loop().run_in_executor(executor, task)


def _utf8_bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _encode(
    tokenizer: ModelTokenizer, request: tokenizer_pb2.EncodeRequest
) -> tokenizer_pb2.EncodeResponse:
    adds = request.add_special_tokens if request.HasField("add_special_tokens") else True
    try:
        encoded = tokenizer.encode_batch(
            list(request.texts), add_special_tokens=adds, return_offsets=request.return_offsets
        )
    except InvalidTextError as error:
        raise invalid_field("texts", str(error)) from None
    return tokenizer_pb2.EncodeResponse(
        encoded=[
            tokenizer_pb2.EncodedText(
                token_ids=entry.token_ids,
                offsets=[
                    tokenizer_pb2.TokenOffset(start=start, end=end)
                    for start, end in entry.offsets or ()
                ],
            )
            for entry in encoded
        ]
    )


def _decode(
    tokenizer: ModelTokenizer, request: tokenizer_pb2.DecodeRequest
) -> tokenizer_pb2.DecodeResponse:
    texts: list[str] = []
    for index, sequence in enumerate(request.sequences):
        try:
            texts.append(
                tokenizer.detokenizer.decode(
                    list(sequence.ids), keep_special_tokens=request.keep_special_tokens
                )
            )
        except UnknownTokenIdError as error:
            raise invalid_field(f"sequences[{index}].ids[{error.position}]", str(error)) from None
    return tokenizer_pb2.DecodeResponse(texts=texts)


def _apply_chat_template(
    tokenizer: ModelTokenizer,
    request: tokenizer_pb2.ApplyChatTemplateRequest,
    limits: RenderLimits,
) -> tokenizer_pb2.ApplyChatTemplateResponse:
    conversation = request.conversation
    try:
        template = tokenizer.chat_template(
            with_tools=bool(conversation.tools), source=conversation.chat_template
        )
        given = template_input(conversation, knows_developer=template.mentions("developer"))
        prompt = tokenizer.apply_chat_template(given, template=template, limits=limits)
    except NoChatTemplateError as error:
        raise ServiceError(
            Reason.CAPABILITY_MISSING, str(error), metadata={"capability": "chat"}
        ) from None
    except ChatTemplateError as error:
        raise ServiceError(
            Reason.TEMPLATE_ERROR,
            f"the chat template failed: {error}",
            field_violations=[("conversation", str(error))],
        ) from None
    except InvalidTextError as error:
        raise invalid_field("conversation", str(error)) from None
    return tokenizer_pb2.ApplyChatTemplateResponse(
        token_ids=prompt.token_ids, text=prompt.text if request.return_text else ""
    )


def _failed_output(session_id: int, status: types_pb2.SessionStatus) -> tokenizer_pb2.DecodeOutput:
    return tokenizer_pb2.DecodeOutput(session_id=session_id, finished=True, error=status)
