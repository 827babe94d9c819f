"""An answer as bytes in the server: header, checksum, and the message, compressed when large.

    magic and version   4 bytes
    flags               1 byte
    stamp               24 bytes: the generations that the answer was computed in
    checksum            16 bytes: BLAKE2b over all the rest and the entry's digest
    message             a serialized CachedAnswer, zlib-compressed if the flags say so

The entry's digest is part of the checksum, so bytes that ended up under another key do not pass.
"""

from __future__ import annotations

import hashlib
import zlib

from google.protobuf.message import DecodeError

from meshserve.v1 import cache_pb2

MAGIC = b"MSA1"
STAMP_BYTES = 24
# Where the stamp lies, for scripts that look at nothing else. Both ends included.
STAMP_FIRST = len(MAGIC) + 1
STAMP_LAST = STAMP_FIRST + STAMP_BYTES - 1

_CHECKSUM_BYTES = 16
_HEADER_BYTES = STAMP_LAST + 1 + _CHECKSUM_BYTES
_COMPRESSED = 1
# Text shrinks about threefold at the fastest level; slower ones gain little on top.
_LEVEL = 1


class CorruptAnswerError(Exception):
    """The bytes are not an answer of this version, or not the one that was stored here."""


def encode(message: bytes, *, stamp: bytes, entry_digest: str, compress_over_bytes: int) -> bytes:
    """The stored form of a serialized CachedAnswer."""
    flags = 0
    if len(message) > compress_over_bytes:
        compressed = zlib.compress(message, _LEVEL)
        if len(compressed) < len(message):
            message, flags = compressed, _COMPRESSED
    head = MAGIC + bytes([flags]) + stamp
    return head + _checksum(head, message, entry_digest) + message


def stamp_of(value: bytes) -> bytes | None:
    """The stamp of a stored answer; None when the bytes cannot be one of this version."""
    if len(value) < _HEADER_BYTES or not value.startswith(MAGIC):
        return None
    return value[STAMP_FIRST : STAMP_LAST + 1]


def decode(value: bytes, *, entry_digest: str) -> cache_pb2.CachedAnswer:
    """The answer that `encode` was given. Raises CorruptAnswerError."""
    try:
        return cache_pb2.CachedAnswer.FromString(message_of(value, entry_digest=entry_digest))
    except DecodeError as error:
        raise CorruptAnswerError(str(error)) from error


def message_of(value: bytes, *, entry_digest: str) -> bytes:
    """The serialized message that `encode` was given. Raises CorruptAnswerError."""
    if stamp_of(value) is None:
        raise CorruptAnswerError("not an answer of this version")
    head, message = value[: STAMP_LAST + 1], value[_HEADER_BYTES:]
    if value[STAMP_LAST + 1 : _HEADER_BYTES] != _checksum(head, message, entry_digest):
        raise CorruptAnswerError("the checksum does not match")
    try:
        if value[len(MAGIC)] & _COMPRESSED:
            return zlib.decompress(message)
    except zlib.error as error:
        raise CorruptAnswerError(str(error)) from error
    return message


def _checksum(head: bytes, message: bytes, entry_digest: str) -> bytes:
    digest = hashlib.blake2b(head, digest_size=_CHECKSUM_BYTES, key=entry_digest.encode())
    digest.update(message)
    return digest.digest()
