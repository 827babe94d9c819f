"""Turns failed calls into the exceptions of meshserve.errors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from meshserve import errors
from meshserve.errors import FieldViolation, MeshServeError, QuotaViolation

STATUS_DETAILS_KEY = "grpc-status-details-bin"
REQUEST_ID_KEY = "x-request-id"

_BY_CODE: dict[grpc.StatusCode, type[MeshServeError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequestError,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequestError,
    grpc.StatusCode.UNAUTHENTICATED: errors.AuthenticationError,
    grpc.StatusCode.PERMISSION_DENIED: errors.PermissionDeniedError,
    grpc.StatusCode.NOT_FOUND: errors.NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: errors.ConflictError,
    grpc.StatusCode.ABORTED: errors.ConflictError,
    grpc.StatusCode.FAILED_PRECONDITION: errors.FailedPreconditionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.RateLimitError,
    grpc.StatusCode.UNAVAILABLE: errors.ServiceUnavailableError,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    grpc.StatusCode.CANCELLED: errors.RequestCancelledError,
    grpc.StatusCode.UNIMPLEMENTED: errors.UnsupportedError,
}
_BY_REASON: dict[str, type[MeshServeError]] = {
    "MESSAGE_TOO_LARGE": errors.InvalidRequestError,
    "PROMPT_BLOCKED": errors.PromptBlockedError,
}


def error_from_rpc(error: grpc.RpcError, *, target: str, request_id: str = "") -> MeshServeError:
    """The exception that a failed call means, of the sync and the asyncio API alike.

    `request_id` is the one that the caller chose, for failures that never reached a server.
    """
    call: Any = error
    code = call.code() if hasattr(error, "code") else grpc.StatusCode.UNKNOWN
    message = (call.details() if hasattr(error, "details") else None) or ""
    trailing = list(call.trailing_metadata() or ()) if hasattr(error, "trailing_metadata") else []
    return error_from_status(code, message, trailing, target=target, request_id=request_id)


def error_from_status(
    code: grpc.StatusCode,
    message: str,
    trailing: Iterable[tuple[str, str | bytes]],
    *,
    target: str,
    request_id: str = "",
) -> MeshServeError:
    """The exception that a status with its trailing metadata means."""
    details = _Details()
    for key, value in trailing:
        if key == STATUS_DETAILS_KEY:
            details.read(value if isinstance(value, bytes) else value.encode("latin-1"))
        elif key == REQUEST_ID_KEY and isinstance(value, str):
            request_id = value
    kind = _BY_REASON.get(details.reason) or _BY_CODE.get(code, errors.ServerError)
    text = message
    if not details.reason:
        # gRPC itself made this status: there was no server, or none of ours.
        kind, text = _bare_status(code, message, kind, target)
    return kind(
        text or code.name.replace("_", " ").lower(),
        code=code,
        reason=details.reason,
        request_id=details.metadata.get("request_id") or request_id,
        metadata=details.metadata,
        fields=details.fields,
        quotas=details.quotas,
        retry_after_s=details.retry_after_s,
    )


def _bare_status(
    code: grpc.StatusCode, message: str, kind: type[MeshServeError], target: str
) -> tuple[type[MeshServeError], str]:
    if code is grpc.StatusCode.UNAVAILABLE:
        return errors.ConnectError, _connection_failure(message, target)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return kind, f"{target} did not complete the answer within the timeout"
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in message:
        return errors.InvalidRequestError, f"the message is too large: {message}"
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return kind, f"the server at {target} does not know this call; is it a MeshServe gateway?"
    return kind, message


def _connection_failure(message: str, target: str) -> str:
    """What gRPC's account of a failed connection comes down to."""
    if "handshake failed" in message.lower():
        return f"no TLS connection to {target} can be made; is TLS spoken there, and by whom?"
    cause = message.rpartition(": ")[2].strip(" []") or "no reason given"
    if message.startswith(
        ("failed to connect", "connections to all", "errors resolving", "DNS resolution failed")
    ):
        return f"no MeshServe gateway answers at {target} ({cause})"
    return f"the connection to {target} broke ({cause})"


class _Details:
    """The google.rpc details of a status; what cannot be read is left out."""

    def __init__(self) -> None:
        self.reason = ""
        self.metadata: dict[str, str] = {}
        self.fields: tuple[FieldViolation, ...] = ()
        self.quotas: tuple[QuotaViolation, ...] = ()
        self.retry_after_s: float | None = None

    def read(self, raw: bytes) -> None:
        try:
            status = status_pb2.Status.FromString(raw)
            for detail in status.details:
                self._read_detail(detail)
        except DecodeError:
            return

    def _read_detail(self, detail: Any) -> None:
        info = error_details_pb2.ErrorInfo()
        bad_request = error_details_pb2.BadRequest()
        quota = error_details_pb2.QuotaFailure()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            self.reason, self.metadata = info.reason, dict(info.metadata)
        elif detail.Unpack(bad_request):
            self.fields = tuple(
                FieldViolation(v.field, v.description) for v in bad_request.field_violations
            )
        elif detail.Unpack(quota):
            self.quotas = tuple(QuotaViolation(v.subject, v.description) for v in quota.violations)
        elif detail.Unpack(retry):
            self.retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
