"""The inputs of the encoder: token ids with the special tokens that the model expects."""

from __future__ import annotations

import re

from opentelemetry import trace

from meshserve.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from services.gateway.encoding.context import EncodingContext
from services.gateway.pipeline import Step
from services.runtime.errors import ServiceError

_ENTRY = re.compile(r"\b(?:second_texts|texts|inputs)\[(\d+)\]")


class TokenizeInputs(Step[EncodingContext]):
    """Sets the inputs that the engine computes, and how many tokens they have."""

    name = "tokenize"

    def __init__(self, tokenizer: tokenizer_pb2_grpc.TokenizerServiceAsyncStub) -> None:
        self._tokenizer = tokenizer

    def waits(self, context: EncodingContext) -> bool:
        """Whether there is a text to tokenize."""
        return bool(context.uncached)

    async def before(self, context: EncodingContext) -> None:
        """Raises ServiceError (INVALID_ARGUMENT: texts that do not fit, by their index)."""
        if not context.uncached:
            return
        context.tokenized_version = context.input_version
        texts = [context.texts[index] for index in context.uncached]
        query = tokenizer_pb2.EncodeInputsRequest(
            model=context.served.name,
            texts=[context.query] if context.query else texts,
            second_texts=texts if context.query else (),
            max_tokens=context.served.context_tokens,
            truncation=context.request.truncation,
        )
        try:
            response = await self._tokenizer.EncodeInputs(query)
        except ServiceError as error:
            rename_inputs(error, context, 0)
            raise
        context.inputs = list(response.inputs)
        for index, each in zip(context.uncached, context.inputs, strict=True):
            context.tokens[index] = len(each.token_ids)
        trace.get_current_span().set_attribute(
            "meshserve.prompt_tokens", sum(len(each.token_ids) for each in context.inputs)
        )

    def is_outdated(self, context: EncodingContext) -> bool:
        """Whether a text was redacted since: its ids would tell the model all the same."""
        return context.tokenized_version != context.input_version


def rename_inputs(error: ServiceError, context: EncodingContext, first: int) -> None:
    """Names the fields of a peer's error as the caller knows them, where the peer was given the
    uncached inputs from `first` on."""

    def renamed(text: str) -> str:
        return _ENTRY.sub(
            lambda found: context.path(context.uncached[first + int(found[1])]), text, count=1
        )

    # What the tokenizer says of a text begins with the text's field.
    error.message = renamed(error.message)
    error.field_violations = tuple(
        (renamed(path), description) for path, description in error.field_violations
    )
