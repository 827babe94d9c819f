"""Detectors find what is real and leave near misses alone."""

from __future__ import annotations

import base64
import functools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.safety.detectors import DETECTORS
from services.safety.detectors.checksums import luhn, mod97_of_letters
from services.safety.detectors.pii import IBAN_LENGTHS
from services.safety.matcher import Matcher
from services.safety.policy import parse_policy
from services.safety.session import check_texts


@functools.cache
def matcher_of(name: str) -> Matcher:
    text = json.dumps(
        {"categories": {"found": {"prompt": "flag", "threshold": 0.5, "detectors": [name]}}}
    )
    return Matcher(parse_policy(text), completion=False)


def found(name: str, text: str) -> list[str]:
    verdict = check_texts(matcher_of(name), [text]).verdict
    return [text[finding.start : finding.end] for finding in verdict.findings]


JWT = ".".join(
    base64.urlsafe_b64encode(part).rstrip(b"=").decode()
    for part in (b'{"alg":"HS256","typ":"JWT"}', b'{"sub":"1234567890"}', b"0123456789abcdef0123")
)
NOT_JWT = JWT.replace(JWT.split(".")[0], "eyJhYmNkZWZnaGlqa2w")

REAL = [
    ("credit_card", "4111111111111111"),
    ("credit_card", "4111 1111 1111 1111"),
    ("credit_card", "5555-5555-5555-4444"),
    ("credit_card", "3782 822463 10005"),
    ("credit_card", "378282246310005"),
    ("credit_card", "6011111111111117"),
    ("credit_card", "2223003122003222"),
    ("credit_card", "3530111333300000"),
    ("credit_card", "30569309025904"),
    ("iban", "GB82 WEST 1234 5698 7654 32"),
    ("iban", "GB82WEST12345698765432"),
    ("iban", "DE89 3704 0044 0532 0130 00"),
    ("iban", "NO93 8601 1117 947"),
    ("iban", "MT84MALT011000012345MTLCAST001S"),
    ("us_ssn", "536-90-4399"),
    ("us_ssn", "536 90 4399"),
    ("email", "first.last+tag@sub.corp.co.uk"),
    ("email", "x@corp.io"),
    ("phone", "+44 20 7946 0958"),
    ("phone", "+4915112345678"),
    ("phone", "+1 (212) 555-0187"),
    ("phone_us", "(212) 555-0187"),
    ("phone_us", "212-555-0187"),
    ("ipv4", "192.168.10.254"),
    ("ipv4", "8.8.4.40"),
    ("ipv6", "2001:db8::ff00:42:8329"),
    ("ipv6", "fe80:0:0:0:204:61ff:fe9d:f156"),
    ("de_tax_id", "86095742719"),
    ("de_tax_id", "86 095 742 719"),
    ("es_dni", "12345678Z"),
    ("es_dni", "X1234567L"),
    ("fr_nir", "2 55 08 14 168 025 38"),
    ("br_cpf", "529.982.247-25"),
    ("aws_access_key_id", "AKIAIOSFODNN7EXAMPLE"),
    ("github_token", "ghp_" + "a1B2" * 9),
    ("gitlab_token", "glpat-" + "x" * 20),
    ("slack_token", "xoxb-123456789012-abcdefghij"),
    ("google_api_key", "AIza" + "S" * 35),
    ("stripe_key", "sk_live_" + "4eC39HqLyjWDarjt"),
    ("openai_key", "sk-proj-" + "Ab1_" * 12),
    ("jwt", JWT),
]


@pytest.mark.parametrize(("name", "text"), REAL)
@pytest.mark.parametrize("frame", ["{}", "It is {}.", "({})", "a, {}, b", "x\n{}\ny", "id: {}; ok"])
def test_what_is_real_is_found_whole(name: str, text: str, frame: str) -> None:
    if text.startswith("(") and frame == "({})":
        frame = "[{}]"
    assert found(name, frame.format(text)) == [text]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("credit_card", "4111111111111112"),  # Luhn
        ("credit_card", "1111111111111117"),  # no issuer
        ("credit_card", "411111111111111"),  # Visa has no 15 digits
        ("credit_card", "41111111111111111111111"),
        ("credit_card", "order 4111-1111-1111-1111-1111-1111-2"),
        ("iban", "GB82 WEST 1234 5698 7654 33"),
        ("iban", "GB82 WEST 1234 5698 7654 3"),
        ("iban", "ZZ82 WEST 1234 5698 7654 32"),
        ("us_ssn", "000-12-3456"),
        ("us_ssn", "666-12-3456"),
        ("us_ssn", "912-12-3456"),
        ("us_ssn", "536-00-4399"),
        ("us_ssn", "536-90-0000"),
        ("us_ssn", "078-05-1120"),
        ("us_ssn", "1-536-90-4399"),
        ("us_ssn", "536-90-43990"),
        ("email", "not@an"),
        ("email", "a..b@"),
        ("email", "user@host.1"),
        ("email", "@decorator.name"),
        ("phone", "+0123456789"),
        ("phone", "1+1234"),
        ("phone", "+1 2 3"),
        ("phone_us", "112-555-0187"),
        ("phone_us", "212-011-0187"),
        ("phone_us", "2212-555-0187"),
        ("ipv4", "1.2.3.4"),  # a version
        ("ipv4", "192.168.300.1"),
        ("ipv4", "192.168.01.1"),
        ("ipv4", "192.168.10.20.30"),
        ("ipv4", "v192.168.10.20"),
        ("ipv6", "12:30:45"),
        ("ipv6", "std::vector"),
        ("ipv6", "a::b"),
        ("de_tax_id", "86095742718"),
        ("de_tax_id", "12345678903"),  # no digit twice
        ("es_dni", "12345678A"),
        ("es_dni", "X1234567A"),
        ("nl_bsn", "123456782"),  # needs its name before it
        ("nl_bsn", "bsn 123456789"),
        ("fr_nir", "2 55 08 14 168 025 39"),
        ("fr_nir", "2 55 13 14 168 025 38"),
        ("uk_nhs", "nhs number 943 476 5918"),
        ("uk_nhs", "943 476 5919"),
        ("br_cpf", "529.982.247-24"),
        ("br_cpf", "111.111.111-11"),
        ("aws_access_key_id", "AKIAIOSFODNN7EXAMPL"),
        ("aws_access_key_id", "akiaiosfodnn7example"),
        ("github_token", "ghp_" + "a" * 35),
        ("jwt", NOT_JWT),
        ("private_key", "-----BEGIN PUBLIC KEY-----"),
    ],
)
def test_near_misses_are_left_alone(name: str, text: str) -> None:
    assert found(name, f"see {text} there") == []


def test_numbers_that_need_their_name_are_found_after_it() -> None:
    assert found("nl_bsn", "mijn BSN: 123456782, ok") == ["123456782"]
    assert found("uk_nhs", "NHS number 943 476 5919.") == ["943 476 5919"]


def test_a_card_is_found_after_other_digits() -> None:
    assert found("credit_card", "1234 4111 1111 1111 1111 ok") == ["4111 1111 1111 1111"]
    assert found("credit_card", "4111 1111 1111 1111 12 items") == ["4111 1111 1111 1111"]


def test_digits_of_other_scripts_and_invisible_characters_hide_nothing() -> None:
    hidden = "４１１１\u200b １１１１ 1111 \u20601111"
    assert found("credit_card", f"card {hidden} ok") == [hidden]


@settings(max_examples=200, deadline=None)
@given(st.from_regex(r"4[0-9]{14}", fullmatch=True), st.integers(0, 15), st.integers(1, 9))
def test_one_wrong_digit_of_a_card_is_always_noticed(body: str, place: int, change: int) -> None:
    number = next(body + d for d in "0123456789" if luhn(body + d))
    assert found("credit_card", f"no {number} ok") == [number]
    wrong = list(number)
    wrong[place] = str((int(wrong[place]) + change) % 10)
    assert not luhn("".join(wrong))


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(IBAN_LENGTHS)), st.data())
def test_ibans_of_every_country_are_found(country: str, data: st.DataObject) -> None:
    length = IBAN_LENGTHS[country] - 4
    bban = data.draw(st.from_regex(rf"[0-9]{{{length}}}", fullmatch=True))
    check = 98 - mod97_of_letters(bban + country + "00")
    iban = f"{country}{check:02d}{bban}"
    grouped = " ".join(iban[i : i + 4] for i in range(0, len(iban), 4))
    assert found("iban", f"pay {iban} now") == [iban]
    assert found("iban", f"pay {grouped} now") == [grouped]
    swapped = f"{country}{(check + 1) % 100:02d}{bban}"
    assert found("iban", f"pay {swapped} now") == []


@pytest.mark.parametrize(
    ("text", "block"),
    [
        ("{}", "-----BEGIN PRIVATE KEY-----\nMIIEv\nabc=\n-----END PRIVATE KEY-----"),
        ("{}\nthen. more", "-----BEGIN EC PRIVATE KEY-----\nMHc\n-----END EC PRIVATE KEY-----"),
        (
            "a {} b",
            "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00FF"
            "\n\nMIIE\n-----END RSA PRIVATE KEY-----",
        ),
    ],
)
def test_a_key_block_is_found_with_its_body(text: str, block: str) -> None:
    assert found("private_key", text.format(block)) == [block]


def test_a_key_block_without_an_end_goes_as_far_as_it_looks_like_one() -> None:
    text = "-----BEGIN PRIVATE KEY-----\nMIIEvabc\n(sorry, cut)"
    assert found("private_key", text) == ["-----BEGIN PRIVATE KEY-----\nMIIEvabc\n"]


ORDINARY = """In 2024, 1,234,567 people (12.5%) visited between 10:30 and 22:45. Version 3.11.7 of
the package replaced 3.10.2; see section 4.2.1.3. The ratio was 0.123456789012345 and the hash
d41d8cd98f00b204e9800998ecf8427e. Call extension 4021. ISBN 978-3-16-148410-0. Order 20240131-77.
Coordinates 52.520008, 13.404954. Total: $1,299.99. UUID 123e4567-e89b-12d3-a456-426614174000.
std::vector<int> a(10); x = y ? a::b : c; at 2024-01-31T10:30:45.123456Z; MAC 00:1b:63:84:45:e6."""


@pytest.mark.parametrize("name", sorted(DETECTORS))
def test_ordinary_numbers_are_nothing(name: str) -> None:
    assert found(name, ORDINARY) == []
