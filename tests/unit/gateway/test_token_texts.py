"""The texts of tokens, as they stand within a text."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any, cast

from meshserve.v1 import gateway_pb2, tokenizer_pb2
from services.gateway.console.token_texts import TokenTexts

WORDS = {1: " one", 2: " two"}


class DropsTheFirstSpace:
    """A tokenizer whose decoder drops the space that a text begins with, as some do."""

    def __init__(self) -> None:
        self.asked: list[int] = []

    async def Decode(self, request: tokenizer_pb2.DecodeRequest) -> tokenizer_pb2.DecodeResponse:
        self.asked += [each.ids[0] for each in request.sequences[::2]]
        texts = ["".join(WORDS[each] for each in sequence.ids) for sequence in request.sequences]
        return tokenizer_pb2.DecodeResponse(texts=[text.removeprefix(" ") for text in texts])


async def answer(*token_ids: int) -> AsyncGenerator[gateway_pb2.StreamChatResponse]:
    for token_id in token_ids:
        message = gateway_pb2.StreamChatResponse()
        delta = message.chunk.deltas.add(index=0)
        delta.logprobs.positions.add().chosen.token_id = token_id
        yield message


async def test_a_token_has_its_space_and_is_asked_for_once() -> None:
    tokenizer = DropsTheFirstSpace()
    texts = TokenTexts(cast(Any, tokenizer))
    for _ in range(2):
        told = [
            message.chunk.deltas[0].logprobs.positions[0].chosen.text
            async for message in texts.filled_in(answer(1, 2, 1))
        ]
        assert told == [b" one", b" two", b" one"]
    assert tokenizer.asked == [1, 2]
