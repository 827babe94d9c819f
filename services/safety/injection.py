"""The prompt-injection heuristic: kinds of evidence, their weights, and how they add up.

A text shows evidence of several kinds: it tells the model to drop its instructions, forges the
marks of another speaker, asks for hidden text, or hides any of this in an encoding. Each kind
counts once, and kinds combine as independent causes do (noisy-or):

    score = 1 - product over kinds seen of (1 - weight)

so that one kind alone flags at most, and several together approach 1. The score at a place in the
text counts what was seen up to there. It is a heuristic: it knows common phrasings in a dozen
languages, and a new phrasing passes.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterable

from services.safety.detectors.base import Hit, detector, run_of
from services.safety.injection_evidence import EVIDENCE, NAME, Evidence

__all__ = [
    "BLOB",
    "ENCODED",
    "ENCODED_KIND",
    "EVIDENCE",
    "NAME",
    "Evidence",
    "combined_score",
    "decode_blob",
]

ENCODED_KIND = "encoded"


ENCODED = Evidence(ENCODED_KIND, 0.5)


def check_blob(text: bytes, start: int, end: int) -> Hit | None:
    """The run without what stands before it."""
    return Hit(start + 1, end)


# A run of base64 or hexadecimal after something else, so that there is one candidate to a run. Its
# first 512 characters are enough for an opening phrase.
BLOB = detector(
    f"{NAME}.{ENCODED_KIND}",
    r"[^A-Za-z0-9+/_-][A-Za-z0-9+/_-]{24}",
    check_blob,
    extend=run_of("A-Za-z0-9+/_-", 488),
)


def combined_score(weights: Iterable[float]) -> float:
    """Noisy-or of the weights of the kinds seen; in [0, 1]."""
    unlikely = 1.0
    for weight in weights:
        unlikely *= 1.0 - weight
    return 1.0 - unlikely


def decode_blob(blob: str) -> str | None:
    """The text in a run of hexadecimal or base64 (RFC 4648, both alphabets); None if none is."""
    run = blob.strip().rstrip("=")
    decoded: bytes | None = None
    if len(run) % 2 == 0:
        try:
            decoded = bytes.fromhex(run)
        except ValueError:
            decoded = None
    if decoded is None:
        run = run[: len(run) - (len(run) % 4 == 1)].replace("-", "+").replace("_", "/")
        try:
            decoded = base64.b64decode(run + "=" * (-len(run) % 4), validate=True)
        except (ValueError, binascii.Error):
            return None
    text = decoded.decode("utf-8", "ignore")
    readable = "".join(c for c in text if c.isprintable() or c.isspace())
    # What is not text loses most of itself on the way.
    return readable if len(readable.encode()) >= 0.9 * len(decoded) else None
