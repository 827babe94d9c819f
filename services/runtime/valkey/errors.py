"""What can go wrong with the Redis-protocol server, in terms that do not depend on its client."""

from __future__ import annotations

from urllib.parse import urlsplit


class ValkeyError(Exception):
    """Any failure of the Redis-protocol server."""


class ValkeyUnavailableError(ValkeyError):
    """The server cannot be reached, does not answer in time, or is not ready to serve.

    `retry_after_s` is when another try may succeed.
    """

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ValkeyRefusedError(ValkeyError):
    """The server answered that it will not do this, for example for want of memory or rights."""


class ValkeyUrlError(ValueError):
    """The URL of the server cannot be used. The text never repeats a password."""


def redacted(url: str) -> str:
    """The URL as it may be logged: without credentials and options."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return "(unreadable URL)"
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
