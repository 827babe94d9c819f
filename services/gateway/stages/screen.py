"""The prompt check: blocks, or replaces what must not reach the model."""

from __future__ import annotations

import logging
from functools import partial

from opentelemetry import trace

from meshserve.v1 import (
    gateway_pb2,
    safety_pb2,
    safety_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
    types_pb2,
)
from services.gateway.context import RequestContext
from services.gateway.field_paths import renamed_fields
from services.gateway.pipeline import Stage
from services.gateway.policy import PolicyWatch
from services.gateway.prompt_texts import PromptText, prompt_texts
from services.gateway.safety_notes import note_unchecked, note_verdicts
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

    def waits(self, context: RequestContext) -> bool:
        """Whether there is a filter to ask."""
        return self._settings.enabled

    async def before(self, context: RequestContext) -> None:
        """Raises ServiceError (PROMPT_BLOCKED). Redaction changes the request itself."""
        if not self._settings.enabled:
            return
        texts = await self._texts(context.request)
        if not texts:
            return
        query = safety_pb2.CheckPromptRequest(
            texts=[each.text for each in texts], tenant=context.tenant.name
        )
        try:
            with renamed_fields({f"texts[{i}]": each.path for i, each in enumerate(texts)}):
                response = await self._safety.CheckPrompt(query)
        except ServiceError as error:
            away = error.reason in (Reason.SERVICE_UNAVAILABLE, Reason.DRAINING)
            if not away or self._settings.when_unavailable == "refuse":
                raise
            log.warning("a prompt is not checked: %s", error.message)
            context.unchecked = True
            note_unchecked(trace.get_current_span())
            return
        verdict = response.verdict
        note_verdicts(trace.get_current_span(), [verdict])
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
            for each, redacted in zip(texts, response.redacted_texts, strict=True):
                if redacted != each.text:
                    each.replace(redacted)
            context.input_version += 1

    async def _texts(self, request: gateway_pb2.GenerateRequest) -> list[PromptText]:
        if request.WhichOneof("input") != "token_ids":
            return prompt_texts(request)
        # Ids that spell a forbidden text are no way around the filter.
        with renamed_fields({"sequences[0]": "token_ids"}):
            decoded = await self._tokenizer.Decode(
                tokenizer_pb2.DecodeRequest(model=request.model, sequences=[request.token_ids])
            )
        return [PromptText("token_ids", decoded.texts[0], partial(_become_text, request))]


def _become_text(request: gateway_pb2.GenerateRequest, text: str) -> None:
    """Puts a redacted text in the place of ids."""
    # The ids already stood for everything the tokenizer would add.
    request.add_special_tokens = False
    request.text = text
