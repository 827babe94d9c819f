"""Exit codes, and the one place where failures become a line for people and a code for scripts."""

from __future__ import annotations

from collections.abc import Iterator

from meshserve import errors

EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_UNAVAILABLE = 3
EXIT_NOT_ALLOWED = 4
EXIT_RATE_LIMITED = 5
EXIT_TIMEOUT = 6
EXIT_CONFIGURATION = 78
EXIT_INTERRUPTED = 130

_EXIT_CODES: tuple[tuple[type[errors.MeshServeError], int], ...] = (
    (errors.InvalidRequestError, EXIT_USAGE),
    (errors.ConfigurationError, EXIT_USAGE),
    (errors.NotFoundError, EXIT_USAGE),
    (errors.ServiceUnavailableError, EXIT_UNAVAILABLE),
    (errors.AuthenticationError, EXIT_NOT_ALLOWED),
    (errors.PermissionDeniedError, EXIT_NOT_ALLOWED),
    (errors.RateLimitError, EXIT_RATE_LIMITED),
    (errors.DeadlineExceededError, EXIT_TIMEOUT),
)


class CommandError(Exception):
    """A failure with its way out. `message` may have several lines."""

    def __init__(self, message: str, way_out: str = "", *, exit_code: int = EXIT_FAILED) -> None:
        super().__init__(message)
        self.message = message
        self.way_out = way_out
        self.exit_code = exit_code


def command_error(error: errors.MeshServeError) -> CommandError:
    """What a failed request means to a person at a terminal."""
    exit_code = next((code for kind, code in _EXIT_CODES if isinstance(error, kind)), EXIT_FAILED)
    return CommandError(error.message, "; ".join(_ways_out(error)), exit_code=exit_code)


def _ways_out(error: errors.MeshServeError) -> Iterator[str]:
    for violation in error.fields:
        if violation.path not in error.message and violation.description not in error.message:
            yield f"{violation.path}: {violation.description}"
    if isinstance(error, errors.ConnectError):
        yield "start a mesh with `meshserve up`, or name one with --target HOST:PORT"
    elif isinstance(error, errors.AuthenticationError):
        yield "give a key with --api-key or in MESHSERVE_API_KEY"
    elif error.reason == "NOT_AN_OPERATOR":
        yield "give the key of an operator: `operator: true` in the gateway's `auth.keys`"
    elif error.reason == "MODEL_NOT_LOADED":
        yield "`meshserve models load` loads it"
    elif error.reason == "ADAPTER_NOT_FOUND":
        yield "`meshserve adapters list` shows what there is"
    elif isinstance(error, errors.DeadlineExceededError):
        yield "allow more time with --timeout SECONDS"
    elif isinstance(error, errors.NotFoundError):
        yield "`meshserve models list` shows what there is"
    if error.retry_after_s is not None:
        yield f"try again in {error.retry_after_s:g} s"
    if isinstance(error, errors.ServerError) and error.request_id:
        yield f"the server's log has more under request id {error.request_id}"
