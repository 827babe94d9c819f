"""What checkpoints call a tensor, and what the model calls it."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

# How a stored tensor becomes the model's: as it is, with rows for columns, or with 1 added.
Treatment: TypeAlias = Literal["as stored", "transposed", "plus one"]


def _as_stored(name: str) -> Treatment:
    return "as stored"


@dataclass(frozen=True, slots=True)
class Names:
    """What a model calls the tensors of a checkpoint.

    Attributes:
        of: the model's name for a stored tensor's, None where the model has none of this name.
        is_needless: of those, whether nothing is missed without it.
        treatment: what becomes of a stored tensor, by the model's name.
    """

    of: Callable[[str], str | None]
    is_needless: Callable[[str], bool]
    treatment: Callable[[str], Treatment] = _as_stored


# Model module, Hugging Face module, GGUF module; {} stands for the layer number.
_MODULES = (
    ("embedding", "model.embed_tokens", "token_embd"),
    ("norm", "model.norm", "output_norm"),
    ("head", "lm_head", "output"),
    ("layers.{}.attention_norm", "model.layers.{}.input_layernorm", "blk.{}.attn_norm"),
    ("layers.{}.attention.q", "model.layers.{}.self_attn.q_proj", "blk.{}.attn_q"),
    ("layers.{}.attention.k", "model.layers.{}.self_attn.k_proj", "blk.{}.attn_k"),
    ("layers.{}.attention.v", "model.layers.{}.self_attn.v_proj", "blk.{}.attn_v"),
    ("layers.{}.attention.output", "model.layers.{}.self_attn.o_proj", "blk.{}.attn_output"),
    ("layers.{}.feed_forward_norm", "model.layers.{}.post_attention_layernorm", "blk.{}.ffn_norm"),
    ("layers.{}.feed_forward.gate", "model.layers.{}.mlp.gate_proj", "blk.{}.ffn_gate"),
    ("layers.{}.feed_forward.up", "model.layers.{}.mlp.up_proj", "blk.{}.ffn_up"),
    ("layers.{}.feed_forward.down", "model.layers.{}.mlp.down_proj", "blk.{}.ffn_down"),
)
# What most decoders share; a family adds what it has beside or calls otherwise.
FROM_HF = {hf: model for model, hf, _ in _MODULES}
FROM_GGUF = {gguf: model for model, _, gguf in _MODULES}

# Tables of rotary frequencies, and masks: they follow from the configuration, which reads those of
# GGUF.
_DERIVED = re.compile(
    r"(^|\.)(rotary_emb\.inv_freq|rope_(freqs|factors_long|factors_short)\.weight"
    r"|attn_rot_embd\.weight|attn\.(masked_)?bias)$"
)
# How a cache of eight bits is to round keys and values: the engine's has its own scales, or none.
_OF_CACHE = re.compile(r"\.[qkv]_scale$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def model_name(name: str, table: Mapping[str, str]) -> str | None:
    """Return the model's name for a checkpoint's tensor, None where the table has none.

    The numbers in a name, of its layer and its expert, take the places of {} in the model's.
    """
    module, _, kind = name.rpartition(".")
    # Between dots as numbers inside a name are, also where one stands last.
    dotted = f"{module}."
    known = table.get(_NUMBER.sub("{}", dotted)[:-1])
    if known is None or kind not in ("weight", "bias"):
        return None
    return f"{known.format(*_NUMBER.findall(dotted))}.{kind}"


def is_derived(name: str) -> bool:
    """Whether a checkpoint's tensor says nothing that the configuration does not."""
    return _DERIVED.search(name) is not None


def decoder_names(
    table: Mapping[str, str],
    *,
    drop: Collection[str] = (),
    needless: Collection[str] = (),
    treatment: Callable[[str], Treatment] = _as_stored,
) -> Names:
    """Names by a table.

    drop: prefixes that a checkpoint may put before all names. needless: prefixes of tensors that
    belong to parts which are not served, such as the image encoder beside a decoder.
    """

    def of(source: str) -> str | None:
        for prefix in drop:
            if source.startswith(prefix):
                source = source.removeprefix(prefix)
                break
        return model_name(source, table)

    def is_needless(source: str) -> bool:
        if is_derived(source) or _OF_CACHE.search(source) is not None:
            return True
        return source.startswith(tuple(needless))

    return Names(of, is_needless, treatment)
