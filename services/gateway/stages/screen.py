"""The prompt check: blocks, or replaces what must not reach the model."""

from __future__ import annotations

from functools import partial

from meshserve.v1 import gateway_pb2, tokenizer_pb2, tokenizer_pb2_grpc
from services.gateway.context import RequestContext
from services.gateway.field_paths import renamed_fields
from services.gateway.pipeline import Stage
from services.gateway.prompt_check import PromptCheck
from services.gateway.prompt_texts import PromptText, prompt_texts


class Screen(Stage):
    """Asks the safety filter about every text of the prompt."""

    name = "screen"

    def __init__(
        self, check: PromptCheck, tokenizer: tokenizer_pb2_grpc.TokenizerServiceAsyncStub
    ) -> None:
        self._check = check
        self._tokenizer = tokenizer

    def waits(self, context: RequestContext) -> bool:
        """Whether there is a filter to ask."""
        return self._check.enabled

    async def before(self, context: RequestContext) -> None:
        """Raises ServiceError (PROMPT_BLOCKED). Redaction changes the request itself."""
        if not self._check.enabled:
            return
        texts = await self._texts(context.request)
        if texts:
            await self._check(context, texts)

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
