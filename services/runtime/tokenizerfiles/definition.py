"""What a model's files say about its tokenizer, whatever format they come in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_TEMPLATE = "default"
TOOL_TEMPLATE = "tool_use"


@dataclass(frozen=True, slots=True)
class TokenizerDefinition:
    """A tokenizer in the notation of tokenizer.json and what belongs to it.

    Attributes:
        source: the file or directory it comes from.
        document: the content of tokenizer.json.
        bos_token_id: token that begins a sequence, if the model has one.
        eos_token_ids: tokens that end a sequence.
        chat_templates: Jinja sources by name; `default` is the one for most requests.
        special_tokens: variables such as `bos_token` that templates get.
    """

    source: Path
    document: dict[str, Any]
    bos_token_id: int | None = None
    eos_token_ids: Sequence[int] = ()
    chat_templates: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Kind of tokenizer, for example `byte-level-bpe`."""
        model = self.document["model"]
        if model["type"] == "BPE":
            return "byte-level-bpe" if uses_byte_level(self.document) else "sentencepiece-bpe"
        if model["type"] == "Unigram":
            return "sentencepiece-unigram"
        return str(model["type"]).lower()

    def revision(self) -> str:
        """Hash of all that decides how texts become token ids and back."""
        content = {
            "document": self.document,
            "bos": self.bos_token_id,
            "eos": list(self.eos_token_ids),
            "templates": dict(self.chat_templates),
        }
        canonical = json.dumps(content, sort_keys=True).encode()
        return hashlib.sha256(canonical).hexdigest()[:32]


def added_token(token_id: int, content: str, *, special: bool) -> dict[str, Any]:
    """An entry of `added_tokens`."""
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


def steps_of(component: Mapping[str, Any] | None, members: str) -> list[Mapping[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, sequences flattened."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [step for member in component[members] for step in steps_of(member, members)]


def uses_byte_level(document: Mapping[str, Any]) -> bool:
    """Whether tokens spell bytes in the alphabet of byte-level BPE."""
    pre_tokenizer = steps_of(document.get("pre_tokenizer"), "pretokenizers")
    normalizer = steps_of(document.get("normalizer"), "normalizers")
    return any(step["type"] == "ByteLevel" for step in (*pre_tokenizer, *normalizer))
