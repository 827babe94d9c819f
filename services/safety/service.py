"""The safety filter as a service of the mesh: its policies, its server, its health, its end."""

from __future__ import annotations

import asyncio

import grpc

from meshserve.v1 import safety_pb2, safety_pb2_grpc
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
        self._servicer = SafetyServicer(settings.safety, self._policies, metrics, self.draining)

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the filter's RPCs."""
        safety_pb2_grpc.add_SafetyServiceServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Reads the policies and makes them ready. Raises StartupError."""
        try:
            await asyncio.to_thread(self._policies.load, self.settings.safety.policies)
        except PolicyError as error:
            raise StartupError(
                f"a safety policy cannot be used:\n{error}",
                "mend the file that safety.policies names; docs/safety.md describes its keys",
            ) from error

    async def probe(self) -> None:
        """Checks a text in both directions."""
        policy = self._policies.find("")
        for matcher in (policy.prompts, policy.completions):
            if check_texts(matcher, [_PROBE_TEXT]).texts != [_PROBE_TEXT]:
                raise RuntimeError("an ordinary text does not pass")

    async def stop(self) -> None:
        """Ends the threads."""
        self._servicer.close()
