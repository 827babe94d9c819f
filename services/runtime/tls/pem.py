"""Whether certificates and keys in PEM can be used, and until when."""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from services.runtime.file_watch import FilesRefusedError

_CERTIFICATE = re.compile(
    r"-----BEGIN CERTIFICATE-----.+?-----END CERTIFICATE-----", re.DOTALL | re.ASCII
)
# DER tags of X.690: a [0] that stands before a certificate's serial number when it has a version,
# and two forms of time.
_VERSION = 0xA0
_UTC_TIME = 0x17
_TIME_FORMATS = {_UTC_TIME: "%y%m%d%H%M%SZ", 0x18: "%Y%m%d%H%M%SZ"}


def check_trusted(path: Path, content: bytes) -> None:
    """Raises FilesRefusedError where a file holds no certificates to trust."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(cadata=content.decode())
    except (ValueError, ssl.SSLError) as error:
        raise FilesRefusedError(f"{path}: holds no certificates: {_why(error)}") from error


def check_pair(certificate: tuple[Path, bytes], private_key: tuple[Path, bytes]) -> float:
    """When a certificate, or one of the chain after it, expires, in seconds since 1970.

    Raises FilesRefusedError where the pair cannot be served: it holds something else, the key is
    not the certificate's, or it has expired.
    """
    path, chain = certificate
    check_trusted(path, chain)
    load_pair(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), certificate, private_key)
    try:
        expires_at = expiry(chain)
    except ValueError as error:
        raise FilesRefusedError(f"{path}: cannot be read: {error}") from error
    if expires_at <= time.time():
        when = datetime.fromtimestamp(expires_at, UTC)
        raise FilesRefusedError(f"{path}: has expired on {when:%Y-%m-%d at %H:%M} UTC")
    return expires_at


def load_pair(
    context: ssl.SSLContext, certificate: tuple[Path, bytes], private_key: tuple[Path, bytes]
) -> None:
    """Has a context show a certificate. Raises FilesRefusedError."""
    try:
        with _as_file(certificate[1]) as chain, _as_file(private_key[1]) as key:
            # Nobody is there to be asked for the password of a key.
            context.load_cert_chain(chain, key, password="")
    except ssl.SSLError as error:
        if error.reason == "KEY_VALUES_MISMATCH":
            raise FilesRefusedError(
                f"{private_key[0]}: is not the key of {certificate[0]}"
            ) from error
        raise FilesRefusedError(
            f"{private_key[0]}: holds no private key that can be used: {_why(error)}"
        ) from error


def expiry(chain: bytes) -> float:
    """When the first of some certificates expires, in seconds since 1970. Raises ValueError."""
    found = _CERTIFICATE.findall(chain.decode("ascii", "replace"))
    if not found:
        raise ValueError("there is no certificate")
    return min(_not_after(ssl.PEM_cert_to_DER_cert(each)) for each in found)


@contextlib.contextmanager
def _as_file(content: bytes) -> Iterator[str]:
    """OpenSSL's reader wants a path. That of memory, so that what was checked is what is loaded,
    and no key gets onto a disk."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        os.write(descriptor, content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _not_after(der: bytes) -> float:
    """The end of a certificate's validity (RFC 5280, section 4.1)."""
    (certificate,) = _elements(der)
    to_be_signed = next(_elements(certificate[1]))[1]
    fields = [each for each in _elements(to_be_signed) if each[0] != _VERSION]
    # The serial number, the signature's algorithm, the issuer, the validity.
    _, (tag, content) = _elements(fields[3][1])
    time_format = _TIME_FORMATS.get(tag)
    if time_format is None:
        raise ValueError("the end of its validity is no time")
    parsed = datetime.strptime(content.decode("ascii"), time_format)
    return parsed.replace(tzinfo=UTC).timestamp()


def _elements(der: bytes) -> Iterator[tuple[int, bytes]]:
    """The tag and the content of each element. Raises ValueError."""
    position = 0
    while position < len(der):
        if position + 2 > len(der):
            raise ValueError("it ends too early")
        tag, length = der[position], der[position + 1]
        position += 2
        if length & 0x80:
            size = length & 0x7F
            length = int.from_bytes(der[position : position + size])
            position += size
        content = der[position : position + length]
        if len(content) != length:
            raise ValueError("it ends too early")
        yield tag, content
        position += length


def _why(error: Exception) -> str:
    reason = error.reason if isinstance(error, ssl.SSLError) else str(error)
    return (reason or "not PEM").lower().replace("_", " ")
