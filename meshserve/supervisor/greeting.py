"""The first answer of a new mesh: proof that a request gets all the way through."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from rich.console import Console

from meshserve.async_client import AsyncClient
from meshserve.supervisor.logview import printable
from meshserve.types import Model

PROMPT = "In one short sentence: what is the capital of France?"
MAX_TOKENS = 48
TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class HowToAsk:
    """An example of a request: of the command line and the client, and of gRPC."""

    command: str
    text: str
    method: str
    document: str


FOR_TEXT = HowToAsk("chat", "What is a block table?", "Generate", '{"text": "Once upon a time"}')
FOR_VECTORS = HowToAsk("embed", "a cat on a mat", "Embed", '{"texts": ["a cat on a mat"]}')


@dataclass(frozen=True, slots=True)
class Greeting:
    """How the first answer went."""

    completion_tokens: int
    first_token_s: float
    total_s: float

    @property
    def tokens_per_s(self) -> float:
        """Rate over the whole answer: text that was held back and came at once counts fairly."""
        return self.completion_tokens / self.total_s


async def embed_greeting(client: AsyncClient, console: Console) -> None:
    """The vector of a sentence, for a mesh whose models do not generate. Raises MeshServeError."""
    answer = await client.embed(PROMPT, cache=False, timeout=TIMEOUT_S)
    console.print(f"\n[dim]you>[/] {PROMPT}", highlight=False)
    shown = ", ".join(f"{value:.4f}" for value in answer.vector[:4])
    console.print(f"[dim]mesh>[/] [{shown}, ...]: {len(answer.vector)} components", highlight=False)


def generates(models: Iterable[Model]) -> bool:
    """Whether one of the models makes text, as far as is known what they can do."""
    return any(not model.capabilities or "generate" in model.capabilities for model in models)


async def stream_greeting(client: AsyncClient, console: Console) -> Greeting:
    """Streams one answer of the default model onto the console. Raises MeshServeError."""
    console.print(f"\n[dim]you>[/] {PROMPT}", highlight=False)
    started = time.monotonic()
    first_token_s: float | None = None
    stream = client.stream_chat(
        PROMPT, max_tokens=MAX_TOKENS, temperature=0, cache=False, timeout=TIMEOUT_S
    )
    async with stream:
        async for text in stream.aiter_text():
            if first_token_s is None:
                first_token_s = time.monotonic() - started
                console.print("[dim]mesh>[/] ", end="")
            console.print(printable(text), end="", markup=False, highlight=False, soft_wrap=True)
        await stream.collect()
    console.print()
    total_s = time.monotonic() - started
    return Greeting(stream.usage.completion_tokens, first_token_s or total_s, total_s)
