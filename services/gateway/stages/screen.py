"""The prompt check: blocks, or replaces what must not reach the model."""

from __future__ import annotations

import logging

from meshserve.v1 import (
    gateway_pb2,
    safety_pb2,
    safety_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
    types_pb2,
)
from services.gateway.context import RequestContext
from services.gateway.pipeline import Stage
from services.gateway.policy import PolicyWatch
from services.runtime.errors import Reason, ServiceError
from services.runtime.settings import SafetySettings

log = logging.getLogger(__name__)


class Screen(Stage):
    """Asks the safety filter about every text of the prompt."""

    name = "screen"

    def __init__(
        self,
        settings: SafetySettings,
        safety: safety_pb2_grpc.SafetyServiceAsyncStub,
        tokenizer: tokenizer_pb2_grpc.TokenizerServiceAsyncStub,
        policy: PolicyWatch,
    ) -> None:
        self._settings = settings
        self._safety = safety
        self._tokenizer = tokenizer
        self._policy = policy

    async def before(self, context: RequestContext) -> None:
        """Raises ServiceError (PROMPT_BLOCKED). Redaction changes the request itself."""
        if not self._settings.enabled:
            return
        texts = await self._texts(context.request)
        if not texts:
            return
        try:
            response = await self._safety.CheckPrompt(
                safety_pb2.CheckPromptRequest(texts=texts, tenant=context.tenant.name)
            )
        except ServiceError as error:
            away = error.reason is Reason.SERVICE_UNAVAILABLE
            if not away or self._settings.when_unavailable == "refuse":
                raise
            log.warning("a prompt is not checked: %s", error.message)
            return
        verdict = response.verdict
        self._policy.seen(verdict.policy_revision)
        if verdict.findings:
            context.prompt_safety = verdict
        if verdict.action == types_pb2.SAFETY_ACTION_BLOCK:
            categories = sorted(
                {
                    finding.category
                    for finding in verdict.findings
                    if finding.action == types_pb2.SAFETY_ACTION_BLOCK
                }
            )
            raise ServiceError(
                Reason.PROMPT_BLOCKED,
                f"the safety filter blocked the prompt: {', '.join(categories)}",
                metadata={"categories": ",".join(categories)},
            )
        if verdict.action == types_pb2.SAFETY_ACTION_REDACT:
            _redact(context.request, list(response.redacted_texts))

    async def _texts(self, request: gateway_pb2.GenerateRequest) -> list[str]:
        kind = request.WhichOneof("input")
        if kind == "text":
            return [request.text]
        if kind == "conversation":
            return [_message_text(message) for message in request.conversation.messages]
        # Ids that spell a forbidden text are no way around the filter.
        decoded = await self._tokenizer.Decode(
            tokenizer_pb2.DecodeRequest(model=request.model, sequences=[request.token_ids])
        )
        return list(decoded.texts)


# Between the parts of a message that are checked together; no detector matches across it.
_PART_SEPARATOR = "\n\n"


def _message_text(message: types_pb2.ChatMessage) -> str:
    parts = [message.content]
    if message.reasoning_content:
        parts.append(message.reasoning_content)
    parts += [call.arguments_json for call in message.tool_calls]
    return _PART_SEPARATOR.join(parts) if len(parts) > 1 else message.content


def _redact(request: gateway_pb2.GenerateRequest, texts: list[str]) -> None:
    kind = request.WhichOneof("input")
    if kind == "conversation":
        for message, text in zip(request.conversation.messages, texts, strict=True):
            _replace(message, text)
        return
    if kind == "token_ids":
        # The ids already stood for everything the tokenizer would add.
        request.add_special_tokens = False
    request.text = texts[0]


def _replace(message: types_pb2.ChatMessage, text: str) -> None:
    if text == _message_text(message):
        return
    # Redaction may move the borders between parts; nothing but the redacted whole is safe to keep.
    message.content = text
    message.reasoning_content = ""
    for call in message.tool_calls:
        call.arguments_json = "{}"
