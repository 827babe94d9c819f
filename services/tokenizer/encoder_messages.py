"""Requests for inputs of encoders: what they may say, and their answers."""

from __future__ import annotations

from itertools import repeat

from meshserve.v1 import engine_pb2, tokenizer_pb2, types_pb2
from services.runtime.errors import Reason, ServiceError, invalid_field
from services.tokenizer.encoder_inputs import InputEncoder, Truncation
from services.tokenizer.errors import InvalidTextError, TooManyTokensError

_TRUNCATIONS: dict[int, Truncation] = {
    types_pb2.TRUNCATION_POLICY_UNSPECIFIED: "refuse",
    types_pb2.TRUNCATION_POLICY_REFUSE: "refuse",
    types_pb2.TRUNCATION_POLICY_DROP_OLDEST: "drop_oldest",
    types_pb2.TRUNCATION_POLICY_DROP_NEWEST: "drop_newest",
}


def check_inputs(request: tokenizer_pb2.EncodeInputsRequest) -> None:
    """Raises ServiceError (INVALID_FIELD)."""
    if not request.texts:
        raise invalid_field("texts", "at least one text is needed")
    if request.second_texts and len(request.texts) not in (1, len(request.second_texts)):
        raise invalid_field("texts", "one, or as many as there are second texts")
    if request.truncation not in _TRUNCATIONS:
        raise invalid_field("truncation", "must be a policy that the contract has")


def encode_inputs(
    encoder: InputEncoder, request: tokenizer_pb2.EncodeInputsRequest
) -> tokenizer_pb2.EncodeInputsResponse:
    """Raises ServiceError (INVALID_FIELD, PROMPT_TOO_LONG) that names the text at fault: of pairs
    the second one."""
    truncation = _TRUNCATIONS[request.truncation]
    limit = request.max_tokens or None
    try:
        if request.second_texts:
            firsts = request.texts if len(request.texts) > 1 else repeat(request.texts[0])
            pairs = list(zip(firsts, request.second_texts, strict=False))
            inputs = encoder.pairs(pairs, limit, truncation)
        else:
            inputs = encoder.texts(list(request.texts), limit, truncation)
    except InvalidTextError as error:
        raise invalid_field("texts", str(error)) from None
    except TooManyTokensError as error:
        path = f"{'second_texts' if request.second_texts else 'texts'}[{error.index}]"
        raise ServiceError(
            Reason.PROMPT_TOO_LONG,
            f"{path} {error}",
            field_violations=[(path, str(error))],
            metadata={"context_tokens": str(error.limit), "prompt_tokens": str(error.tokens)},
        ) from None
    return tokenizer_pb2.EncodeInputsResponse(
        inputs=[
            engine_pb2.EncoderInput(
                token_ids=each.token_ids, second_text_start=each.second_text_start
            )
            for each in inputs
        ]
    )
