"""What checkpoints call a tensor, and what the model calls it: one table for all sources."""

from __future__ import annotations

import re

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
FROM_HF = {hf: model for model, hf, _ in _MODULES}
FROM_GGUF = {gguf: model for model, _, gguf in _MODULES}

# Tables of rotary frequencies: they follow from the configuration, which reads GGUF's own.
_DERIVED = re.compile(r"(^|\.)(rotary_emb\.inv_freq|rope_freqs\.weight|attn_rot_embd\.weight)$")
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


def model_name(name: str, table: dict[str, str]) -> str | None:
    """Return the model's name for a checkpoint's tensor, None where the table has none."""
    module, _, kind = name.rpartition(".")
    layer = _LAYER.search(module)
    known = table.get(_LAYER.sub("{}", module, count=1))
    if known is None or kind not in ("weight", "bias"):
        return None
    return f"{known.format(layer.group() if layer else '')}.{kind}"


def is_derived(name: str) -> bool:
    """Whether a checkpoint's tensor says nothing that the configuration does not."""
    return _DERIVED.search(name) is not None
