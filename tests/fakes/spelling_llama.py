"""A small random model whose tokens spell bytes, and what they spell."""

from __future__ import annotations

import json
from pathlib import Path

from services.runtime.tokenizerfiles.byte_alphabet import BYTE_OF_CHARACTER
from tests.fakes.small_llama import save_small_llama

EOS_TOKEN_ID = 2
_SPECIAL = ("<unk>", "<s>", "</s>")
_LONGER = (
    *('{"', '":', '",', '"}', '":"', '","', "[]", "{}", "}}", "]}", "],", '["', "\n\n", "    "),
    *("true", "false", "null", "tr", "ue", "nu", "ll", "al", "se", "12", "00", "-1", "2024", "e+"),
    *("ab", "abc", "bc", "a b", "AB", "AB-", "xy", "x_", '{"a', '{"name', "name", '"b', "é", "né"),
)
PIECES: list[bytes] = [
    *(name.encode() for name in _SPECIAL),
    *(bytes([value]) for value in range(256)),
    *(text.encode() for text in _LONGER),
    "日本".encode()[:4],  # a character and a part of one
]
VOCAB_SIZE = 320  # more than there are tokens


def save_spelling_llama(path: Path) -> None:
    """A checkpoint of the Hugging Face layout, tokenizer included."""
    save_small_llama(path, VOCAB_SIZE)
    save_spelling_tokenizer(path)


def save_spelling_tokenizer(path: Path) -> None:
    """The tokenizer of a model of VOCAB_SIZE tokens."""
    alphabet = {value: character for character, value in BYTE_OF_CHARACTER.items()}
    vocabulary = {
        (name if number < len(_SPECIAL) else "".join(alphabet[value] for value in piece)): number
        for number, (name, piece) in enumerate(
            zip([*_SPECIAL, *[""] * (len(PIECES) - len(_SPECIAL))], PIECES, strict=True)
        )
    }
    added = [
        {"id": number, "content": name, "special": True, "normalized": False}
        | {"single_word": False, "lstrip": False, "rstrip": False}
        for number, name in enumerate(_SPECIAL)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    document = {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {**byte_level, "use_regex": True},
        "post_processor": None,
        "decoder": {**byte_level, "use_regex": True},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (path / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    config = {"eos_token": "</s>", "bos_token": "<s>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def spelled(token_ids: list[int]) -> bytes:
    """The text that tokens spell; an end of sequence is none."""
    return b"".join(PIECES[each] for each in token_ids if each >= len(_SPECIAL))


def tokens_of(text: str) -> list[int]:
    """One token for each byte."""
    return [len(_SPECIAL) + value for value in text.encode()]
