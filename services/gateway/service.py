"""The gateway put together: peers, stages in their order, front door."""

from __future__ import annotations

import asyncio
import logging

import grpc

from meshserve.v1 import admin_pb2_grpc, gateway_pb2_grpc, mesh_pb2_grpc
from services.gateway.api_keys import ApiKeys
from services.gateway.console.routes import Console
from services.gateway.context import RequestContext
from services.gateway.encoding.calls import Encodings
from services.gateway.encoding.context import EncodingContext
from services.gateway.encoding.encode import Encode
from services.gateway.encoding.look_up import LookUpVectors
from services.gateway.encoding.route import RouteEncoding
from services.gateway.encoding.screen import ScreenInputs
from services.gateway.encoding.settle import SettleEncoding
from services.gateway.encoding.tokenize import TokenizeInputs
from services.gateway.hosting.calls import HostingCalls
from services.gateway.hosting.hosting import Hosting
from services.gateway.hosting.operations import Operations
from services.gateway.hosting.reconciler import Reconciler
from services.gateway.hosting.servicer import AdminServicer
from services.gateway.hosting.store import DesiredStore
from services.gateway.http.calls import Calls
from services.gateway.http.server import HttpServer
from services.gateway.inference import Inference
from services.gateway.models import ModelDirectory
from services.gateway.overview.collector import Collector
from services.gateway.overview.gateways import Gateways
from services.gateway.overview.places import Places
from services.gateway.overview.servicer import MeshServicer
from services.gateway.overview.watch import MeshWatch
from services.gateway.own_usage import OwnUsage
from services.gateway.peers import Peers
from services.gateway.pipeline import Pipeline, SideBySide
from services.gateway.policy import PolicyWatch
from services.gateway.prompt_check import PromptCheck
from services.gateway.servicer import InferenceServicer
from services.gateway.stages.admit import Admit
from services.gateway.stages.authenticate import Authenticate, Authenticator
from services.gateway.stages.generate import Generate
from services.gateway.stages.look_up import LookUp
from services.gateway.stages.moderate import Moderate
from services.gateway.stages.route import Route
from services.gateway.stages.screen import Screen
from services.gateway.stages.settle import Settle
from services.gateway.stages.tokenize import Tokenize
from services.gateway.watchers import Watchers
from services.runtime import valkey
from services.runtime.monitor import Metadata
from services.runtime.server import Service, StartupError
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics

log = logging.getLogger(__name__)

# The ways out of cancelled requests outlive their calls by this at most.
KEEP_TIMEOUT_S = 5.0


class GatewayService(Service):
    """The public edge of the mesh."""

    name = "gateway"
    grpc_services = (
        "meshserve.v1.InferenceService",
        "meshserve.v1.MeshService",
        "meshserve.v1.AdminService",
    )

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        super().__init__(settings, metrics)
        gateway = settings.gateway
        try:
            self._valkey = valkey.connect_as_set(settings.valkey, metrics)
        except valkey.ValkeyUrlError as error:
            raise StartupError(str(error), "mend valkey.url, or its file") from error
        self._peers = Peers(settings, metrics)
        desired = DesiredStore(self._valkey, shared=not settings.valkey.is_embedded)
        self._hosting = Hosting(settings, self._peers, desired, metrics)
        self._models = ModelDirectory(settings, self._peers, self._hosting, metrics)
        hosting_calls = HostingCalls(metrics)
        self._reconciler = Reconciler(self._hosting, hosting_calls, settings.models)
        authenticator = Authenticator(gateway, metrics)
        self._keys = ApiKeys(settings, authenticator, metrics)
        if authenticator.required and not self._keys.settings.gateway.auth.keys:
            raise StartupError(
                f"callers on {gateway.listen} need an API key, but gateway.auth.keys is empty",
                "add a key as docs/configuration.md shows, or set gateway.auth.mode: off",
            )
        self._authenticator = authenticator
        tokenizer = self._peers.tokenizer
        self._policy = PolicyWatch(self._peers.safety, enabled=settings.safety.enabled)
        limiter = valkey.RateLimiter(self._valkey)
        check = PromptCheck(settings.safety, self._peers.safety, self._policy)
        # One for requests of every kind: they have the limits in common.
        authenticate = Authenticate(authenticator)
        admit = Admit(gateway, limiter, metrics)
        pipeline: Pipeline[RequestContext] = Pipeline(
            [
                authenticate,
                admit,
                Route(self._models),
                LookUp(settings.cache, self._peers.cache, self._policy),
                SideBySide(
                    Screen(check, tokenizer),
                    Tokenize(gateway, tokenizer),
                ),
                Generate(self._peers.decode_sessions, self._models),
                Moderate(settings.safety, self._peers.check_sessions),
                Settle(settings, metrics),
            ],
            metrics,
        )
        look_up = LookUpVectors(settings.cache, self._peers.cache, self._policy)
        encoding_pipeline: Pipeline[EncodingContext] = Pipeline(
            [
                authenticate,
                admit,
                RouteEncoding(self._models, gateway.max_message_bytes),
                look_up,
                SideBySide(ScreenInputs(check), TokenizeInputs(tokenizer)),
                Encode(self._models),
                SettleEncoding(settings, metrics),
            ],
            metrics,
        )
        self._inference = Inference(gateway, pipeline, metrics)
        self._encodings = Encodings(self._inference, encoding_pipeline, look_up)
        self._servicer = InferenceServicer(
            gateway, self._inference, self._encodings, self._models, authenticator, tokenizer
        )
        places = Places(settings, self._peers, metrics)
        collector = Collector(
            lambda: self._keys.settings, lambda: self.monitor.status(), self._valkey, places
        )
        watch = MeshWatch(collector.picture, collector.close, self.draining)
        recent = self._inference.recent
        usage = OwnUsage(settings, limiter, metrics, recent)
        self._watchers = Watchers(gateway.max_watchers, metrics)
        self._mesh_servicer = MeshServicer(watch, authenticator, self._watchers, recent, usage)
        self._admin_servicer = AdminServicer(
            settings,
            self._hosting,
            self._models.names,
            Operations(self._hosting, self._models.names, hosting_calls),
            authenticator,
        )
        self._http = self._http_server(authenticator)

    def register(self, server: grpc.aio.Server) -> None:
        """Adds InferenceService, MeshService and AdminService."""
        gateway_pb2_grpc.add_InferenceServiceServicer_to_server(self._servicer, server)
        mesh_pb2_grpc.add_MeshServiceServicer_to_server(self._mesh_servicer, server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(self._admin_servicer, server)

    def admit_watcher(self, metadata: Metadata) -> None:
        """Raises ServiceError for callers who are no operators."""
        authorization = dict(metadata).get("authorization")
        self._authenticator.operator(authorization if isinstance(authorization, str) else None)

    async def start(self) -> None:
        """Begins to ask the engines what they serve, and the filter for its policy. Raises
        StartupError."""
        self._valkey.start()
        self._keys.start()
        self._reconciler.start()
        self._models.start()
        self._policy.start()
        if self._http is not None:
            await self._http.start(self.certificates)

    async def probe(self) -> None:
        """Fails until every model has been described once.

        Later outages of peers show in the answers to requests: a gateway that took itself out
        because of them would only hide which service is away.
        """
        if not self._models.complete:
            raise RuntimeError("engines or tokenizers have not been reached yet")

    async def drain(self) -> None:
        """Has HTTP take nothing new, as gRPC does from then on."""
        if self._http is not None:
            self._http.close()

    async def stop(self) -> None:
        """Waits for answers that are being kept, then closes the channels."""
        if self._http is not None:
            await self._http.closed()
        try:
            async with asyncio.timeout(KEEP_TIMEOUT_S):
                await self._inference.drain()
                await self._encodings.drain()
        except TimeoutError:
            log.warning("requests are still on their way out; their answers may not be kept")
        await self._keys.stop()
        await self._reconciler.stop()
        self._models.stop()
        self._policy.stop()
        await self._peers.close()
        await self._valkey.close()

    def _http_server(self, authenticator: Authenticator) -> HttpServer | None:
        settings = self.settings
        if settings.gateway.http_listen is None:
            return None
        calls = Calls(settings.gateway, authenticator, self.draining)
        console = Console(
            settings,
            calls,
            self._servicer,
            self._mesh_servicer,
            Gateways(settings, self._peers, self.metrics),
            self._peers.tokenizer,
            self._watchers,
            self.draining,
        )
        return HttpServer(
            settings.gateway,
            console.routes(),
            probe=self.probe,
            draining=self.draining,
            keys_required=authenticator.required,
            metrics=self.metrics,
        )
