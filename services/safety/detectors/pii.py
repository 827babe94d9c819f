"""Detectors of personal data: cards, accounts, addresses and numbers of people."""

from __future__ import annotations

import ipaddress

from services.safety.detectors.base import Check, Hit, detector, digits_of, stands_alone
from services.safety.detectors.checksums import luhn, mod97_of_letters

# (lowest prefix, highest prefix, lengths): the ranges the large networks publish.
_CARD_RANGES = (
    ("4", "4", (13, 16, 19)),  # Visa
    ("51", "55", (16,)),  # Mastercard
    ("2221", "2720", (16,)),
    ("34", "34", (15,)),  # American Express
    ("37", "37", (15,)),
    ("6011", "6011", (16, 19)),  # Discover
    ("644", "659", (16, 19)),
    ("300", "305", (14, 16)),  # Diners Club
    ("36", "36", (14, 16)),
    ("38", "39", (14, 16)),
    ("3528", "3589", (16, 17, 18, 19)),  # JCB
    ("62", "62", (16, 17, 18, 19)),  # UnionPay
)

# Length of an account number by country: SWIFT IBAN registry.
IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22,
    "BR": 29, "BY": 28, "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28,
    "EE": 20, "EG": 29, "ES": 24, "FI": 18, "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23,
    "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22, "IL": 23, "IQ": 23, "IS": 26,
    "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20, "LU": 20,
    "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30,
    "NL": 18, "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22,
    "SA": 24, "SC": 31, "SE": 24, "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23,
    "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24, "XK": 20,
}  # fmt: skip

# Numbers printed in advertisements, never issued (Social Security Administration).
_VOID_SSNS = frozenset({"078051120", "219099999"})
_SMALL_OCTET = 20
_GROUPED_CARD_DIGITS = 16


def _is_card(digits: str) -> bool:
    if not luhn(digits):
        return False
    return any(
        len(digits) in lengths and low <= digits[: len(low)] <= high
        for low, high, lengths in _CARD_RANGES
    )


def check_card(text: bytes, start: int, end: int) -> Hit | None:
    """Luhn's check digit and an issuer's range and length."""
    if not stands_alone(text, start, end):
        return None
    candidate = text[start:end]
    digits = digits_of(candidate)
    if _is_card(digits):
        return Hit(start, end)
    # The last group may be another number.
    cut = max(candidate.rfind(b" "), candidate.rfind(b"-"))
    if len(digits) > _GROUPED_CARD_DIGITS and cut > 0 and _is_card(digits_of(candidate[:cut])):
        return Hit(start, start + cut)
    return None


def check_iban(text: bytes, start: int, end: int) -> Hit | None:
    """The country's length, then ISO 13616's mod 97 = 1."""
    candidate = text[start:end].decode("ascii").upper()
    length = IBAN_LENGTHS.get(candidate[:2])
    if length is None or not stands_alone(text, start, start + 1):
        return None
    account = ""
    for offset, character in enumerate(candidate):
        if character != " ":
            account += character
        if len(account) == length:
            after = text[start + offset + 1 : start + offset + 2]
            if after.isalnum() or mod97_of_letters(account[4:] + account[:4]) != 1:
                return None
            return Hit(start, start + offset + 1)
    return None


def check_ssn(text: bytes, start: int, end: int) -> Hit | None:
    """Areas 000, 666 and 900-999, group 00 and serial 0000 are never issued (SSA, 2011)."""
    digits = digits_of(text[start:end])
    area, group, serial = digits[:3], digits[3:5], digits[5:]
    if area in ("000", "666") or area[0] == "9" or group == "00" or serial == "0000":
        return None
    if digits in _VOID_SSNS or not stands_alone(text, start, end):
        return None
    return Hit(start, end)


def check_email(text: bytes, start: int, end: int) -> Hit | None:
    """RFC 5321 dot-atoms; the last label holds letters alone."""
    local, _, domain = text[start:end].partition(b"@")
    if b".." in local or local.endswith(b".") or (start > 0 and text[start - 1] in b".%+-@_"):
        return None
    labels = domain.split(b".")
    if any(label.startswith(b"-") or label.endswith(b"-") for label in labels):
        return None
    if not labels[-1].isalpha() or len(labels[-1]) < 2:
        return None
    return Hit(start, end)


def check_international_phone(text: bytes, start: int, end: int) -> Hit | None:
    """ITU-T E.164: a country code that does not begin with 0, and 8 to 15 digits in all."""
    digits = digits_of(text[start:end])
    if text[start : start + 2] == b"00":
        digits = digits[2:]
    if start > 0 and (chr(text[start - 1]).isalnum() or text[start - 1] in b"-+=."):
        return None
    if not 8 <= len(digits) <= 15 or digits[0] == "0":
        return None
    return Hit(start, end)


def check_us_phone(text: bytes, start: int, end: int) -> Hit | None:
    """North American Numbering Plan: NXX-NXX-XXXX, N being 2-9; no N11 codes."""
    digits = digits_of(text[start:end])[-10:]
    area, exchange = digits[:3], digits[3:6]
    if area[0] in "01" or exchange[0] in "01" or area[1:] == "11" or exchange[1:] == "11":
        return None
    if not stands_alone(text, start, end):
        return None
    return Hit(start, end, 0.9)


def check_ipv4(text: bytes, start: int, end: int) -> Hit | None:
    """Four octets without leading zeros; four small ones are more often a version."""
    if not stands_alone(text, start, end):
        return None
    octets = text[start:end].split(b".")
    if len(octets) != 4 or any(
        int(octet) > 255 or (len(octet) > 1 and octet[:1] == b"0") for octet in octets
    ):
        return None
    small = all(int(octet) < _SMALL_OCTET for octet in octets)
    return Hit(start, end, 0.4 if small else 0.9)


def check_ipv6(text: bytes, start: int, end: int) -> Hit | None:
    """RFC 4291 text form with at least three written groups, which times and C++ names lack."""
    if start > 0 and (chr(text[start - 1]).isalnum() or text[start - 1] in b":."):
        return None
    candidate = text[start:end].decode("ascii")
    # A colon that ends a clause may have been taken.
    if candidate.endswith(":") and not candidate.endswith("::"):
        candidate = candidate[:-1]
    if text[start + len(candidate) : start + len(candidate) + 1].isalnum():
        return None
    if sum(1 for group in candidate.split(":") if group) < 3:
        return None
    try:
        ipaddress.IPv6Address(candidate)
    except ValueError:
        return None
    return Hit(start, start + len(candidate), 0.9)


def _ignoring_glue(check: Check) -> Check:
    """A check for numbers that an opening bracket may begin."""

    def checked(text: bytes, start: int, end: int) -> Hit | None:
        if start > 0 and chr(text[start - 1]).isalnum():
            return None
        return check(text, start, end)

    return checked


PII = (
    detector(
        "credit_card",
        r"\b(?:\d{13,19}|\d{4}(?:[ -]\d{4}){3}(?:[ -]\d{1,3})?|\d{4}[ -]\d{6}[ -]\d{4,5})\b",
        check_card,
    ),
    detector("iban", r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]){11,28}\b", check_iban, ignore_case=True),
    detector("us_ssn", r"\b(?:\d{3}-\d{2}-\d{4}|\d{3} \d{2} \d{4})\b", check_ssn),
    detector(
        "email",
        r"\b[A-Za-z0-9](?:[A-Za-z0-9._%+-]){0,63}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,4}\b",
        check_email,
        needs=b"@",
    ),
    detector(
        "phone",
        r"(?:\+|\b00)[1-9]\d{0,3}(?:[ .-]?\(?\d{1,5}\)?){2,6}\b",
        check_international_phone,
    ),
    detector(
        "phone_us",
        r"(?:\b1[ .-])?(?:\(\d{3}\) ?|\b\d{3}[ .-])\d{3}[ .-]\d{4}\b",
        _ignoring_glue(check_us_phone),
    ),
    detector("ipv4", r"\b(?:\d{1,3}\.){3}\d{1,3}(?:\.\d{1,3})?\b", check_ipv4, needs=b"."),
    detector(
        "ipv6",
        r"[0-9A-Fa-f]{0,4}:(?:[0-9A-Fa-f]{0,4}:){1,6}[0-9A-Fa-f]{0,4}",
        check_ipv6,
        needs=b":",
    ),
)
