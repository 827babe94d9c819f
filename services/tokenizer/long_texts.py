"""Cutting a long text where no token can lie across, so that its parts are encoded in parallel."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from services.runtime.tokenizerfiles.definition import steps_of
from services.runtime.tokenizerfiles.pretokenizers import PRE_TOKENIZER_KINDS

CHUNK_CHARS = 1 << 15
# The library works off a batch before it looks at the next; a round keeps every core busy and ends
# soon, so that other requests get their turn.
ROUND_CHARS = 2 * CHUNK_CHARS * (os.cpu_count() or 1)
# A word of ASCII letters ends, and after one space the next begins: every known pattern splits
# before that space, no normalizer changes characters across it, and a SentencePiece vocabulary has
# no token that goes on over it.
_CUT = re.compile(r"(?<=[A-Za-z]) (?=[A-Za-z])")


def can_be_cut(document: Mapping[str, Any]) -> bool:
    """Whether a tokenizer gives the same tokens for the parts as for the whole."""
    normalizers = steps_of(document.get("normalizer"), "normalizers")
    if document["model"]["type"] != "BPE" or any(step["type"] != "NFC" for step in normalizers):
        return False
    added = document.get("added_tokens") or []
    if any(_CUT.search(token["content"]) or token["lstrip"] or token["rstrip"] for token in added):
        return False
    steps = steps_of(document.get("pre_tokenizer"), "pretokenizers")
    if [step["type"] for step in steps] == ["Metaspace"]:
        return _words_stay_apart(document, steps[0]["replacement"])
    return _splits_into_words(steps)


def _words_stay_apart(document: Mapping[str, Any], space: str) -> bool:
    """Whether no token reaches from a word over the space behind it.

    A part begins with its space, so that the tokenizer puts no further one in front of it.
    """
    over_a_space = re.compile(f"[^{space}]{space}")
    added = {token["content"] for token in document.get("added_tokens") or []}
    vocabulary = document["model"]["vocab"]
    return space in vocabulary and not any(
        over_a_space.search(token) for token in vocabulary if token not in added
    )


def _splits_into_words(steps: Sequence[Mapping[str, Any]]) -> bool:
    known_patterns = {pattern for kind in PRE_TOKENIZER_KINDS.values() for pattern in kind.patterns}
    splits = False
    for step in steps:
        if step["type"] == "ByteLevel":
            if step["add_prefix_space"]:
                return False
            splits = splits or step["use_regex"]
        elif step["type"] == "Split":
            if step["pattern"].get("Regex") not in known_patterns:
                return False
            splits = True
        elif step["type"] != "Digits":
            return False
    return splits


def cut(text: str, chunk_chars: int = CHUNK_CHARS) -> list[str]:
    """Parts of about `chunk_chars` characters that together are the text."""
    parts: list[str] = []
    start = 0
    while len(text) - start > 2 * chunk_chars:
        # Where there is no safe place near by, the part grows until there is one.
        found = _CUT.search(text, start + chunk_chars)
        if found is None:
            break
        parts.append(text[start : found.start()])
        start = found.start()
    parts.append(text[start:])
    return parts


def in_rounds(texts: Sequence[str]) -> Iterator[list[str]]:
    """The texts in groups of about ROUND_CHARS characters, in order."""
    group: list[str] = []
    chars = 0
    for text in texts:
        if group and chars + len(text) > ROUND_CHARS:
            yield group
            group, chars = [], 0
        group.append(text)
        chars += len(text)
    if group:
        yield group
