"""The other gateways of the mesh: those under `gateway.target`, if there is one."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from google.protobuf.message import Message

from meshserve.v1 import gateway_pb2
from services.gateway.overview.asking import ANSWER_TIMEOUT_S, NotAnsweredError, ask
from services.gateway.peers import Peers
from services.runtime.channels import MeshChannel, connect
from services.runtime.replicas import Replica
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics

GATEWAY_SERVICE = gateway_pb2.DESCRIPTOR.services_by_name["InferenceService"].full_name

AnswerT = TypeVar("AnswerT", bound=Message)


def connect_gateways(settings: Settings, peers: Peers, metrics: Metrics) -> MeshChannel | None:
    """A channel to all gateways, this one included; None where they have no common target."""
    section = settings.gateway
    if section.target is None:
        return None
    return connect(
        section.target,
        peer="gateway",
        health_service=GATEWAY_SERVICE,
        metrics=metrics,
        max_message_bytes=section.max_message_bytes,
        credentials=peers.credentials(section.tls),
    )


class Gateways:
    """Asks all gateways, each in the name of whoever asks this one, so that each decides for itself
    what it tells."""

    def __init__(self, settings: Settings, peers: Peers, metrics: Metrics) -> None:
        self._connect = functools.partial(connect_gateways, settings, peers, metrics)
        self._channel: MeshChannel | None = None
        self._watchers = 0

    @asynccontextmanager
    async def watched(self) -> AsyncIterator[None]:
        """Connections are kept for as long as anybody is within."""
        if self._watchers == 0:
            self._channel = self._connect()
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1
            if self._watchers == 0 and self._channel is not None:
                channel, self._channel = self._channel, None
                await channel.close()

    async def ask(
        self,
        path: str,
        request_to: Callable[[str], Message],
        answer: type[AnswerT],
        authorization: str | None,
    ) -> dict[str, AnswerT | NotAnsweredError]:
        """What each says, or why it does not, by its address; this one may be among them. Takes
        little longer than ANSWER_TIMEOUT_S at most. To be called within `watched`."""
        if self._channel is None:
            return {}
        await self._channel.replicas.wait_until_known(ANSWER_TIMEOUT_S)
        replicas = self._channel.replicas.processes()

        async def ask_one(replica: Replica) -> AnswerT | NotAnsweredError:
            rpc = replica.link.rpc(path, "unary_unary")
            try:
                return await ask(rpc, request_to(replica.address), answer, authorization)
            except NotAnsweredError as error:
                return error

        answers = await asyncio.gather(*(ask_one(each) for each in replicas))
        return {each.address: said for each, said in zip(replicas, answers, strict=True)}
