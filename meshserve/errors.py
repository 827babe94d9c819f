"""Exceptions of the client: one class per kind of failure, all of them MeshServeError."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import grpc


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """What is wrong with one field of a request."""

    path: str
    """Where, for example `sampling.top_p` or `conversation.messages[2].role`."""
    description: str


@dataclass(frozen=True, slots=True)
class QuotaViolation:
    """A quota that has been used up."""

    subject: str
    description: str


class MeshServeError(Exception):
    """A request that failed.

    Attributes:
        message: for people to read.
        code: the gRPC status code.
        reason: one of the stable reasons of docs/errors.md; empty where the failure has none, for
            example when no server answered.
        request_id: names the request in the server's logs and traces; empty where unknown.
        metadata: further details of the reason.
    """

    def __init__(
        self,
        message: str,
        *,
        code: grpc.StatusCode = grpc.StatusCode.UNKNOWN,
        reason: str = "",
        request_id: str = "",
        metadata: Mapping[str, str] | None = None,
        fields: tuple[FieldViolation, ...] = (),
        quotas: tuple[QuotaViolation, ...] = (),
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.request_id = request_id
        self.metadata = dict(metadata or {})
        self.fields = fields
        """What is wrong with which field; filled where the request is at fault."""
        self.quotas = quotas
        """Quotas that ran out; filled where one did."""
        self.retry_after_s = retry_after_s
        """When it is worth trying again, in seconds; None where the server does not say."""

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.message!r}, code={self.code.name}, "
            f"reason={self.reason!r}, request_id={self.request_id!r})"
        )


class ConfigurationError(MeshServeError, ValueError):
    """The client itself was given something it cannot work with."""


class InvalidRequestError(MeshServeError):
    """The request is at fault; see `.fields`. Sending it again gives the same answer."""


class PromptBlockedError(InvalidRequestError):
    """The safety filter blocked the prompt; `.metadata` names the categories."""


class AuthenticationError(MeshServeError):
    """The API key is missing or wrong."""


class PermissionDeniedError(MeshServeError):
    """The caller may not do this."""


class NotFoundError(MeshServeError):
    """What the request names, a model for example, does not exist."""


class ConflictError(MeshServeError):
    """The request clashes with another one or with the state of the server."""


class FailedPreconditionError(MeshServeError):
    """The server is not in a state in which the request makes sense."""


class RateLimitError(MeshServeError):
    """A quota or a limit was reached; `.retry_after_s` says when it is worth trying again."""


class ServiceUnavailableError(MeshServeError):
    """The server, or one that it needs, cannot answer now; trying again later may help."""


class ConnectError(ServiceUnavailableError):
    """No server answered at the target, or the connection to it broke."""


class DeadlineExceededError(MeshServeError, TimeoutError):
    """The answer was not complete within the timeout."""


class RequestCancelledError(MeshServeError):
    """The request was cancelled, by this side or by the server."""


class UnsupportedError(MeshServeError):
    """The server does not know this call or this feature."""


class ServerError(MeshServeError):
    """The server failed on a request that may well be right."""


class IncompleteStreamError(ServerError):
    """A stream ended without saying how every choice ended; the text so far is not an answer."""
