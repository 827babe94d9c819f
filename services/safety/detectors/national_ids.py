"""Detectors of national identity and tax numbers that carry check digits."""

from __future__ import annotations

from services.safety.detectors.base import Hit, detector, digits_of, stands_alone
from services.safety.detectors.checksums import mod11_10, weighted_sum

_DNI_LETTERS = "TRWAGMYFPDXBNJZSQVHLCKE"


def check_german_tax_id(text: bytes, start: int, end: int) -> Hit | None:
    """Steuer-IdNr (section 139b AO): among ten digits one comes twice or thrice; MOD 11,10."""
    digits = digits_of(text[start:end])
    counts = sorted(digits[:10].count(digit) for digit in set(digits[:10]))
    if digits[0] == "0" or counts[-1] not in (2, 3) or (len(counts) > 1 and counts[-2] > 1):
        return None
    if not mod11_10(digits) or not stands_alone(text, start, end):
        return None
    return Hit(start, end, 0.9)


def check_spanish_id(text: bytes, start: int, end: int) -> Hit | None:
    """DNI and NIE (Real Decreto 1553/2005): the letter is the number modulo 23."""
    candidate = text[start:end].decode("ascii").upper()
    number = candidate[:-1].rstrip("-").replace("X", "0").replace("Y", "1").replace("Z", "2")
    if _DNI_LETTERS[int(number) % 23] != candidate[-1] or not stands_alone(text, start, end):
        return None
    return Hit(start, end)


def check_dutch_bsn(text: bytes, start: int, end: int) -> Hit | None:
    """Burgerservicenummer: the eleven test, weights 9 to 2 and -1."""
    digits = digits_of(text[start:end])
    if int(digits) == 0 or weighted_sum(digits, (9, 8, 7, 6, 5, 4, 3, 2, -1)) % 11:
        return None
    return Hit(end - 9, end)


def check_french_nir(text: bytes, start: int, end: int) -> Hit | None:
    """NIR (INSEE): the key is 97 less the number modulo 97; 2A counts as 19 and 2B as 18."""
    compact = text[start:end].decode("ascii").upper().replace(" ", "")
    number = compact[:13].replace("2A", "19").replace("2B", "18")
    if 97 - int(number) % 97 != int(compact[13:]) or not stands_alone(text, start, end):
        return None
    return Hit(start, end)


def check_nhs_number(text: bytes, start: int, end: int) -> Hit | None:
    """NHS number (NHS Data Dictionary): weights 10 to 2, modulo 11."""
    digits = digits_of(text[start:end])
    check_digit = (11 - weighted_sum(digits[:9], (10, 9, 8, 7, 6, 5, 4, 3, 2)) % 11) % 11
    if check_digit != int(digits[9]):  # 10 is never issued
        return None
    first = next(i for i in range(start, end) if 48 <= text[i] <= 57)
    return Hit(first, end)


def check_brazilian_cpf(text: bytes, start: int, end: int) -> Hit | None:
    """CPF (Receita Federal): two digits, each a weighted sum modulo 11."""
    digits = digits_of(text[start:end])
    if len(set(digits)) == 1 or not stands_alone(text, start, end):
        return None
    for length in (9, 10):
        weights = tuple(range(length + 1, 1, -1))
        if weighted_sum(digits[:length], weights) * 10 % 11 % 10 != int(digits[length]):
            return None
    return Hit(start, end)


NATIONAL_IDS = (
    detector("de_tax_id", r"\b(?:\d{11}|\d{2} \d{3} \d{3} \d{3})\b", check_german_tax_id),
    detector(
        "es_dni",
        r"\b(?:\d{8}|[XYZ]\d{7})-?[TRWAGMYFPDXBNJZSQVHLCKE]\b",
        check_spanish_id,
        ignore_case=True,
    ),
    detector(
        "nl_bsn",
        r"\b(?:bsn|burgerservicenummer)[ :.#=-]{0,4}(?:is )?\d{9}\b",
        check_dutch_bsn,
        ignore_case=True,
    ),
    detector(
        "fr_nir",
        r"\b[12] ?\d{2} ?(?:0[1-9]|1[0-2]) ?(?:\d{2}|2[AB]) ?\d{3} ?\d{3} ?\d{2}\b",
        check_french_nir,
        ignore_case=True,
    ),
    detector(
        "uk_nhs",
        r"\bnhs(?: number| no)?[ :.#=-]{0,4}(?:is )?\d{3}[ -]?\d{3}[ -]?\d{4}\b",
        check_nhs_number,
        ignore_case=True,
    ),
    detector("br_cpf", r"\b\d{3}\.\d{3}\.\d{3}-\d{2}\b", check_brazilian_cpf, needs=b"-"),
)
