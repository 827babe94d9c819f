"""The texts of tokens in log-probabilities, which the engine knows by their ids alone."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from meshserve.v1 import gateway_pb2, tokenizer_pb2, tokenizer_pb2_grpc, types_pb2


class TokenTexts:
    """Fills texts in, and remembers them: most tokens of an answer have been seen before."""

    def __init__(self, tokenizer: tokenizer_pb2_grpc.TokenizerServiceAsyncStub) -> None:
        self._tokenizer = tokenizer
        # by model
        self._known: dict[str, dict[int, bytes]] = {}

    async def filled_in(
        self, messages: AsyncGenerator[gateway_pb2.StreamChatResponse]
    ) -> AsyncGenerator[gateway_pb2.StreamChatResponse]:
        """The messages of a chat, with the texts of their tokens. Raises ServiceError."""
        model = ""
        async with aclosing(messages):
            async for message in messages:
                model = message.started.model or model
                tokens = [
                    token
                    for delta in message.chunk.deltas
                    for position in delta.logprobs.positions
                    for token in (position.chosen, *position.top)
                ]
                if tokens:
                    await self._fill_in(model, tokens)
                yield message

    async def _fill_in(self, model: str, tokens: Iterable[types_pb2.TokenLogprob]) -> None:
        known = self._known.setdefault(model, {})
        unknown = sorted({token.token_id for token in tokens} - known.keys())
        if unknown:
            known.update(zip(unknown, await self._decoded(model, unknown), strict=True))
        for token in tokens:
            token.text = known[token.token_id]

    async def _decoded(self, model: str, token_ids: list[int]) -> list[bytes]:
        """The texts of tokens within a text: some decoders drop the space that a text begins with,
        so each is decoded twice in a row, and what the second adds is its text."""
        request = tokenizer_pb2.DecodeRequest(model=model, keep_special_tokens=True)
        for token_id in token_ids:
            request.sequences.add(ids=[token_id])
            request.sequences.add(ids=[token_id, token_id])
        texts = (await self._tokenizer.Decode(request)).texts
        pairs = zip(texts[::2], texts[1::2], strict=True)
        return [twice.removeprefix(once).encode() for once, twice in pairs]
