"""The exception that becomes a gRPC status with details, and comes back from one.

Every error that leaves a service is a gRPC status with google.rpc.ErrorInfo (domain "meshserve",
a stable reason of services/runtime/reasons.py), and where they apply BadRequest, RetryInfo and
QuotaFailure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

from meshserve.v1 import types_pb2
from services.runtime.reasons import REASONS, Reason, ReasonEntry

__all__ = [
    "ERROR_DOMAIN",
    "REASONS",
    "STATUS_DETAILS_KEY",
    "Reason",
    "ReasonEntry",
    "ServiceError",
    "from_session_status",
    "invalid_field",
    "status_metadata",
    "to_session_status",
]

ERROR_DOMAIN = "meshserve"
STATUS_DETAILS_KEY = "grpc-status-details-bin"
# A status travels in HTTP/2 headers, which gRPC begins to refuse at 8 KiB. These shares of it, with
# base64's third on top, stay below that whatever an error has to say.
MAX_MESSAGE_BYTES = 1024
MAX_METADATA_BYTES = 1024
MAX_FIELDS_BYTES = 1024
MAX_QUOTAS_BYTES = 512
MAX_PART_BYTES = 240
MAX_RETRY_AFTER_S = 86400.0

_C = grpc.StatusCode


class ServiceError(Exception):
    """An error that a caller is meant to see.

    `field_violations` are (field path, what is wrong) pairs, `quota_violations` are
    (subject, description) pairs. `metadata` goes into ErrorInfo and must never carry user text.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field_violations: Sequence[tuple[str, str]] = (),
        quota_violations: Sequence[tuple[str, str]] = (),
        retry_after_s: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.field_violations = tuple(field_violations)
        self.quota_violations = tuple(quota_violations)
        self.retry_after_s = retry_after_s
        self.metadata = dict(metadata or {})

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC code that the table gives the reason."""
        return REASONS[self.reason].code

    @property
    def header_message(self) -> str:
        """The message, cut to what may go into the grpc-message header."""
        return _cut(self.message, MAX_MESSAGE_BYTES, _header_bytes)

    def to_status(self) -> status_pb2.Status:
        """The google.rpc.Status with all details, cut to what fits into HTTP/2 headers."""
        status = status_pb2.Status(code=self.code.value[0], message=self.header_message)
        _pack(
            status.details,
            error_details_pb2.ErrorInfo(
                reason=self.reason.value,
                domain=ERROR_DOMAIN,
                metadata=dict(_fitting(self.metadata.items(), MAX_METADATA_BYTES)),
            ),
        )
        if self.field_violations:
            violations = [
                error_details_pb2.BadRequest.FieldViolation(field=field, description=description)
                for field, description in _fitting(self.field_violations, MAX_FIELDS_BYTES)
            ]
            _pack(status.details, error_details_pb2.BadRequest(field_violations=violations))
        if self.retry_after_s is not None:
            delay = duration_pb2.Duration()
            # Written so that NaN becomes 0.
            delay_s = min(self.retry_after_s, MAX_RETRY_AFTER_S) if self.retry_after_s > 0 else 0.0
            delay.FromMilliseconds(round(delay_s * 1000))
            _pack(status.details, error_details_pb2.RetryInfo(retry_delay=delay))
        if self.quota_violations:
            quota = [
                error_details_pb2.QuotaFailure.Violation(subject=subject, description=description)
                for subject, description in _fitting(self.quota_violations, MAX_QUOTAS_BYTES)
            ]
            _pack(status.details, error_details_pb2.QuotaFailure(violations=quota))
        return status

    @classmethod
    def from_status(cls, status: status_pb2.Status) -> ServiceError | None:
        """Restores what `to_status` made; None when the status is not of our domain, or damaged."""
        try:
            return cls._from_details(status)
        except DecodeError:
            return None

    @classmethod
    def _from_details(cls, status: status_pb2.Status) -> ServiceError | None:
        reason: Reason | None = None
        metadata: dict[str, str] = {}
        fields: list[tuple[str, str]] = []
        quotas: list[tuple[str, str]] = []
        retry_after_s: float | None = None
        for detail in status.details:
            info = error_details_pb2.ErrorInfo()
            bad_request = error_details_pb2.BadRequest()
            retry = error_details_pb2.RetryInfo()
            quota = error_details_pb2.QuotaFailure()
            if detail.Unpack(info) and info.domain == ERROR_DOMAIN and info.reason in _BY_NAME:
                reason, metadata = _BY_NAME[info.reason], dict(info.metadata)
            elif detail.Unpack(bad_request):
                fields = [(v.field, v.description) for v in bad_request.field_violations]
            elif detail.Unpack(retry):
                retry_after_s = retry.retry_delay.ToMilliseconds() / 1000
            elif detail.Unpack(quota):
                quotas = [(v.subject, v.description) for v in quota.violations]
        if reason is None:
            return None
        return cls(
            reason,
            status.message,
            field_violations=fields,
            quota_violations=quotas,
            retry_after_s=retry_after_s,
            metadata=metadata,
        )

    @classmethod
    def from_rpc_error(cls, error: grpc.RpcError, *, peer: str) -> ServiceError:
        """What a failed call of `peer` (a service's name) means to our own caller.

        A peer's own ServiceError passes through unchanged; a bare status, as gRPC itself makes
        when a peer is gone or a deadline passes, becomes the reason that fits.
        """
        code, details, status = _read_rpc_error(error)
        if status is not None and (restored := cls.from_status(status)) is not None:
            return restored
        if code is _C.DEADLINE_EXCEEDED:
            return cls(Reason.DEADLINE_EXCEEDED, "the deadline passed", metadata={"service": peer})
        # A call that we cancel raises CancelledError and never comes here: a bare CANCELLED is a
        # peer that cut the call off at its shutdown.
        if code in (_C.UNAVAILABLE, _C.CANCELLED):
            return cls(
                Reason.SERVICE_UNAVAILABLE,
                f"the {peer} service cannot be reached",
                retry_after_s=1.0,
                metadata={"service": peer},
            )
        if code is _C.RESOURCE_EXHAUSTED:
            return cls(Reason.MESSAGE_TOO_LARGE, details, metadata={"service": peer})
        return cls(
            Reason.INTERNAL,
            f"the {peer} service failed",
            metadata={"service": peer, "code": code.name},
        )


_BY_NAME: Mapping[str, Reason] = {reason.value: reason for reason in Reason}


def invalid_field(path: str, description: str) -> ServiceError:
    """INVALID_ARGUMENT that names one field, for example `sampling.temperature`."""
    return ServiceError(
        Reason.INVALID_FIELD, f"{path}: {description}", field_violations=[(path, description)]
    )


def to_session_status(error: ServiceError) -> types_pb2.SessionStatus:
    """The status of one session on a shared stream."""
    # Wire-compatible by contract, so the bytes carry over.
    return types_pb2.SessionStatus.FromString(error.to_status().SerializeToString())


def from_session_status(status: types_pb2.SessionStatus, *, peer: str) -> ServiceError:
    """Restores the error of one session on a shared stream."""
    restored = ServiceError.from_status(status_pb2.Status.FromString(status.SerializeToString()))
    if restored is not None:
        return restored
    return ServiceError(Reason.INTERNAL, f"the {peer} service failed", metadata={"service": peer})


def status_metadata(error: ServiceError) -> tuple[tuple[str, bytes], ...]:
    """Trailing metadata that carries the details of an error."""
    return ((STATUS_DETAILS_KEY, error.to_status().SerializeToString()),)


def _header_bytes(text: str) -> int:
    """Size of a text in the grpc-message header, which is percent-encoded."""
    return sum(1 if " " <= char <= "~" and char != "%" else 3 * len(char.encode()) for char in text)


def _utf8_bytes(text: str) -> int:
    return len(text.encode())


def _cut(text: object, limit: int, size: Callable[[str], int] = _utf8_bytes) -> str:
    """The text, or its beginning and an ellipsis, in at most `limit` bytes as `size` counts.

    Lone surrogates, which no header and no protobuf string can hold, become question marks.
    """
    whole = str(text)
    part = whole[:limit].encode(errors="replace").decode()
    if len(whole) <= limit and size(part) <= limit:
        return part
    low, high = 0, len(part)
    while low < high:
        middle = (low + high + 1) // 2
        if size(part[:middle]) <= limit - 3:
            low = middle
        else:
            high = middle - 1
    return part[:low] + "..."


def _fitting(pairs: Iterable[tuple[str, str]], limit: int) -> Iterator[tuple[str, str]]:
    """As many of the pairs, each of their texts cut, as `limit` bytes hold."""
    for first, second in pairs:
        pair = (_cut(first, MAX_PART_BYTES), _cut(second, MAX_PART_BYTES))
        limit -= _utf8_bytes(pair[0]) + _utf8_bytes(pair[1]) + 8
        if limit < 0:
            return
        yield pair


def _pack(details: object, message: object) -> None:
    packed = any_pb2.Any()
    packed.Pack(message)  # type: ignore[arg-type]
    details.append(packed)  # type: ignore[attr-defined]


def _read_rpc_error(
    error: grpc.RpcError,
) -> tuple[grpc.StatusCode, str, status_pb2.Status | None]:
    """Code, message and details of an RpcError, of the sync and the asyncio API alike."""
    code = error.code() if hasattr(error, "code") else _C.UNKNOWN
    details = (error.details() if hasattr(error, "details") else None) or ""
    trailing: Any = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    for key, value in trailing or ():
        if key == STATUS_DETAILS_KEY:
            raw = value if isinstance(value, bytes) else value.encode("latin-1")
            try:
                return code, details, status_pb2.Status.FromString(raw)
            except DecodeError:
                return code, details, None
    return code, details, None
