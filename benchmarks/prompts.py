"""Prompts of real English text, the same on every machine and all different."""

from __future__ import annotations

from pathlib import Path

from services.runtime.modelfiles import locate
from services.tokenizer.model_tokenizer import load_model_tokenizer

ROOT = Path(__file__).parent.parent
SOURCES = ("LICENSE", "docs/configuration.md", "docs/safety.md", "docs/cli.md", "docs/client.md")


def english_prompts(model: str, count: int, tokens: int) -> list[list[int]]:
    """`count` prompts of exactly `tokens` tokens of the project's own prose, as token ids.

    Raises ValueError when the prose is too short for that many different prompts.
    """
    text = "\n".join((ROOT / source).read_text(encoding="utf-8") for source in SOURCES)
    ids = list(load_model_tokenizer(locate(model)).encode(text).token_ids)
    stride = (len(ids) - tokens) // max(1, count)
    if stride < 1:
        raise ValueError(f"{len(ids)} tokens of prose do not give {count} prompts of {tokens}")
    return [ids[start : start + tokens] for start in range(0, stride * count, stride)]
