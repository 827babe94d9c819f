"""Every status that a server can answer with is an exception that says what to do."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

import meshserve
from meshserve import AsyncClient, Client, MeshServeError
from meshserve.wire.statuses import error_from_status
from tests.fakes.scripted_gateway import ScriptedGateway

Code = grpc.StatusCode


def failing(
    code: grpc.StatusCode, message: str, *details: Any, request_id: str | None = None
) -> Callable[[Any, grpc.ServicerContext], Any]:
    """A handler that answers with a status and google.rpc details."""

    def handler(request: Any, context: grpc.ServicerContext) -> Any:
        status = status_pb2.Status(code=code.value[0], message=message)
        for detail in details:
            packed = any_pb2.Any()
            packed.Pack(detail)
            status.details.append(packed)
        trailing: list[tuple[str, str | bytes]] = []
        if details:
            trailing.append(("grpc-status-details-bin", status.SerializeToString()))
        if request_id is not None:
            trailing.append(("x-request-id", request_id))
        context.set_trailing_metadata(trailing)
        context.abort(code, message)

    return handler


def info(reason: str, **metadata: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain="meshserve", metadata=metadata)


@pytest.mark.parametrize(
    ("code", "reason", "kind"),
    [
        (Code.INVALID_ARGUMENT, "INVALID_FIELD", meshserve.InvalidRequestError),
        (Code.INVALID_ARGUMENT, "PROMPT_TOO_LONG", meshserve.InvalidRequestError),
        (Code.INVALID_ARGUMENT, "PROMPT_BLOCKED", meshserve.PromptBlockedError),
        (Code.OUT_OF_RANGE, "X", meshserve.InvalidRequestError),
        (Code.RESOURCE_EXHAUSTED, "MESSAGE_TOO_LARGE", meshserve.InvalidRequestError),
        (Code.UNAUTHENTICATED, "API_KEY_MISSING", meshserve.AuthenticationError),
        (Code.UNAUTHENTICATED, "API_KEY_INVALID", meshserve.AuthenticationError),
        (Code.PERMISSION_DENIED, "MODEL_NOT_ALLOWED", meshserve.PermissionDeniedError),
        (Code.NOT_FOUND, "MODEL_NOT_FOUND", meshserve.NotFoundError),
        (Code.ALREADY_EXISTS, "REQUEST_ID_IN_USE", meshserve.ConflictError),
        (Code.ABORTED, "ABORTED", meshserve.ConflictError),
        (Code.FAILED_PRECONDITION, "X", meshserve.FailedPreconditionError),
        (Code.RESOURCE_EXHAUSTED, "RATE_LIMITED", meshserve.RateLimitError),
        (Code.RESOURCE_EXHAUSTED, "QUEUE_FULL", meshserve.RateLimitError),
        (Code.UNAVAILABLE, "DRAINING", meshserve.ServiceUnavailableError),
        (Code.UNAVAILABLE, "ENGINE_RESTARTED", meshserve.ServiceUnavailableError),
        (Code.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", meshserve.DeadlineExceededError),
        (Code.CANCELLED, "CANCELLED", meshserve.RequestCancelledError),
        (Code.UNIMPLEMENTED, "CAPABILITY_MISSING", meshserve.UnsupportedError),
        (Code.INTERNAL, "INTERNAL", meshserve.ServerError),
        (Code.INTERNAL, "SEQUENCE_FAILED", meshserve.ServerError),
        (Code.UNKNOWN, "", meshserve.ServerError),
        (Code.DATA_LOSS, "", meshserve.ServerError),
    ],
)
async def test_each_status_has_its_exception_in_every_kind_of_call(
    gateway: ScriptedGateway,
    client: Client,
    code: grpc.StatusCode,
    reason: str,
    kind: type[MeshServeError],
) -> None:
    details = [info(reason, hint="h")] if reason else []
    for name in ("Generate", "StreamGenerate", "Chat"):
        gateway.on(name, failing(code, "what happened", *details, request_id="r7"))

    async with AsyncClient(gateway.target) as aclient:
        caught: list[MeshServeError] = []
        for call in (
            lambda: client.generate("x"),
            lambda: client.stream_generate("x").collect(),
        ):
            with pytest.raises(MeshServeError) as error:
                call()
            caught.append(error.value)
        for acall in (
            lambda: aclient.chat("x"),
            lambda: aclient.stream_generate("x").collect(),
        ):
            with pytest.raises(MeshServeError) as error:
                await acall()
            caught.append(error.value)

    for failure in caught:
        assert type(failure) is kind
        assert failure.code is code
        assert failure.reason == reason
        assert failure.message == "what happened"
        assert failure.request_id == "r7"
        assert failure.metadata == ({"hint": "h"} if reason else {})


def test_fields_quotas_and_the_time_to_wait_are_read(
    gateway: ScriptedGateway, client: Client
) -> None:
    gateway.on(
        "Generate",
        failing(
            Code.INVALID_ARGUMENT,
            "two problems",
            info("INVALID_FIELD"),
            error_details_pb2.BadRequest(
                field_violations=[
                    {"field": "sampling.top_p", "description": "must be in (0, 1]"},
                    {"field": "text", "description": "is empty"},
                ]
            ),
        ),
    )
    gateway.on(
        "Chat",
        failing(
            Code.RESOURCE_EXHAUSTED,
            "too fast",
            info("RATE_LIMITED"),
            error_details_pb2.RetryInfo(
                retry_delay=duration_pb2.Duration(seconds=1, nanos=5 * 10**8)
            ),
            error_details_pb2.QuotaFailure(
                violations=[{"subject": "tenant:a", "description": "60 requests per minute"}]
            ),
        ),
    )

    with pytest.raises(meshserve.InvalidRequestError) as invalid:
        client.generate("x")
    with pytest.raises(meshserve.RateLimitError) as limited:
        client.chat("x")

    assert [(v.path, v.description) for v in invalid.value.fields] == [
        ("sampling.top_p", "must be in (0, 1]"),
        ("text", "is empty"),
    ]
    assert limited.value.retry_after_s == 1.5
    assert limited.value.quotas[0].subject == "tenant:a"


def test_details_that_are_not_protobuf_are_left_out(
    gateway: ScriptedGateway, client: Client
) -> None:
    def handler(request: Any, context: grpc.ServicerContext) -> Any:
        context.set_trailing_metadata([("grpc-status-details-bin", b"\xff\xff\xff")])
        context.abort(Code.NOT_FOUND, "no such model")

    gateway.on("Generate", handler)
    with pytest.raises(meshserve.NotFoundError, match="no such model") as caught:
        client.generate("x", request_id="mine")
    assert caught.value.reason == ""
    assert caught.value.request_id == "mine"


def test_where_nobody_listens_the_error_names_the_target() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{closed.getsockname()[1]}"
    with Client(target, timeout=10) as client:
        with pytest.raises(meshserve.ConnectError, match=f"no MeshServe gateway.*{target}"):
            client.generate("x")
        with pytest.raises(meshserve.ServiceUnavailableError):
            client.stream_chat("x").collect()


@pytest.mark.parametrize(
    ("message", "says"),
    [
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: "
            "Failed to connect to remote host: Connection refused",
            "no MeshServe gateway answers at mesh:1 (Connection refused)",
        ),
        (
            "errors resolving mesh:1: [field:hostname lookup error:address lookup failed for "
            "mesh:1: Domain name not found]",
            "no MeshServe gateway answers at mesh:1 (Domain name not found)",
        ),
        (
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Tls "
            "handshake failed (TSI_PROTOCOL_FAILURE): SSL_ERROR_SSL: error:1: x: y: OK",
            "no TLS connection to mesh:1 can be made; is TLS spoken there, and by whom?",
        ),
        ("Socket closed", "the connection to mesh:1 broke (Socket closed)"),
        ("", "the connection to mesh:1 broke (no reason given)"),
    ],
)
def test_what_grpc_says_of_a_connection_is_put_briefly(message: str, says: str) -> None:
    error = error_from_status(Code.UNAVAILABLE, message, [], target="mesh:1")
    assert type(error) is meshserve.ConnectError
    assert str(error) == says


def test_a_gateway_that_goes_away_in_the_middle_breaks_the_stream(
    gateway: ScriptedGateway, client: Client
) -> None:
    from tests.fakes.scripted_gateway import capital_of_france

    def handler(request: Any, context: grpc.ServicerContext) -> Any:
        yield capital_of_france()[1]
        time.sleep(30)

    gateway.on("StreamGenerate", handler)
    stream = client.stream_generate("x")
    assert next(stream).text == "Par"
    gateway.stop()
    with pytest.raises(MeshServeError):
        stream.collect()


def test_a_timeout_is_the_deadline_that_the_server_sees(gateway: ScriptedGateway) -> None:
    def slow(request: Any, context: grpc.ServicerContext) -> Any:
        time.sleep(0.5)

    gateway.on("Generate", slow)
    with Client(gateway.target, timeout=20) as client:
        with pytest.raises(meshserve.DeadlineExceededError, match="within the timeout") as caught:
            client.generate("x", timeout=0.05)
        assert isinstance(caught.value, TimeoutError)
        gateway.on("Generate", failing(Code.INTERNAL, ""))
        for timeout in (5.0, None):
            with pytest.raises(meshserve.ServerError):
                client.generate("x", timeout=timeout)
        with pytest.raises(meshserve.ServerError):
            client.generate("x")

    remaining = [left or 0 for left in gateway.time_remaining[1:]]
    assert 0 < remaining[0] < 6  # gRPC rounds up
    assert remaining[1] > 3600  # gRPC's way of saying that there is no deadline
    assert 6 < remaining[2] < 21


async def test_a_timeout_ends_a_stream_of_the_asyncio_client(gateway: ScriptedGateway) -> None:
    def slow(request: Any, context: grpc.ServicerContext) -> Any:
        time.sleep(0.5)
        yield from ()

    gateway.on("StreamChat", slow)
    async with AsyncClient(gateway.target) as client:
        with pytest.raises(meshserve.DeadlineExceededError):
            await client.stream_chat("x", timeout=0.05).collect()


def test_a_message_over_the_limit_is_the_request_at_fault(
    gateway: ScriptedGateway, client: Client
) -> None:
    with pytest.raises(meshserve.InvalidRequestError, match="too large"):
        client.generate("x" * (64 * 2**20 + 1))
    assert gateway.requests == []


def test_errors_show_what_matters_when_printed(gateway: ScriptedGateway, client: Client) -> None:
    gateway.on("Generate", failing(Code.NOT_FOUND, "no model 'x'", info("MODEL_NOT_FOUND")))
    with pytest.raises(meshserve.NotFoundError) as caught:
        client.generate("x")
    assert str(caught.value) == "no model 'x'"
    assert "MODEL_NOT_FOUND" in repr(caught.value)
