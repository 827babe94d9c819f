"""Control tokens that no text can spell.

Inside this service a control token is not written `<|im_start|>` but by a name drawn at random when
the process starts. The tokenizer knows control tokens by those names alone, so text that spells
`<|im_start|>` is tokenized like any other text, whatever the model's algorithm is, and a prompt is
still tokenized in one piece, so that nothing changes at the joins of template and conversation.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping
from typing import Any

from services.tokenizer.traced_text import TracedText, runs_of


class ControlTokens:
    """The control tokens of one vocabulary and their secret names.

    Args:
        contents: token id to how templates write it.
    """

    def __init__(self, contents: Mapping[int, str]) -> None:
        self.contents = dict(contents)
        # Lower case and printable, so that no normalizer changes it; closed at its end, so that no
        # name is the beginning of another.
        secret = secrets.token_hex(16)
        self._names = {token_id: f"<{secret}:{token_id}>" for token_id in contents}
        self._name_of_content = {
            content: self._names[token_id] for token_id, content in self.contents.items()
        }
        # The longest token wins at each place, as in the `tokenizers` library.
        longest_first = sorted(self._name_of_content, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def hide(self, document: Mapping[str, Any]) -> dict[str, Any]:
        """A copy of a tokenizer.json in which the control tokens have their secret names."""
        hidden = {**document, "model": dict(document["model"])}
        hidden["added_tokens"] = [
            {**token, "content": self._names.get(token["id"], token["content"])}
            for token in document.get("added_tokens") or []
        ]
        model = hidden["model"]
        vocabulary = model["vocab"]
        if isinstance(vocabulary, dict):
            model["vocab"] = {
                self._names.get(token_id, token): token_id for token, token_id in vocabulary.items()
            }
        else:
            model["vocab"] = [
                [self._names.get(token_id, token), score]
                for token_id, (token, score) in enumerate(vocabulary)
            ]
        if model.get("unk_token") in self._name_of_content:
            model["unk_token"] = self._name_of_content[model["unk_token"]]
        if model.get("merges"):
            model["merges"] = [
                pair
                for pair in map(_split_merge, model["merges"])
                if not self._name_of_content.keys() & {pair[0], pair[1], pair[0] + pair[1]}
            ]
        return hidden

    def mark(self, rendered: TracedText) -> str:
        """A rendered prompt in which the template's own control tokens have their secret names.

        A control token counts only where the template wrote all of it.
        """
        parts: list[str] = []
        done = 0
        text = str(rendered)
        for start, end in runs_of(rendered):
            for match in self._pattern.finditer(text, start, end):
                parts += (text[done : match.start()], self._name_of_content[match[0]])
                done = match.end()
        parts.append(text[done:])
        return "".join(parts)

    def name(self, token_id: int) -> str:
        """The secret name of a control token."""
        return self._names[token_id]


def _split_merge(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right
