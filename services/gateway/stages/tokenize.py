"""The prompt's token ids, and the token side of stop strings."""

from __future__ import annotations

from opentelemetry import trace

from meshserve.v1 import gateway_pb2, tokenizer_pb2, tokenizer_pb2_grpc, types_pb2
from services.gateway.context import RequestContext
from services.gateway.conversation_cuts import longest_that_fits
from services.gateway.field_paths import renamed_fields
from services.gateway.pipeline import Stage
from services.runtime.errors import Reason, ServiceError, invalid_field
from services.runtime.settings import GatewaySettings


class Tokenize(Stage):
    """Sets the prompt's ids, the stop sequences and the number of tokens that may follow."""

    name = "tokenize"

    def __init__(
        self, settings: GatewaySettings, tokenizer: tokenizer_pb2_grpc.TokenizerServiceAsyncStub
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer

    def waits(self, context: RequestContext) -> bool:
        """Whether there is text to tokenize."""
        request = context.request
        return request.WhichOneof("input") != "token_ids" or bool(request.stopping.stop_strings)

    async def before(self, context: RequestContext) -> None:
        """Raises ServiceError (INVALID_ARGUMENT: template errors, prompts that do not fit)."""
        request = context.request
        context.tokenized_version = context.input_version
        context.prompt_token_ids = await self._prompt(context)
        if not context.prompt_token_ids:
            raise invalid_field(str(request.WhichOneof("input")), "gives no token at all")
        stops = request.stopping.stop_strings
        if stops:
            query = tokenizer_pb2.EncodeRequest(
                model=request.model, texts=stops, add_special_tokens=False
            )
            with renamed_fields({"texts": "stopping.stop_strings"}):
                encoded = await self._tokenizer.Encode(query)
            context.stop_sequences = [list(text.token_ids) for text in encoded.encoded]
        self._fit(context)
        trace.get_current_span().set_attribute(
            "meshserve.prompt_tokens", len(context.prompt_token_ids)
        )

    def is_outdated(self, context: RequestContext) -> bool:
        """Whether the input was redacted since: its ids would tell the model all the same."""
        return context.tokenized_version != context.input_version

    async def _prompt(self, context: RequestContext) -> list[int]:
        request = context.request
        kind = request.WhichOneof("input")
        if kind == "token_ids":
            ids = list(request.token_ids.ids)
            size = context.served.info.vocabulary_size
            for position, token_id in enumerate(ids):
                if token_id >= size:
                    raise invalid_field(
                        f"token_ids.ids[{position}]",
                        f"must be below {size}, the size of the vocabulary",
                    )
            return ids
        if kind == "conversation":

            async def render(conversation: types_pb2.Conversation) -> list[int]:
                rendered = await self._tokenizer.ApplyChatTemplate(
                    tokenizer_pb2.ApplyChatTemplateRequest(
                        model=request.model, conversation=conversation
                    )
                )
                return list(rendered.token_ids)

            if request.truncation == types_pb2.TRUNCATION_POLICY_DROP_NEWEST:
                raise invalid_field(
                    "truncation", "a conversation can be cut at its oldest turns alone"
                )
            if request.truncation == types_pb2.TRUNCATION_POLICY_DROP_OLDEST:
                return await longest_that_fits(request.conversation, _room(context), render)
            return await render(request.conversation)
        with renamed_fields({"texts[0]": "text"}):
            encoded = await self._tokenizer.Encode(encode_request(request))
        return list(encoded.encoded[0].token_ids)

    def _fit(self, context: RequestContext) -> None:
        stopping = context.request.stopping
        limit = context.served.context_tokens
        asked = stopping.max_tokens if stopping.HasField("max_tokens") else None
        policy = context.request.truncation
        if context.request.WhichOneof("input") != "conversation" and policy in (
            types_pb2.TRUNCATION_POLICY_DROP_OLDEST,
            types_pb2.TRUNCATION_POLICY_DROP_NEWEST,
        ):
            room = _room(context)
            ids = context.prompt_token_ids
            oldest = policy == types_pb2.TRUNCATION_POLICY_DROP_OLDEST
            context.prompt_token_ids = ids[-room:] if oldest else ids[:room]
        prompt = len(context.prompt_token_ids)
        if prompt >= limit:
            raise _too_long(
                "input",
                f"the prompt has {prompt} tokens, which leaves no room for a completion in the "
                f"model's context of {limit}",
                prompt,
                limit,
            )
        if asked is not None and prompt + asked > limit:
            raise _too_long(
                "stopping.max_tokens",
                f"a prompt of {prompt} and a completion of up to {asked} tokens do not fit the "
                f"model's context of {limit}",
                prompt,
                limit,
            )
        if asked is None:
            asked = min(limit - prompt, self._settings.default_max_tokens or limit)
        context.max_tokens = asked


def _room(context: RequestContext) -> int:
    """Tokens that a prompt may have where it is shortened."""
    stopping = context.request.stopping
    asked = stopping.max_tokens if stopping.HasField("max_tokens") else 1
    return max(1, context.served.context_tokens - asked)


def _too_long(field: str, message: str, prompt: int, limit: int) -> ServiceError:
    return ServiceError(
        Reason.PROMPT_TOO_LONG,
        message,
        field_violations=[(field, f"prompt and completion have at most {limit} tokens together")],
        metadata={"context_tokens": str(limit), "prompt_tokens": str(prompt)},
    )


def encode_request(
    request: gateway_pb2.GenerateRequest | gateway_pb2.CountTokensRequest,
) -> tokenizer_pb2.EncodeRequest:
    """The tokenizer's request for the text of a request."""
    encode = tokenizer_pb2.EncodeRequest(model=request.model, texts=[request.text])
    if request.HasField("add_special_tokens"):
        encode.add_special_tokens = request.add_special_tokens
    return encode
