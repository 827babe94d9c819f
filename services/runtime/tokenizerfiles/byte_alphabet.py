"""The printable characters that stand for bytes in byte-level BPE (Radford et al. 2019)."""

from __future__ import annotations


def _alphabet() -> dict[str, int]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    characters = {chr(byte): byte for byte in printable}
    others = [byte for byte in range(256) if byte not in set(printable)]
    return characters | {chr(256 + index): byte for index, byte in enumerate(others)}


BYTE_OF_CHARACTER = _alphabet()


def spelled_bytes(token: str) -> bytes | None:
    """The bytes that a token spells; None if it holds a character outside the alphabet."""
    try:
        return bytes(BYTE_OF_CHARACTER[character] for character in token)
    except KeyError:
        return None
