"""One table of reasons; an error keeps its meaning on every way it can take."""

from __future__ import annotations

import math
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from hypothesis import given
from hypothesis import strategies as st

from meshserve.v1 import types_pb2
from services.runtime.errors import (
    REASONS,
    STATUS_DETAILS_KEY,
    Reason,
    ServiceError,
    from_session_status,
    invalid_field,
    status_metadata,
    to_session_status,
)
from tests.fakes.shapes import Shapes, ShapesStub

DETAIL_BYTES = 6000  # base64 and the message header beside it stay below 8 KiB


class RpcError(grpc.RpcError):
    """What gRPC raises for a status."""

    def __init__(self, code: grpc.StatusCode, details: str = "", trailing: Any = ()) -> None:
        self._answer = (code, details, trailing)

    def code(self) -> grpc.StatusCode:
        return self._answer[0]

    def details(self) -> str:
        return self._answer[1]

    def trailing_metadata(self) -> Any:
        return self._answer[2]


def test_every_reason_has_one_entry_and_every_entry_says_what_to_do() -> None:
    assert set(REASONS) == set(Reason)
    for reason, entry in REASONS.items():
        assert reason.value == reason.name
        assert entry.code is not grpc.StatusCode.OK
        assert entry.meaning.endswith(".")
        assert entry.remedy.endswith(".")
        assert set(entry.details) <= {"BadRequest", "RetryInfo", "QuotaFailure"}


errors = st.builds(
    ServiceError,
    st.sampled_from(Reason),
    st.text("abc é%\n", max_size=50),
    field_violations=st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9)), max_size=3),
    quota_violations=st.lists(st.tuples(st.text(max_size=9), st.text(max_size=9)), max_size=3),
    retry_after_s=st.none() | st.integers(0, 10**6).map(lambda ms: ms / 1000),
    metadata=st.dictionaries(st.text(max_size=9), st.text(max_size=9), max_size=3),
)


def same(left: ServiceError | None, right: ServiceError) -> bool:
    return left is not None and vars(left) == vars(right) and str(left) == str(right)


@given(errors)
def test_an_error_comes_back_from_a_status_as_it_was(error: ServiceError) -> None:
    assert same(ServiceError.from_status(error.to_status()), error)
    assert error.to_status().code == error.code.value[0]


@given(errors)
def test_an_error_comes_back_from_a_session_as_it_was(error: ServiceError) -> None:
    assert same(from_session_status(to_session_status(error), peer="safety"), error)


@given(errors)
def test_an_error_of_a_peer_passes_through_unchanged(error: ServiceError) -> None:
    raised = RpcError(error.code, error.message, status_metadata(error))
    assert same(ServiceError.from_rpc_error(raised, peer="engine"), error)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (grpc.StatusCode.UNAVAILABLE, Reason.SERVICE_UNAVAILABLE),
        # We do not see our own cancellations here; this is a peer that cut the call off.
        (grpc.StatusCode.CANCELLED, Reason.SERVICE_UNAVAILABLE),
        (grpc.StatusCode.DEADLINE_EXCEEDED, Reason.DEADLINE_EXCEEDED),
        (grpc.StatusCode.RESOURCE_EXHAUSTED, Reason.MESSAGE_TOO_LARGE),
        (grpc.StatusCode.INTERNAL, Reason.INTERNAL),
        (grpc.StatusCode.UNKNOWN, Reason.INTERNAL),
        (grpc.StatusCode.UNIMPLEMENTED, Reason.INTERNAL),
        (grpc.StatusCode.INVALID_ARGUMENT, Reason.INTERNAL),
    ],
)
def test_a_bare_status_of_a_peer_becomes_the_reason_that_fits(
    code: grpc.StatusCode, reason: Reason
) -> None:
    error = ServiceError.from_rpc_error(RpcError(code, "its words"), peer="engine")
    assert error.reason is reason
    assert error.metadata["service"] == "engine"
    assert (error.retry_after_s is not None) == (reason is Reason.SERVICE_UNAVAILABLE)


def damaged(payload: bytes) -> status_pb2.Status:
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo())
    info.value = payload
    return status_pb2.Status(code=5, details=[info])


def test_details_that_are_damaged_or_not_ours_are_as_none() -> None:
    assert ServiceError.from_status(status_pb2.Status(code=5)) is None
    assert ServiceError.from_status(damaged(b"\xff\xff")) is None
    foreign = any_pb2.Any()
    foreign.Pack(error_details_pb2.ErrorInfo(reason="INTERNAL", domain="elsewhere"))
    assert ServiceError.from_status(status_pb2.Status(details=[foreign])) is None
    ours_from_the_future = any_pb2.Any()
    ours_from_the_future.Pack(error_details_pb2.ErrorInfo(reason="NEW", domain="meshserve"))
    assert ServiceError.from_status(status_pb2.Status(details=[ours_from_the_future])) is None
    for raw in (b"\xff\xff", damaged(b"\xff").SerializeToString()):
        raised = RpcError(grpc.StatusCode.UNAVAILABLE, "", ((STATUS_DETAILS_KEY, raw),))
        assert (
            ServiceError.from_rpc_error(raised, peer="engine").reason is Reason.SERVICE_UNAVAILABLE
        )
    session = types_pb2.SessionStatus.FromString(damaged(b"\xff").SerializeToString())
    assert from_session_status(session, peer="safety").reason is Reason.INTERNAL


def test_a_field_is_named_in_the_message_and_the_details() -> None:
    error = invalid_field("sampling.top_p", "must be in (0, 1]")
    assert error.code is grpc.StatusCode.INVALID_ARGUMENT
    assert error.message == "sampling.top_p: must be in (0, 1]"
    assert error.field_violations == (("sampling.top_p", "must be in (0, 1]"),)


@pytest.mark.parametrize(
    ("given_s", "told_s"), [(-1.0, 0.0), (math.nan, 0.0), (math.inf, 86400.0), (1e300, 86400.0)]
)
def test_a_delay_is_told_within_reason(given_s: float, told_s: float) -> None:
    error = ServiceError(Reason.RATE_LIMITED, "slower", retry_after_s=given_s)
    restored = ServiceError.from_status(error.to_status())
    assert restored is not None
    assert restored.retry_after_s == told_s


LARGE = [
    "x" * 10**6,
    "漢" * 10**6,
    "%" * 10**6,
    "\n" * 10**6,
    "\ud800" * 10**6,
    "🙂" * 10**6,
]


def error_of(text: str) -> ServiceError:
    return ServiceError(
        Reason.RATE_LIMITED,
        text,
        field_violations=[(text, text)] * 100,
        quota_violations=[(text, text)] * 100,
        retry_after_s=1.0,
        # Its own keys, of which a thousand megabytes would soon be alive.
        metadata={f"{index}{text[:2000]}": text for index in range(100)},
    )


@pytest.mark.parametrize("text", LARGE, ids=[repr(text[0]) for text in LARGE])
def test_whatever_is_said_the_details_fit_into_headers(text: str) -> None:
    error = error_of(text)
    assert error.to_status().ByteSize() < DETAIL_BYTES
    restored = ServiceError.from_status(error.to_status())
    assert restored is not None
    assert restored.reason is Reason.RATE_LIMITED
    assert restored.retry_after_s == 1.0
    assert restored.message.endswith("...")
    assert restored.field_violations
    assert restored.quota_violations
    assert restored.metadata


@given(st.text(st.characters(exclude_categories=[]), max_size=3000))
def test_a_message_is_cut_and_never_refused(text: str) -> None:
    status = ServiceError(Reason.INTERNAL, text).to_status()
    assert len(status.message.encode()) <= 1024
    if len(text) < 100 and text.isascii():
        assert status.message == text


@pytest.mark.parametrize("text", LARGE, ids=[repr(text[0]) for text in LARGE])
async def test_an_error_with_much_to_say_arrives_at_a_client_with_default_limits(
    text: str, loopback
) -> None:
    class Talkative(Shapes):
        async def unary(self, request: Any, context: Any) -> Any:
            raise error_of(text)

    replica = await loopback.serve(Talkative())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{replica.port}") as channel:
        for _ in range(20):  # above the soft limit gRPC refuses at random
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ShapesStub(channel).unary_bytes(b"")
            error = ServiceError.from_rpc_error(caught.value, peer="shapes")
            assert error.reason is Reason.RATE_LIMITED, caught.value
            assert error.field_violations
