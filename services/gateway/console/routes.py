"""The calls of the console: JSON forms of the contract's own messages, under /api."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from importlib.metadata import version
from typing import Any

from aiohttp import web
from google.protobuf.message import Message

from meshserve.v1 import gateway_pb2, mesh_pb2, tokenizer_pb2_grpc
from services.gateway.console.assets import Assets
from services.gateway.console.everywhere import Everywhere
from services.gateway.console.token_texts import TokenTexts
from services.gateway.http.calls import Call, Calls, until_deadline
from services.gateway.http.streams import answer_stream, answer_watch, to_json
from services.gateway.overview.gateways import Gateways
from services.gateway.overview.servicer import MeshServicer
from services.gateway.servicer import InferenceServicer
from services.gateway.watchers import Watchers
from services.runtime.settings import Settings
from services.runtime.settings.addresses import UNIX_SOCKET, split_address


class Console:
    """Answers what the pages ask; all of it goes through the servicers that answer gRPC."""

    def __init__(
        self,
        settings: Settings,
        calls: Calls,
        servicer: InferenceServicer,
        mesh_servicer: MeshServicer,
        gateways: Gateways,
        tokenizer: tokenizer_pb2_grpc.TokenizerServiceAsyncStub,
        watchers: Watchers,
        draining: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._calls = calls
        self._servicer = servicer
        self._mesh_servicer = mesh_servicer
        self._everywhere = Everywhere(settings.gateway.listen, mesh_servicer, gateways)
        self._watchers = watchers
        self._draining = draining
        self._texts = TokenTexts(tokenizer)
        self._assets = Assets()

    def routes(self) -> list[web.RouteDef]:
        """All of the console."""
        answered, watched = self._calls.answered_by, self._calls.watched_by
        return [
            *self._assets.routes(),
            web.get("/api/session", answered(self._session)),
            web.get("/api/models", answered(self._models)),
            web.post("/api/chat", answered(self._chat)),
            web.get("/api/requests", watched(self._requests)),
            web.get("/api/usage", watched(self._usage)),
            web.get("/api/mesh", watched(self._mesh)),
        ]

    async def _session(self, call: Call) -> web.StreamResponse:
        """Who asks, and what the pages need to know of this gateway."""
        gateway, telemetry = self._settings.gateway, self._settings.telemetry
        port = None if gateway.listen.startswith(UNIX_SOCKET) else split_address(gateway.listen)[1]
        return _json(
            {
                "tenant": call.tenant.name,
                "operator": call.tenant.operator,
                "version": version("meshserve"),
                "grpc_port": port,
                "tls": gateway.tls is not None,
                "trace_url": telemetry.trace_url,
                "assets": self._assets.base,
            }
        )

    async def _models(self, call: Call) -> web.StreamResponse:
        """A ListModelsResponse with every model that the caller may use."""
        async with until_deadline():
            listed = await self._servicer.ListModels(
                gateway_pb2.ListModelsRequest(page_size=1000), call
            )
        return web.Response(text=to_json(listed), content_type="application/json")

    async def _chat(self, call: Call) -> web.StreamResponse:
        """A StreamChatRequest, answered by events with a StreamChatResponse each."""
        request = await call.message(gateway_pb2.StreamChatRequest)
        return await answer_stream(
            call, self._texts.filled_in(self._servicer.StreamChat(request, call))
        )

    async def _requests(self, call: Call) -> web.StreamResponse:
        """Requests of all gateways as they come: everybody's for an operator, else one's own."""
        with self._watchers.one_more(call.tenant):
            return await answer_watch(call, self._everywhere.requests(call), self._draining)

    async def _usage(self, call: Call) -> web.StreamResponse:
        """What the caller may use and has used, of all gateways."""
        with self._watchers.one_more(call.tenant):
            return await answer_watch(call, self._everywhere.usage(call), self._draining)

    async def _mesh(self, call: Call) -> web.StreamResponse:
        """A WatchMeshResponse a second."""
        reports = self._mesh_servicer.WatchMesh(mesh_pb2.WatchMeshRequest(), call)
        return await answer_watch(call, _as_json(reports), self._draining)


async def _as_json(messages: AsyncGenerator[Message]) -> AsyncGenerator[str]:
    async with aclosing(messages):
        async for message in messages:
            yield to_json(message)


def _json(document: dict[str, Any]) -> web.Response:
    return web.Response(body=json.dumps(document).encode(), content_type="application/json")
