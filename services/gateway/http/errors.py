"""The one mapping from errors to HTTP: a status, headers, and JSON with the stable reason."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import grpc
from aiohttp import web

from services.runtime.errors import REASONS, Reason, ServiceError

_C = grpc.StatusCode
_STATUS_OF_CODE: Mapping[grpc.StatusCode, int] = {
    _C.INVALID_ARGUMENT: 400,
    _C.FAILED_PRECONDITION: 400,
    _C.UNAUTHENTICATED: 401,
    _C.PERMISSION_DENIED: 403,
    _C.NOT_FOUND: 404,
    _C.ALREADY_EXISTS: 409,
    _C.ABORTED: 409,
    _C.RESOURCE_EXHAUSTED: 429,
    # As proxies log it; a caller who went away does not see it.
    _C.CANCELLED: 499,
    _C.INTERNAL: 500,
    _C.UNIMPLEMENTED: 501,
    _C.UNAVAILABLE: 503,
    _C.DEADLINE_EXCEEDED: 504,
}
# Where HTTP has a word of its own.
_STATUS_OF_REASON: Mapping[Reason, int] = {
    Reason.MESSAGE_TOO_LARGE: 413,
    Reason.METHOD_NOT_ALLOWED: 405,
}


def http_status(reason: Reason) -> int:
    """The HTTP status of a reason."""
    return _STATUS_OF_REASON.get(reason) or _STATUS_OF_CODE[REASONS[reason].code]


def error_document(error: ServiceError) -> dict[str, Any]:
    """What a caller is told: the reason, the gRPC code, the message, the way out, the details."""
    entry = REASONS[error.reason]
    document: dict[str, Any] = {
        "reason": error.reason.value,
        "code": entry.code.name,
        "message": error.header_message,
        "remedy": entry.remedy,
        "metadata": error.metadata,
    }
    if error.field_violations:
        document["fields"] = [
            {"field": field, "description": description}
            for field, description in error.field_violations
        ]
    if error.quota_violations:
        document["quotas"] = [
            {"subject": subject, "description": description}
            for subject, description in error.quota_violations
        ]
    if error.retry_after_s is not None:
        document["retry_after_s"] = error.retry_after_s
    return {"error": document}


def error_response(error: ServiceError) -> web.Response:
    """The answer to a call that failed before any of its answer was sent."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    if error.code is _C.UNAUTHENTICATED:
        headers["WWW-Authenticate"] = "Bearer"
    return web.Response(
        status=http_status(error.reason),
        headers=headers,
        body=json.dumps(error_document(error)).encode(),
        content_type="application/json",
    )


def from_aiohttp(error: web.HTTPException) -> ServiceError:
    """What the library itself refuses a request for."""
    if isinstance(error, web.HTTPNotFound):
        return ServiceError(Reason.PATH_NOT_FOUND, "nothing is served under this path")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return ServiceError(
            Reason.METHOD_NOT_ALLOWED,
            f"this path takes {allowed}",
            metadata={"allowed": allowed},
        )
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        return ServiceError(Reason.MESSAGE_TOO_LARGE, "the body is larger than the gateway takes")
    return ServiceError(Reason.MALFORMED_MESSAGE, error.reason)
