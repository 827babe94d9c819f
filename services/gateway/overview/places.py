"""Where the replicas of the mesh are: those that this gateway calls, and the other gateways."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

from services.gateway.overview.gateways import connect_gateways
from services.gateway.peers import Peers
from services.runtime.channels import MeshChannel
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics

GET_STATUS = "/meshserve.v1.MonitorService/GetStatus"


@dataclass(frozen=True, slots=True)
class Place:
    """Where a replica is.

    Attributes:
        service: which service it is.
        address: `IP:PORT`, `[IPV6]:PORT` or `unix:PATH`.
        get_status: asks it, in bytes.
        models: those that its target is for; only of engines.
    """

    service: str
    address: str
    get_status: Callable[..., Awaitable[bytes]] = field(compare=False)
    models: tuple[str, ...] = ()


class Places:
    """Finds the replicas of all services; of gateways those under `gateway.target`, if there is
    one."""

    def __init__(self, settings: Settings, peers: Peers, metrics: Metrics) -> None:
        self._settings = settings
        self._peers = peers
        self._metrics = metrics
        self._gateways: MeshChannel | None = None

    def all(self) -> list[Place]:
        """The replicas that are known now. Other gateways are looked for from the first call on."""
        if self._gateways is None:
            self._gateways = connect_gateways(self._settings, self._peers, self._metrics)
        channels = [*self._peers.channels, *([self._gateways] if self._gateways else [])]
        return [
            Place(
                channel.instruments.peer,
                replica.address,
                replica.link.rpc(GET_STATUS, "unary_unary"),
                tuple(self._settings.models_at(channel.target))
                if channel.instruments.peer == "engine"
                else (),
            )
            for channel in channels
            for replica in channel.replicas.processes()
        ]

    async def close(self) -> None:
        """Looks for other gateways no more."""
        if self._gateways is not None:
            await self._gateways.close()
            self._gateways = None
