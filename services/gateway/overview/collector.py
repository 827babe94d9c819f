"""Asks every replica for its status, all at the same time, and keeps what they said for a while."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

from meshserve.v1 import mesh_pb2, monitor_pb2
from services.gateway.overview.asking import NotAnsweredError, ask
from services.gateway.overview.picture import snapshot
from services.gateway.overview.places import Place, Places
from services.gateway.overview.readings import WINDOW_S, History, Reading, Window
from services.gateway.overview.replicas import Replica
from services.gateway.overview.valkey import address_of, valkey_status
from services.runtime.settings import Settings
from services.runtime.valkey import ValkeyClient, ValkeyError

_REQUEST = monitor_pb2.GetStatusRequest()


class Collector:
    """Takes pictures of the mesh.

    Args:
        settings: gives them as they are now: API keys may change.
        own_status: of this gateway.
        valkey: the client of what replicas share.
        places: where the other replicas are.
    """

    def __init__(
        self,
        settings: Callable[[], Settings],
        own_status: Callable[[], monitor_pb2.GetStatusResponse],
        valkey: ValkeyClient,
        places: Places,
    ) -> None:
        self._settings = settings
        self._own_status = own_status
        self._valkey = valkey
        self._places = places
        self._histories: dict[tuple[str, str], History] = {}
        self._polled_at = float("-inf")

    async def picture(self, authorization: str | None) -> mesh_pb2.MeshSnapshot:
        """Asks everybody; takes little longer than ANSWER_TIMEOUT_S at most. Other gateways are
        asked in the name of an operator's `authorization` header."""
        now = time.monotonic()
        if now - self._polled_at > WINDOW_S:
            # Nobody has watched for long: what was counted meanwhile tells nothing of now.
            self._histories.clear()
        self._polled_at = now
        own = self._own()
        answers = await asyncio.gather(
            self._ask_valkey(),
            *(self._ask(place, authorization) for place in self._places.all()),
        )
        # Under the target of all gateways it finds itself, by the address that others know it by.
        same = [each for each in answers if each.instance_id == own.instance_id]
        known = {(each.service, each.address) for each in (own, *answers)}
        self._histories = {key: kept for key, kept in self._histories.items() if key in known}
        replicas = [each for each in answers if each not in same]
        replicas.append(replace(own, address=same[0].address) if same else own)
        return snapshot(sorted(replicas, key=lambda each: each.address), self._settings())

    async def close(self) -> None:
        """Looks no further until the next picture."""
        await self._places.close()

    def _own(self) -> Replica:
        address = self._settings().gateway.listen
        window = self._take_in("gateway", address, self._own_status())
        return Replica("gateway", address, window, reporting=True)

    async def _ask(self, place: Place, authorization: str | None) -> Replica:
        # What only operators may ask of a gateway, anybody may ask within the mesh.
        name = authorization if place.service == "gateway" else None
        try:
            status = await ask(place.get_status, _REQUEST, monitor_pb2.GetStatusResponse, name)
        except NotAnsweredError as error:
            return Replica(place.service, place.address, None, str(error), place.models)
        window = self._take_in(place.service, place.address, status)
        return Replica(place.service, place.address, window, models=place.models)

    async def _ask_valkey(self) -> Replica:
        address = address_of(self._valkey.name)
        try:
            status = await valkey_status(self._valkey)
        except ValkeyError as error:
            return Replica("valkey", address, None, str(error))
        return Replica("valkey", address, self._take_in("valkey", address, status))

    def _take_in(self, service: str, address: str, status: monitor_pb2.GetStatusResponse) -> Window:
        history = self._histories.setdefault((service, address), History())
        return history.add(Reading(time.monotonic(), status))
