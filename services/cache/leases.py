"""The token that proves a lease, and carries when and in which generations it was given."""

from __future__ import annotations

import base64
import binascii
import secrets
from dataclasses import dataclass

from services.cache.codec import STAMP_BYTES

NONCE_BYTES = 16
_TIME_BYTES = 8
_TOKEN_BYTES = NONCE_BYTES + _TIME_BYTES + STAMP_BYTES


@dataclass(frozen=True)
class LeaseToken:
    """The right to compute one answer.

    The stamp travels with the token rather than staying in the server, so that an answer computed
    before something was forgotten is never served afterwards, even if its lease has run out since.
    """

    nonce: bytes
    # The server's clock when the lease began, in microseconds since the epoch.
    issued_us: int
    stamp: bytes

    @staticmethod
    def new_nonce() -> bytes:
        """What tells one lease from all others."""
        return secrets.token_bytes(NONCE_BYTES)

    def __str__(self) -> str:
        raw = self.nonce + self.issued_us.to_bytes(_TIME_BYTES, "big") + self.stamp
        return base64.urlsafe_b64encode(raw).decode()

    @classmethod
    def parse(cls, text: str) -> LeaseToken:
        """Restores what `str` made. Raises ValueError."""
        try:
            raw = base64.b64decode(text.encode("ascii"), altchars=b"-_", validate=True)
        except (UnicodeEncodeError, binascii.Error) as error:
            raise ValueError("not a lease token") from error
        if len(raw) != _TOKEN_BYTES:
            raise ValueError("not a lease token")
        time_end = NONCE_BYTES + _TIME_BYTES
        return cls(
            raw[:NONCE_BYTES], int.from_bytes(raw[NONCE_BYTES:time_end], "big"), raw[time_end:]
        )
