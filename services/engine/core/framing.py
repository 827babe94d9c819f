"""Messages over a Unix socket: a 4-byte little-endian length, then that many bytes of msgpack."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import msgspec

from services.engine.core.messages import Command, Event

LENGTH = struct.Struct("<I")
# A buffer that one large frame has stretched is not kept for the small ones that follow.
_KEPT_BUFFER_BYTES = 1 << 20


def frame(message: object, encoder: msgspec.msgpack.Encoder) -> bytes:
    """One message as it goes over the socket."""
    payload = encoder.encode(message)
    return LENGTH.pack(len(payload)) + payload


class EventFrames:
    """Encodes events, one frame each, into one buffer that is used again and again."""

    def __init__(self) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray()

    def encode(self, events: Iterable[Event]) -> bytearray:
        """The frames of `events`, one after another; valid until the next call."""
        if len(self._buffer) > _KEPT_BUFFER_BYTES:
            self._buffer = bytearray()
        buffer = self._buffer
        start = 0
        for event in events:
            payload = start + LENGTH.size
            # What lies behind the payload is cut off: the buffer ends with the frame.
            self._encoder.encode_into(event, buffer, payload)
            LENGTH.pack_into(buffer, start, len(buffer) - payload)
            start = len(buffer)
        return buffer


class CommandFrames:
    """Puts commands together from the pieces in which they arrive."""

    def __init__(self) -> None:
        self._decoder = msgspec.msgpack.Decoder(Command)
        self._received = bytearray()

    def decode(self, piece: bytes) -> list[Command]:
        """The commands that `piece` completes.

        Raises:
            msgspec.MsgspecError: a frame holds something else than a command.
        """
        received = self._received
        received += piece
        commands: list[Command] = []
        position = 0
        while len(received) - position >= LENGTH.size:
            (length,) = LENGTH.unpack_from(received, position)
            end = position + LENGTH.size + length
            if len(received) < end:
                break
            commands.append(self._decoder.decode(received[position + LENGTH.size : end]))
            position = end
        del received[:position]
        return commands
