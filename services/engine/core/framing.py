"""Messages over a Unix socket: a 4-byte little-endian length, then that many bytes of msgpack."""

from __future__ import annotations

import select
import socket
import struct

import msgspec

from services.engine.core.messages import Command, Event

LENGTH = struct.Struct("<I")
_RECEIVE_BYTES = 1 << 18
# Room for the events of many steps, so that a front that is briefly busy does not hold up the core.
_SEND_BUFFER_BYTES = 1 << 22


class ConnectionClosedError(Exception):
    """The other end is gone."""


def frame(message: object, encoder: msgspec.msgpack.Encoder) -> bytes:
    """One message as it goes over the socket."""
    payload = encoder.encode(message)
    return LENGTH.pack(len(payload)) + payload


class CoreConnection:
    """The core's end: sends events, receives commands. Blocking, for the core has one thread."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._socket.setblocking(True)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(Command)
        self._received = bytearray()

    def send(self, event: Event) -> None:
        """Send one event, waiting while the front is more than a full buffer behind.

        Raises:
            ConnectionClosedError: the front is gone.
        """
        try:
            self._socket.sendall(frame(event, self._encoder))
        except OSError as error:
            raise ConnectionClosedError(str(error)) from error

    def receive(self, *, wait_s: float | None) -> list[Command]:
        """All commands that have arrived; waits up to `wait_s` (None: for ever) for the first.

        Raises:
            ConnectionClosedError: the front is gone.
        """
        while not (commands := self._complete_commands()):
            readable, _, _ = select.select([self._socket], [], [], wait_s)
            if not readable:
                return []
            self._fill()
        return commands

    def _fill(self) -> None:
        try:
            chunk = self._socket.recv(_RECEIVE_BYTES)
        except OSError as error:
            raise ConnectionClosedError(str(error)) from error
        if not chunk:
            raise ConnectionClosedError("the other end closed the connection")
        self._received += chunk

    def _complete_commands(self) -> list[Command]:
        commands: list[Command] = []
        position = 0
        while len(self._received) - position >= LENGTH.size:
            (length,) = LENGTH.unpack_from(self._received, position)
            end = position + LENGTH.size + length
            if len(self._received) < end:
                break
            commands.append(self._decoder.decode(self._received[position + LENGTH.size : end]))
            position = end
        del self._received[:position]
        return commands
