"""Asks every replica for its status, all at the same time, and keeps what they said for a while."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import replace

import grpc
from google.protobuf.message import DecodeError

from meshserve.v1 import mesh_pb2, monitor_pb2
from services.gateway.overview.picture import snapshot
from services.gateway.overview.places import Place, Places
from services.gateway.overview.readings import WINDOW_S, History, Reading, Window
from services.gateway.overview.replicas import Replica
from services.gateway.overview.valkey import address_of, valkey_status
from services.runtime.settings import Settings
from services.runtime.valkey import ValkeyClient, ValkeyError

# A replica that takes longer is shown as unreachable.
ANSWER_TIMEOUT_S = 1.0
_REQUEST = monitor_pb2.GetStatusRequest().SerializeToString()
# Polls are no part of any trace: this one is not recorded.
_UNRECORDED_TRACE = ("traceparent", f"00-{secrets.token_hex(16)}-{secrets.token_hex(8)}-00")


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
        replicas = [each for each in answers if each not in same]
        replicas.append(replace(own, address=same[0].address) if same else own)
        known = {(each.service, each.address) for each in (own, *replicas)}
        self._histories = {key: kept for key, kept in self._histories.items() if key in known}
        return snapshot(sorted(replicas, key=lambda each: each.address), self._settings())

    async def close(self) -> None:
        """Looks no further until the next picture."""
        await self._places.close()

    def _own(self) -> Replica:
        address = self._settings().gateway.listen
        window = self._take_in("gateway", address, self._own_status())
        return Replica("gateway", address, window, reporting=True)

    async def _ask(self, place: Place, authorization: str | None) -> Replica:
        metadata = [_UNRECORDED_TRACE]
        if place.service == "gateway" and authorization is not None:
            metadata.append(("authorization", authorization))
        try:
            answer = await place.get_status(_REQUEST, timeout=ANSWER_TIMEOUT_S, metadata=metadata)
            status = monitor_pb2.GetStatusResponse.FromString(answer)
        except (grpc.RpcError, grpc.aio.UsageError, DecodeError, asyncio.CancelledError) as error:
            if _is_ours_to_end(error):
                raise
            return Replica(place.service, place.address, None, _why(error), place.models)
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


def _is_ours_to_end(error: BaseException) -> bool:
    """Whether the poll is given up, in contrast to a connection that was closed while it was under
    way because its replica has left."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0


def _why(error: BaseException) -> str:
    """Why a replica has not answered, in a few words."""
    if isinstance(error, DecodeError):
        return "answers with something else; is it a replica at all?"
    if not isinstance(error, grpc.aio.AioRpcError):
        return "its connection was closed"
    code, details = error.code(), error.details() or ""
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return f"no answer within {ANSWER_TIMEOUT_S:g} s"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return "does not tell its status; is it of an older version?"
    # gRPC names the address over and over; what happened stands last.
    return details.rpartition(": ")[2] or code.name
