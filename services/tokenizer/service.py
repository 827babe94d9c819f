"""The tokenizer as a service of the mesh: its models, its server, its health, its end."""

from __future__ import annotations

import asyncio

import grpc

from meshserve.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from services.runtime.modelfiles.errors import ModelFileError, ModelStoreError
from services.runtime.server import Service, StartupError
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics
from services.runtime.tokenizerfiles.errors import TokenizerLoadError
from services.tokenizer.models import ServedModels
from services.tokenizer.servicer import TokenizerServicer

_PROBE_TEXT = "Is it well?"


class TokenizerService(Service):
    """Serves the tokenizers of all configured models. It keeps no state between calls, so that any
    replica can answer for any other."""

    name = "tokenizer"
    grpc_services = (tokenizer_pb2.DESCRIPTOR.services_by_name["TokenizerService"].full_name,)
    carries_calls = True

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        super().__init__(settings, metrics)
        self._models = ServedModels()
        self._servicer = TokenizerServicer(settings.tokenizer, self._models, metrics, self.draining)

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the tokenizer's RPCs."""
        tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Loads the tokenizers. Raises StartupError."""
        await asyncio.to_thread(self._load)

    async def probe(self) -> None:
        """Encodes and decodes a text with each model."""
        for name in self._models.names:
            _, tokenizer = self._models.find(name)
            token_ids = tokenizer.encode(_PROBE_TEXT, add_special_tokens=False).token_ids
            if not tokenizer.detokenizer.decode(token_ids):
                raise RuntimeError(f"the tokenizer of {name} decodes nothing")

    async def stop(self) -> None:
        """Ends the threads."""
        self._servicer.close()

    def _load(self) -> None:
        for name, model in self.settings.models.items():
            try:
                self._models.load(name, model, self.settings.model_cache)
            except ModelStoreError as error:
                raise StartupError(
                    f"model {name!r} is not on this machine: {error.problem}", error.way_out
                ) from error
            except (TokenizerLoadError, ModelFileError) as error:
                raise StartupError(
                    f"the tokenizer of model {name!r} cannot be loaded: {error}",
                    f"check models.{name}.source; pull the model again if the file is damaged",
                ) from error
