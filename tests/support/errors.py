"""Reads the details of a failed call as any gRPC client can."""

from __future__ import annotations

from dataclasses import dataclass

import grpc
from google.rpc import error_details_pb2, status_pb2


@dataclass(frozen=True)
class Failure:
    """What a failed call told."""

    code: grpc.StatusCode
    message: str
    reason: str
    fields: tuple[str, ...]
    retry_after_s: float | None
    metadata: dict[str, str]


def failure_of(error: grpc.RpcError) -> Failure:
    """Raises AssertionError when the status has no ErrorInfo of ours."""
    trailing = dict(error.trailing_metadata() or ())
    assert "grpc-status-details-bin" in trailing, f"{error.code()} without details"
    status = status_pb2.Status.FromString(trailing["grpc-status-details-bin"])
    reason, fields, retry, metadata = "", (), None, {}
    for detail in status.details:
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        delay = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            assert info.domain == "meshserve"
            reason, metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad):
            fields = tuple(violation.field for violation in bad.field_violations)
        elif detail.Unpack(delay):
            retry = delay.retry_delay.ToMilliseconds() / 1000
    assert reason, "no ErrorInfo"
    return Failure(error.code(), error.details(), reason, fields, retry, metadata)
