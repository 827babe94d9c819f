"""What the tensors of a model are for, by their names, and what each kind is stored as."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from services.runtime.modelfiles.gguf_model import GGUFModel
from services.runtime.modelfiles.safetensors_file import read_header

# The first that fits, for names of HF checkpoints and GGUF files alike.
_KINDS = (
    ("norms", re.compile(r"norm|(^|\.)ln_\w+\.|layernorm", re.IGNORECASE)),
    ("embedding", re.compile(r"embed|(^|\.)wte\.|(^|\.)wpe\.|token_embd|position_embd")),
    ("experts", re.compile(r"expert|ffn_\w+_exps|block_sparse_moe")),
    ("attention", re.compile(r"attn|attention")),
    ("feed-forward", re.compile(r"mlp|ffn|feed_forward|intermediate|\.output\.dense")),
    ("head", re.compile(r"^lm_head\.|^output\.|^classifier\.|^score\.|^cls\.|^head\.")),
)


def kind_of(name: str) -> str:
    """What a tensor is for, by the name that a checkpoint gives it; `other` where none says."""
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


def stored_types(path: Path) -> dict[str, dict[str, int]]:
    """Return the numbers stored for each kind of tensor, by their type.

    Of weights packed into words, the words count. Raises ModelFileError as `describe` does.
    """
    totals: dict[str, Counter[str]] = {}
    for name, dtype, count in _tensors(path):
        totals.setdefault(kind_of(name), Counter())[dtype] += count
    return {
        kind: dict(totals[kind].most_common())
        for kind in (*(kind for kind, _ in _KINDS), "other")
        if kind in totals
    }


def _tensors(path: Path) -> list[tuple[str, str, int]]:
    if path.is_dir():
        return [
            (name, entry.dtype, entry.num_elements)
            for file in sorted(path.glob("*.safetensors"))
            for name, entry in read_header(file).items()
        ]
    with GGUFModel(path) as file:
        return [(name, info.type.name, info.num_elements) for name, info in file.tensors.items()]
