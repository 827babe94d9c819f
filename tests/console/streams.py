"""Reads server-sent events as a browser's page does."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import aiohttp


async def events_of(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[str, Any]]:
    """(event, document) of each event, as they come."""
    event = ""
    async for line in response.content:
        text = line.decode().rstrip("\n")
        if text.startswith("event: "):
            event = text.removeprefix("event: ")
        elif text.startswith("data: "):
            yield event, json.loads(text.removeprefix("data: "))


def chat_body(text: str = "hello", **fields: Any) -> dict[str, Any]:
    """A StreamChatRequest as JSON."""
    messages = [{"role": "ROLE_USER", "content": text}]
    return {"request": {"conversation": {"messages": messages}, **fields}}
