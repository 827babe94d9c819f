"""The safety filter as a service of the mesh: its policies, its server, its health, its end."""

from __future__ import annotations

import asyncio

import grpc

from meshserve.v1 import safety_pb2, safety_pb2_grpc
from services.runtime.file_watch import Contents, FilesRefusedError, FileWatch, read_files
from services.runtime.server import Service, StartupError
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics
from services.safety.policies_in_force import PoliciesInForce
from services.safety.policy import PolicyError
from services.safety.servicer import SafetyServicer
from services.safety.session import check_texts

_PROBE_TEXT = "Is all well?"


class SafetyService(Service):
    """Serves the checks of all configured policies. It keeps no state between calls and streams,
    so that any replica can answer for any other."""

    name = "safety"
    grpc_services = (safety_pb2.DESCRIPTOR.services_by_name["SafetyService"].full_name,)
    carries_calls = True

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        super().__init__(settings, metrics)
        self._policies = PoliciesInForce()
        self._watch: FileWatch | None = None
        self._servicer = SafetyServicer(settings.safety, self._policies, metrics, self.draining)

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the filter's RPCs."""
        safety_pb2_grpc.add_SafetyServiceServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Reads the policies and makes them ready, now and whenever a file has changed. Raises
        StartupError."""
        files = tuple(self.settings.safety.policies.values())
        try:
            contents = read_files(files)
            await self._load(contents)
        except FilesRefusedError as error:
            raise StartupError(
                f"a safety policy cannot be used:\n{error}",
                "mend the file that safety.policies names; docs/safety.md describes its keys",
            ) from error
        self._watch = FileWatch("policies", files, self._load, self.metrics, in_use=contents)
        self._watch.start()

    async def _load(self, _contents: Contents) -> None:
        try:
            await asyncio.to_thread(self._policies.load, self.settings.safety.policies)
        except PolicyError as error:
            raise FilesRefusedError(str(error)) from error

    async def probe(self) -> None:
        """Checks a text in both directions."""
        policy = self._policies.find("")
        for matcher in (policy.prompts, policy.completions):
            if check_texts(matcher, [_PROBE_TEXT]).texts != [_PROBE_TEXT]:
                raise RuntimeError("an ordinary text does not pass")

    async def stop(self) -> None:
        """Looks at the policies no more, and ends the threads."""
        if self._watch is not None:
            await self._watch.stop()
        self._servicer.close()
