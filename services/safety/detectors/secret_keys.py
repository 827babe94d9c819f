"""Detectors of credentials whose issuers gave them a shape of their own."""

from __future__ import annotations

import base64
import binascii
import json

import re2

from services.safety.detectors.base import Hit, detector, run_of

# RFC 7468 and its elder kin: base64 lines, and headers such as `Proc-Type: 4,ENCRYPTED`.
_NOT_KEY_BODY = re2.compile(rb"[^A-Za-z0-9+/= \n:,]")
_MAX_KEY_CHARS = 16 * 1024
_END = b"-----END "
_MAX_END_CHARS = 64


def check_jwt(text: bytes, start: int, end: int) -> Hit | None:
    """RFC 7519: the first part is JSON that names an algorithm."""
    header = text[start:end].partition(b".")[0]
    try:
        decoded = json.loads(base64.urlsafe_b64decode(header + b"=" * (-len(header) % 4)))
    except (ValueError, binascii.Error):
        return None
    return Hit(start, end) if isinstance(decoded, dict) and "alg" in decoded else None


def end_of_key_block(text: bytes, position: int) -> int | None:
    """Where a key block ends: after its END line, or where it stops to look like one."""
    limit = position + _MAX_KEY_CHARS
    found = _NOT_KEY_BODY.search(text, position)
    while found is not None and found.start() < limit:
        stop: int = found.start()
        if text[stop : stop + 1] != b"-":
            return stop
        line = text[stop : stop + _MAX_END_CHARS]
        if line.startswith(_END):
            close = line.find(b"-----", len(_END))
            if close >= 0 and stop + close + 5 < len(text):
                return stop + close + 5
            return None if len(line) < _MAX_END_CHARS else stop
        if _END.startswith(line):
            return None
        if line[1:2] == b"-":
            return stop
        found = _NOT_KEY_BODY.search(text, stop + 1)  # a dash within a header's name
    return limit if len(text) > limit else None


def check_not_within_run(text: bytes, start: int, end: int) -> Hit | None:
    """A key stands by itself: `task-force-...` and the like are names."""
    return None if start > 0 and text[start - 1] in b"-_/." else Hit(start, end)


SECRET_KEYS = (
    detector("aws_access_key_id", r"\b(?:AKIA|ASIA)[A-Z2-7]{16}\b"),
    detector(
        "aws_secret_key",
        r"\baws_?secret[a-z_]{0,16}[\"']?[ :=]{1,4}[\"']?[A-Za-z0-9/+]{40}",
        ignore_case=True,
    ),
    detector(
        "github_token",
        r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59})\b",
        needs=b"_",
    ),
    detector(
        "gitlab_token",
        r"\bglpat-[A-Za-z0-9_-]{20}",
        needs=b"glpat-",
        extend=run_of("A-Za-z0-9_-", 80),
    ),
    detector(
        "slack_token",
        r"\bxox[abeprs]-[A-Za-z0-9-]{10}",
        needs=b"xox",
        extend=run_of("A-Za-z0-9-", 120),
    ),
    detector("google_api_key", r"\bAIza[A-Za-z0-9_-]{35}", needs=b"AIza"),
    detector(
        "stripe_key",
        r"\b[rs]k_live_[A-Za-z0-9]{16}",
        needs=b"k_live_",
        extend=run_of("A-Za-z0-9", 128),
    ),
    detector(
        "openai_key",
        r"\bsk-[A-Za-z0-9_-]{32}",
        check_not_within_run,
        needs=b"sk-",
        extend=run_of("A-Za-z0-9_-", 200),
    ),
    detector(
        "jwt",
        r"\beyJ[A-Za-z0-9_-]{8,512}\.eyJ[A-Za-z0-9_-]{8,512}[A-Za-z0-9_-]{0,512}"
        r"\.[A-Za-z0-9_-]{16,512}",
        check_jwt,
        needs=b"eyJ",
    ),
    detector(
        "private_key",
        r"-----BEGIN [A-Z ]{0,24}PRIVATE KEY(?: BLOCK)?-----",
        needs=b"PRIVATE KEY",
        extend=end_of_key_block,
    ),
)
