"""Check digits, as the standards define them."""

from __future__ import annotations

# Each digit doubled, with the digits of the result added.
_DOUBLED = str.maketrans("0123456789", "0246813579")


def luhn(digits: str) -> bool:
    """ISO/IEC 7812-1, annex B: the sum with every second digit doubled is a multiple of 10."""
    doubled = digits[-2::-2].translate(_DOUBLED)
    return (sum(map(int, digits[-1::-2])) + sum(map(int, doubled))) % 10 == 0


def mod97_of_letters(text: str) -> int:
    """ISO 7064 MOD 97-10 of digits and capital letters, A standing for 10."""
    return int("".join(str(int(character, 36)) for character in text)) % 97


def mod11_10(digits: str) -> bool:
    """ISO 7064 MOD 11,10 over all digits, the last being the check digit."""
    product = 10
    for digit in digits[:-1]:
        total = (int(digit) + product) % 10 or 10
        product = total * 2 % 11
    return (11 - product) % 10 == int(digits[-1])


def weighted_sum(digits: str, weights: tuple[int, ...]) -> int:
    """The sum of digits times weights."""
    return sum(int(digit) * weight for digit, weight in zip(digits, weights, strict=True))
