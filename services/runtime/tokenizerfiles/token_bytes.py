"""What each token of a tokenizer stands for, worked out from the decoder in its tokenizer.json."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from services.runtime.tokenizerfiles.byte_alphabet import spelled_bytes
from services.runtime.tokenizerfiles.definition import TokenizerDefinition, steps_of
from services.runtime.tokenizerfiles.errors import TokenizerLoadError

MAX_VOCABULARY = 1 << 24
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORDPIECE_CLEAN_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" do not", " don't"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)

Piece = Callable[[str], bytes]


@dataclass(frozen=True, slots=True)
class TextBeginning:
    """How the beginning of a text differs from the rest.

    `pieces` are the bytes of tokens where they come first, for those that differ there;
    `stripped_spaces` is how many spaces at the very beginning are dropped.
    """

    pieces: Mapping[int, bytes]
    stripped_spaces: int = 0


@dataclass(frozen=True, slots=True)
class TokenBytes:
    """What each token of a vocabulary stands for.

    Attributes:
        pieces: bytes of each token id, [vocabulary size]; empty for ids that have no token.
        special_ids: control tokens, which are no text.
        beginning: how the beginning of a text differs.
    """

    pieces: Sequence[bytes]
    special_ids: Sequence[int]
    beginning: TextBeginning


def token_bytes(definition: TokenizerDefinition) -> TokenBytes:
    """The table that turns token ids into bytes.

    Raises TokenizerLoadError if the decoder is of a kind whose text cannot be sent piece by piece.
    """
    document = definition.document
    added = {token["id"]: token for token in document.get("added_tokens") or []}
    tokens = vocabulary_of(document)
    if tokens and not 0 <= min(tokens) <= max(tokens) < MAX_VOCABULARY:
        raise TokenizerLoadError(
            definition.source, f"token ids are not all in [0, {MAX_VOCABULARY})"
        )
    piece, first_piece, stripped_spaces = _readers(definition)
    pieces = [b""] * (max(tokens, default=-1) + 1)
    first_pieces: dict[int, bytes] = {}
    for token_id, token in tokens.items():
        pieces[token_id] = piece(token)
        if token_id in added and spelled_bytes(token) != token.encode():
            # Added tokens are text as it is, whatever alphabet the others are spelled in.
            pieces[token_id] = piece(token) if first_piece else token.encode()
        if first_piece is not None and (first := first_piece(token)) != pieces[token_id]:
            first_pieces[token_id] = first
    special = [token_id for token_id, token in added.items() if token["special"]]
    return TokenBytes(pieces, special, TextBeginning(first_pieces, stripped_spaces))


def vocabulary_of(document: Mapping[str, Any]) -> dict[int, str]:
    """Token id to token, added tokens included."""
    vocabulary = document["model"]["vocab"]
    if isinstance(vocabulary, list):
        tokens = {token_id: str(token) for token_id, (token, _) in enumerate(vocabulary)}
    else:
        tokens = {token_id: token for token, token_id in vocabulary.items()}
    return tokens | {token["id"]: token["content"] for token in document.get("added_tokens") or []}


def _readers(definition: TokenizerDefinition) -> tuple[Piece, Piece | None, int]:
    """How a token is read, how where it comes first if that differs, and leading spaces dropped."""
    steps = steps_of(definition.document.get("decoder"), "decoders")
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return _read_byte_level, None, 0
    if kinds == ["Metaspace"]:
        return _metaspace_readers(steps[0])
    if kinds == ["WordPiece"]:
        return _wordpiece_readers(steps[0])
    if not kinds:
        return (lambda token: b" " + token.encode()), str.encode, 0
    return _sequence_reader(definition, steps)


def _read_byte_level(token: str) -> bytes:
    spelled = spelled_bytes(token)
    return token.encode() if spelled is None else spelled


def _metaspace_readers(step: Mapping[str, Any]) -> tuple[Piece, Piece | None, int]:
    mark = step["replacement"]

    def piece(token: str) -> bytes:
        return token.replace(mark, " ").encode()

    if step.get("prepend_scheme", "always") == "never":
        return piece, None, 0
    return piece, (lambda token: token.replace(mark, "").encode()), 0


def _wordpiece_readers(step: Mapping[str, Any]) -> tuple[Piece, Piece, int]:
    prefix, clean_up = step["prefix"], step["cleanup"]

    def cleaned(text: str) -> bytes:
        for rough, clean in _WORDPIECE_CLEAN_UP if clean_up else ():
            text = text.replace(rough, clean)
        return text.encode()

    def piece(token: str) -> bytes:
        continues = prefix and token.startswith(prefix)
        return cleaned(token.removeprefix(prefix) if continues else f" {token}")

    return piece, cleaned, 0


def _sequence_reader(
    definition: TokenizerDefinition, steps: list[Mapping[str, Any]]
) -> tuple[Piece, None, int]:
    """SentencePiece as sequences spell it: replacements, byte tokens, and a leading space."""
    replacements: list[tuple[str, str]] = []
    byte_tokens = False
    stripped_spaces = 0
    byte_level = False
    for step in steps:
        kind = step["type"]
        if kind == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "ByteFallback":
            byte_tokens = True
        elif kind == "ByteLevel":
            byte_level = True
        elif kind == "Strip" and step["content"] == " " and not step["stop"]:
            stripped_spaces += step["start"]
        elif kind != "Fuse":
            raise TokenizerLoadError(
                definition.source, f"decoder step {kind!r} is not supported as it is configured"
            )

    def piece(token: str) -> bytes:
        if byte_tokens and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(match[1])
        for pattern, content in replacements:
            token = token.replace(pattern, content)
        return _read_byte_level(token) if byte_level else token.encode()

    return piece, None, stripped_spaces
