"""What both clients know about channels: targets, TLS, limits, headers."""

from __future__ import annotations

import ipaddress
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from meshserve.errors import ConfigurationError

DEFAULT_TARGET = "127.0.0.1:50051"
DEFAULT_PORT = 50051
DEFAULT_TIMEOUT_S = 300.0
MAX_MESSAGE_BYTES = 64 * 2**20
API_KEY_VARIABLE = "MESHSERVE_API_KEY"

# Calls are spread over all gateways that the target stands for.
_SERVICE_CONFIG = json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})
_SCHEME = re.compile(r"^[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_VISIBLE_ASCII = re.compile(r"[\x20-\x7e]+")
_HEADER_NAME = re.compile(r"[0-9a-z_.-]+")


class UseClientDefault:
    """Type of USE_CLIENT_DEFAULT, which tells an absent timeout from None (no timeout)."""

    def __repr__(self) -> str:
        return "USE_CLIENT_DEFAULT"


USE_CLIENT_DEFAULT = UseClientDefault()
Timeout = float | None | UseClientDefault
"""Seconds for the whole answer, None for no limit, or what the client was made with."""


@dataclass(frozen=True, slots=True)
class TLS:
    """How a client talks TLS. Without files, the roots that gRPC ships with are trusted."""

    ca_file: str | os.PathLike[str] | None = None
    """PEM file of the CAs that servers are checked against."""
    certificate_file: str | os.PathLike[str] | None = None
    """PEM file of this client's own certificate, for servers that ask for one."""
    private_key_file: str | os.PathLike[str] | None = None
    server_name: str | None = None
    """Name that the server's certificate must carry. Default: the target's host."""

    def credentials(self) -> grpc.ChannelCredentials:
        """The gRPC form. Raises ConfigurationError for files that cannot be read."""
        if (self.certificate_file is None) != (self.private_key_file is None):
            raise ConfigurationError("TLS: certificate_file and private_key_file go together")
        return grpc.ssl_channel_credentials(
            root_certificates=_read(self.ca_file),
            private_key=_read(self.private_key_file),
            certificate_chain=_read(self.certificate_file),
        )


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a client's calls go and what goes with each."""

    target: str
    credentials: grpc.ChannelCredentials | None
    channel_options: tuple[tuple[str, Any], ...]
    metadata: tuple[tuple[str, str], ...]
    timeout_s: float | None

    def deadline(self, timeout: Timeout) -> float | None:
        """Seconds for one call. Raises ConfigurationError for what is no timeout."""
        if isinstance(timeout, UseClientDefault):
            return self.timeout_s
        return _checked_timeout(timeout)

    def call_metadata(self, extra: Mapping[str, str] | None) -> tuple[tuple[str, str], ...]:
        """Headers of one call: the client's, the active trace, then the call's own."""
        merged = dict(self.metadata)
        merged.update(_trace_headers())
        merged.update(_checked_metadata(extra))
        return tuple(merged.items())


def make_endpoint(
    target: str,
    *,
    api_key: str | None,
    timeout: float | None,
    tls: bool | TLS,
    metadata: Mapping[str, str] | None,
) -> Endpoint:
    """Checks what a client was given. Raises ConfigurationError."""
    target = normalize_target(target)
    headers = _checked_metadata(metadata)
    key = os.environ.get(API_KEY_VARIABLE) if api_key is None else api_key
    if key:
        if not _VISIBLE_ASCII.fullmatch(key):
            raise ConfigurationError(
                "the API key holds characters that cannot be sent; a trailing newline?"
            )
        headers["authorization"] = f"Bearer {key}"
    tls_settings = TLS() if tls is True else tls
    options: list[tuple[str, Any]] = [
        ("grpc.service_config", _SERVICE_CONFIG),
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        # A gateway that restarts is back within a second or two; do not sit out gRPC's minutes.
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", 1000),
        ("grpc.max_reconnect_backoff_ms", 5000),
    ]
    if _is_local(target):
        options.append(("grpc.enable_http_proxy", 0))
    credentials = None
    if isinstance(tls_settings, TLS):
        credentials = tls_settings.credentials()
        if tls_settings.server_name:
            options.append(("grpc.ssl_target_name_override", tls_settings.server_name))
    return Endpoint(
        target=target,
        credentials=credentials,
        channel_options=tuple(options),
        metadata=tuple(headers.items()),
        timeout_s=_checked_timeout(timeout),
    )


def normalize_target(target: str) -> str:
    """A gRPC target: `HOST:PORT` as it is, `HOST` with the default port, and gRPC's own schemes.

    Raises ConfigurationError for what gRPC would take for something else, a URL for example.
    """
    if not isinstance(target, str) or not target.strip():
        raise ConfigurationError("the target is empty; write HOST:PORT")
    target = target.strip()
    if target.startswith(("http://", "https://", "grpc://", "grpcs://")):
        bare = target.split("://", 1)[1].rstrip("/")
        raise ConfigurationError(
            f"the target {target!r} is a URL; write {bare!r}, with tls=True for TLS"
        )
    scheme = _SCHEME.match(target)
    if scheme and scheme.group()[:-1].lower() in (
        "dns",
        "ipv4",
        "ipv6",
        "unix",
        "unix-abstract",
        "xds",
        "passthrough",
        "vsock",
    ):
        return target
    host, separator, port = target.rpartition(":")
    if target.startswith("[") and target.endswith("]"):
        return f"{target}:{DEFAULT_PORT}"
    if not separator:
        return f"{target}:{DEFAULT_PORT}"
    if not host or not port.isdigit() or not 0 < int(port) <= 65535:
        raise ConfigurationError(f"the target {target!r} is not HOST:PORT")
    if ":" in host and not host.startswith("["):
        raise ConfigurationError(
            f"the target {target!r} is not HOST:PORT; write an IPv6 address as [ADDRESS]:PORT"
        )
    return target


def _is_local(target: str) -> bool:
    if target.startswith(("unix:", "unix-abstract:")):
        return True
    host = target.removeprefix("dns:///").rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _checked_timeout(timeout: float | None) -> float | None:
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise ConfigurationError(f"a timeout is a positive number of seconds, not {timeout!r}")
    # gRPC cannot tell years from forever, and infinity from an error.
    return min(float(timeout), 365 * 86400.0)


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    checked: dict[str, str] = {}
    for name, value in (metadata or {}).items():
        lowered = name.lower()
        if not _HEADER_NAME.fullmatch(lowered) or lowered.startswith("grpc-"):
            raise ConfigurationError(f"{name!r} cannot be the name of a metadata entry")
        if not isinstance(value, str) or (value and not _VISIBLE_ASCII.fullmatch(value)):
            raise ConfigurationError(f"metadata {name!r} must be visible ASCII text")
        checked[lowered] = value
    return checked


def _trace_headers() -> dict[str, str]:
    """W3 trace context of the active span, where the application uses OpenTelemetry."""
    try:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ImportError:
        return {}
    carrier: dict[str, str] = {}
    TraceContextTextMapPropagator().inject(carrier)
    return carrier


def _read(path: str | os.PathLike[str] | None) -> bytes | None:
    if path is None:
        return None
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigurationError(f"TLS: {path}: {error.strerror or error}") from error
