"""Completions over HTTP with server-sent events: vLLM's API and that of llama.cpp's server.

Both are given token ids, so that every system gets the very same prompt and none of them tokenizes.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import aiohttp

from benchmarks.load import BenchmarkError
from benchmarks.systems.server_process import ClientFactory, NotServingError
from benchmarks.workloads import Request

MAX_LINE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Event:
    """What one server-sent event says."""

    brings_tokens: bool
    output_tokens: int | None = None  # in all, once the server has counted them


class CompletionAPI(Protocol):
    """How one kind of server wants to be asked, and what its events mean."""

    path: str
    keeps_connections: bool  # or ends each once its answer is given

    def body(self, request: Request) -> dict[str, Any]:
        """The JSON of a streamed greedy completion of a fixed length."""
        ...

    def event(self, payload: dict[str, Any]) -> Event:
        """Reads an event. Raises BenchmarkError where it reports a failure."""
        ...


class VLLMCompletions:
    """vLLM's `/v1/completions`."""

    path = "/v1/completions"
    keeps_connections = True

    def __init__(self, model: str) -> None:
        self._model = model

    def body(self, request: Request) -> dict[str, Any]:
        """See CompletionAPI."""
        return {
            "model": self._model,
            "prompt": list(request.prompt_token_ids),
            "max_tokens": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }

    def event(self, payload: dict[str, Any]) -> Event:
        """The last event brings the usage and no choice."""
        if "error" in payload:
            raise BenchmarkError(str(payload["error"]))
        usage = payload.get("usage")
        return Event(bool(payload["choices"]), usage["completion_tokens"] if usage else None)


class LlamaCppCompletions:
    """The llama.cpp server's own `/completion`."""

    path = "/completion"
    keeps_connections = False

    def body(self, request: Request) -> dict[str, Any]:
        """See CompletionAPI."""
        return {
            "prompt": list(request.prompt_token_ids),
            "n_predict": request.output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "cache_prompt": True,
            "stream": True,
        }

    def event(self, payload: dict[str, Any]) -> Event:
        """The last event has `stop` set, brings the count and no text."""
        if "error" in payload:
            raise BenchmarkError(str(payload["error"]))
        if payload.get("stop"):
            return Event(False, payload["tokens_predicted"])
        return Event(True)


class CompletionClient:
    """A client of one server."""

    def __init__(self, session: aiohttp.ClientSession, base_url: str, api: CompletionAPI) -> None:
        self._session = session
        self._url = base_url + api.path
        self._api = api

    async def generate(self, request: Request, arrived: Callable[[], None]) -> int:
        """See `load.Client`. Raises NotServingError where the server is not up yet."""
        output_tokens: int | None = None
        try:
            async with self._session.post(self._url, json=self._api.body(request)) as response:
                if response.status == 503:
                    raise NotServingError("the server is still loading")
                if response.status != 200:
                    raise BenchmarkError(f"status {response.status}: {await response.text()}")
                async for line in response.content:
                    payload = event_payload(line)
                    if payload is None:
                        continue
                    event = self._api.event(payload)
                    if event.brings_tokens:
                        arrived()
                    if event.output_tokens is not None:
                        output_tokens = event.output_tokens
        except aiohttp.ClientConnectionError as error:
            raise NotServingError(str(error)) from error
        if output_tokens is None:
            raise BenchmarkError("the stream ended without saying how many tokens it brought")
        return output_tokens


def event_payload(line: bytes) -> dict[str, Any] | None:
    """The JSON of one line of a server-sent event stream; None where it carries none."""
    if not line.startswith(b"data:"):
        return None
    data = line[5:].strip()
    if not data or data == b"[DONE]":
        return None
    payload: dict[str, Any] = json.loads(data)
    return payload


def http_clients(port: int, api: CompletionAPI) -> ClientFactory:
    """Makes clients of a server on this machine, with as many connections as are asked for."""

    @asynccontextmanager
    async def open_client() -> AsyncIterator[CompletionClient]:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=not api.keeps_connections),
            timeout=aiohttp.ClientTimeout(total=600),
            read_bufsize=MAX_LINE_BYTES,
        ) as session:
            yield CompletionClient(session, f"http://127.0.0.1:{port}", api)

    return open_client
