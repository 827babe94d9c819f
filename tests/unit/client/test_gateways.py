"""Several gateways behind one target: calls are spread over them, and none is missed."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest

import meshserve
from meshserve import Client
from meshserve.v1 import gateway_pb2
from tests.fakes.scripted_gateway import ScriptedGateway, capital_of_france


@pytest.fixture
def gateways() -> Iterator[list[ScriptedGateway]]:
    both = [ScriptedGateway(), ScriptedGateway()]
    for gateway in both:
        gateway.answer("CountTokens", gateway_pb2.CountTokensResponse(tokens=3))
    yield both
    for gateway in both:
        gateway.stop()


def target_of(gateways: list[ScriptedGateway]) -> str:
    return "ipv4:" + ",".join(gateway.target for gateway in gateways)


def counted(gateways: list[ScriptedGateway]) -> list[int]:
    return [len(gateway.requests) for gateway in gateways]


def test_calls_are_spread_over_the_gateways(gateways: list[ScriptedGateway]) -> None:
    with Client(target_of(gateways), timeout=10) as client:
        while not all(counted(gateways)):
            client.count_tokens("one")
        before = counted(gateways)
        for _ in range(20):
            client.count_tokens("one")
        after = counted(gateways)
    assert [then - now for then, now in zip(after, before, strict=True)] == [10, 10]


def test_no_call_fails_when_a_gateway_ends(gateways: list[ScriptedGateway]) -> None:
    with Client(target_of(gateways), timeout=10) as client, ThreadPoolExecutor(4) as callers:
        while not all(counted(gateways)):
            client.count_tokens("one")
        answers = [callers.submit(client.count_tokens, "one") for _ in range(400)]
        gateways[0].stop()
        assert {answer.result().tokens for answer in answers} == {3}


@pytest.mark.parametrize("code", [grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED])
def test_what_nothing_was_heard_of_is_asked_again(
    gateway: ScriptedGateway, client: Client, code: grpc.StatusCode
) -> None:
    def refuse_once(request: Any, context: grpc.ServicerContext) -> Any:
        gateway.on("StreamGenerate", lambda request, context: iter(capital_of_france()))
        context.abort(code, "going away")

    gateway.on("StreamGenerate", refuse_once)
    with client.stream_generate("The capital of France?") as stream:
        assert "".join(stream.iter_text()) == "Paris."
    assert len(gateway.requests) == 2


def test_what_has_begun_is_not_asked_again(gateway: ScriptedGateway, client: Client) -> None:
    def break_off(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        yield capital_of_france()[0]
        context.abort(grpc.StatusCode.UNAVAILABLE, "gone")

    gateway.on("StreamGenerate", break_off)
    with (
        pytest.raises(meshserve.ServiceUnavailableError),
        client.stream_generate("The capital of France?") as stream,
    ):
        list(stream)
    assert len(gateway.requests) == 1


def test_a_gateway_that_stays_away_is_not_asked_for_ever(
    gateway: ScriptedGateway, client: Client
) -> None:
    def refuse(request: Any, context: grpc.ServicerContext) -> Any:
        context.abort(grpc.StatusCode.UNAVAILABLE, "going away")

    gateway.on("CountTokens", refuse)
    with pytest.raises(meshserve.ServiceUnavailableError):
        client.count_tokens("one")
    assert len(gateway.requests) == 3
