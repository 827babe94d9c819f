"""Who calls the mesh from outside: with a key, and with a CA where there are certificates."""

from __future__ import annotations

import ssl
import time
from pathlib import Path
from typing import Any

import grpc

import meshserve
from meshserve.v1 import mesh_pb2, mesh_pb2_grpc, monitor_pb2

KEY, NEW_KEY = "the-first-key", "the-second-key"
GIVE_UP_AFTER_S = 20.0


class Caller:
    """Knows the name of the gateway's Service.

    Args:
        edge: that name, or the address of one gateway.
        secrets: a folder for each Secret.
    """

    def __init__(self, edge: str, secrets: Path) -> None:
        self._target = f"{edge}:50051"
        self._ca = next(secrets.glob("*/ca.crt"), None)

    def ask(self, key: str = KEY) -> str:
        """What a model says."""
        tls = meshserve.TLS(ca_file=self._ca) if self._ca else False
        with meshserve.Client(self._target, tls=tls, api_key=key) as client:
            return client.generate("The capital of France is", max_tokens=8, temperature=0).text

    def gateways(self, wanted: int) -> list[str]:
        """Addresses of the gateways that an operator sees at work; looks until there are so many,
        or for a while."""
        seen: set[str] = set()
        with self._channel() as channel:
            stub: Any = mesh_pb2_grpc.MeshServiceStub(channel)
            give_up_at = time.monotonic() + GIVE_UP_AFTER_S
            for response in stub.WatchMesh(
                mesh_pb2.WatchMeshRequest(interval_ms=250),
                metadata=[("authorization", f"Bearer {KEY}")],
                timeout=2 * GIVE_UP_AFTER_S,
            ):
                seen = {
                    replica.address
                    for service in response.mesh.services
                    if service.service == "gateway"
                    for replica in service.replicas
                    if replica.state == monitor_pb2.REPLICA_STATE_SERVING
                }
                if len(seen) >= wanted or time.monotonic() > give_up_at:
                    break
        return sorted(seen)

    def key_has_changed(self) -> bool:
        """Whether the new key is taken, and the old one refused, within a while."""
        give_up_at = time.monotonic() + GIVE_UP_AFTER_S
        while time.monotonic() < give_up_at:
            if self._is_let_in(NEW_KEY) and not self._is_let_in(KEY):
                return True
            time.sleep(0.2)
        return False

    def _is_let_in(self, key: str) -> bool:
        try:
            self.ask(key)
        except meshserve.AuthenticationError:
            return False
        return True

    def _channel(self) -> grpc.Channel:
        if self._ca is None:
            return grpc.insecure_channel(self._target)
        credentials = grpc.ssl_channel_credentials(self._ca.read_bytes())
        return grpc.secure_channel(self._target, credentials)


def certificate_has_changed(address: tuple[str, int], before: str) -> bool:
    """Whether a service shows another certificate than before, within a while."""
    give_up_at = time.monotonic() + GIVE_UP_AFTER_S
    while time.monotonic() < give_up_at:
        if ssl.get_server_certificate(address) != before:
            return True
        time.sleep(0.2)
    return False
