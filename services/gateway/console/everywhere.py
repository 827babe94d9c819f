"""What all gateways tell of requests and of use, as documents for the pages.

Each gateway is asked in the name of whoever looks. One that does not answer is named: what it has
answered is missing from the page, and a reader should know.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from google.protobuf import json_format
from google.protobuf.message import Message

from meshserve.v1 import mesh_pb2
from services.gateway.http.calls import Call
from services.gateway.overview.asking import NotAnsweredError
from services.gateway.overview.gateways import Gateways
from services.gateway.overview.servicer import MeshServicer

LIST_REQUESTS = "/meshserve.v1.MeshService/ListRequests"
GET_USAGE = "/meshserve.v1.MeshService/GetUsage"
REQUESTS_INTERVAL_S = 1.0
USAGE_INTERVAL_S = 2.0

_AnswerT = TypeVar("_AnswerT", mesh_pb2.ListRequestsResponse, mesh_pb2.GetUsageResponse)
_Said = list[tuple[str, _AnswerT | NotAnsweredError]]
"""An address and what the gateway there has said; the first is the one that is asked."""


class Everywhere:
    """Documents of all gateways, as they change."""

    def __init__(self, own_address: str, own: MeshServicer, others: Gateways) -> None:
        self._own_address = own_address
        self._own = own
        self._others = others

    async def requests(self, call: Call) -> AsyncGenerator[str]:
        """`{"gateways": [{"address", "problem" | ...}]}` with the fields of a ListRequestsResponse,
        whenever there is something new: what has ended since the document before, and all that is
        in flight. A gateway whose `instance_id` is another one has started anew."""
        cursors: dict[str, str] = {}

        def request_to(address: str) -> mesh_pb2.ListRequestsRequest:
            return mesh_pb2.ListRequestsRequest(cursor=cursors.get(address, ""))

        response = mesh_pb2.ListRequestsResponse
        before: list[tuple[str, str, int]] | None = None
        async with self._others.watched():
            while True:
                own = await self._own.ListRequests(request_to(self._own_address), call)
                others = await self._others.ask(
                    LIST_REQUESTS, request_to, response, call.authorization
                )
                said = self._merged(own, others)
                answers = {at: each for at, each in said if isinstance(each, response)}
                cursors |= {at: each.cursor for at, each in answers.items()}
                cursors[self._own_address] = own.cursor
                now = [_state(at, each) for at, each in said]
                if now != before or any(
                    each.finished or each.in_flight for each in answers.values()
                ):
                    yield _document(said)
                before = now
                if not any(each.has_more for each in answers.values()):
                    await asyncio.sleep(REQUESTS_INTERVAL_S)

    async def usage(self, call: Call) -> AsyncGenerator[str]:
        """The same with the fields of a GetUsageResponse, at an interval."""
        async with self._others.watched():
            while True:
                own = await self._own.GetUsage(mesh_pb2.GetUsageRequest(), call)
                others = await self._others.ask(
                    GET_USAGE,
                    lambda _: mesh_pb2.GetUsageRequest(),
                    mesh_pb2.GetUsageResponse,
                    call.authorization,
                )
                yield _document(self._merged(own, others))
                await asyncio.sleep(USAGE_INTERVAL_S)

    def _merged(self, own: _AnswerT, others: dict[str, _AnswerT | NotAnsweredError]) -> _Said[Any]:
        """This gateway, by the address that others know it by, if any, and the others."""
        address = self._own_address
        rest: _Said[Any] = []
        for other, answer in sorted(others.items()):
            if isinstance(answer, NotAnsweredError) or answer.instance_id != own.instance_id:
                rest.append((other, answer))
            else:
                address = other
        return [(address, own), *rest]


def _state(
    address: str, answer: mesh_pb2.ListRequestsResponse | NotAnsweredError
) -> tuple[str, str, int]:
    """What makes a document worth sending when it changes, be there a request or none."""
    if isinstance(answer, NotAnsweredError):
        return address, str(answer), 0
    return address, answer.instance_id, answer.in_flight_total


def _document(said: _Said[Any]) -> str:
    return json.dumps({"gateways": [{"address": at, **_fields(answer)} for at, answer in said]})


def _fields(answer: Message | NotAnsweredError) -> dict[str, Any]:
    if isinstance(answer, NotAnsweredError):
        return {"problem": str(answer)}
    return json_format.MessageToDict(
        answer, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )
