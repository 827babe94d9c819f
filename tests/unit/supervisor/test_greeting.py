"""The first answer is streamed as it comes and timed."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from typing import Any

import pytest
from rich.console import Console

from meshserve import AsyncClient, IncompleteStreamError, Model
from meshserve.supervisor.greeting import embed_greeting, generates, stream_greeting
from meshserve.v1 import gateway_pb2
from tests.fakes.scripted_gateway import ScriptedGateway

Response = gateway_pb2.StreamChatResponse


@pytest.fixture
def gateway() -> Iterator[ScriptedGateway]:
    server = ScriptedGateway()
    yield server
    server.stop()


async def test_the_answer_is_shown_and_timed(gateway: ScriptedGateway) -> None:
    def answer(request: Any, context: Any) -> Iterator[Any]:
        time.sleep(0.1)
        yield Response(chunk={"deltas": [{"content": "[red]Par"}]})
        time.sleep(0.1)
        yield Response(chunk={"deltas": [{"content": "is."}]})
        yield Response(complete={"usage": {"completion_tokens": 3}})

    gateway.on("StreamChat", answer)
    shown = io.StringIO()
    async with AsyncClient(gateway.target) as client:
        greeting = await stream_greeting(client, Console(file=shown, width=80))

    assert "mesh> [red]Paris.\n" in shown.getvalue()  # the model's text is no markup
    assert greeting.completion_tokens == 3
    assert 0.1 <= greeting.first_token_s < greeting.total_s
    assert 0 < greeting.tokens_per_s <= 20
    assert gateway.requests[0].request.cache_control.no_cache


async def test_an_answer_that_breaks_off_is_an_error(gateway: ScriptedGateway) -> None:
    gateway.on(
        "StreamChat",
        lambda request, context: iter([Response(chunk={"deltas": [{"content": "Par"}]})]),
    )
    async with AsyncClient(gateway.target) as client:
        with pytest.raises(IncompleteStreamError):
            await stream_greeting(client, Console(file=io.StringIO()))


async def test_a_mesh_that_makes_no_text_shows_a_vector(gateway: ScriptedGateway) -> None:
    gateway.answer("Embed", gateway_pb2.EmbedResponse(embeddings=[{"values": [0.5] * 384}]))
    shown = io.StringIO()
    async with AsyncClient(gateway.target) as client:
        await embed_greeting(client, Console(file=shown, width=80))
    assert "mesh> [0.5000, 0.5000, 0.5000, 0.5000, ...]: 384 components" in shown.getvalue()


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [(("generate", "chat"), True), (("embed",), False), ((), True)],
)
def test_which_mesh_is_asked_for_text(capabilities: tuple[str, ...], expected: bool) -> None:
    models = [Model("encoder", capabilities=("classify",)), Model("m", capabilities=capabilities)]
    assert generates(models) is expected
