"""Small random models of every decoder family, as `transformers` makes and computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCAB_SIZE = 97
CONTEXT_TOKENS = 64
WINDOW = 8
COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
    "initializer_range": 0.3,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}
QWEN2 = {"use_sliding_window": False}
GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 40, "num_experts": 5}
ORIGINAL_CONTEXT_TOKENS = 16


def longrope(pairs: int) -> dict[str, Any]:
    """Of heads of so many pairs of dimensions."""
    return {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0 + index / 10 for index in range(pairs)],
        "long_factor": [2.0 + index for index in range(pairs)],
    }


# What a case is called, the class of its configuration, and what it has beside COMMON.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, windowed": ("Mistral", {"sliding_window": WINDOW}),
    "mistral, wide heads": ("Mistral", {"head_dim": 16, "sliding_window": None}),
    "qwen2": ("Qwen2", QWEN2),
    "qwen2, tied": ("Qwen2", {**QWEN2, "tie_word_embeddings": True}),
    "qwen2, windowed from a layer on": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", {"head_dim": 16}),
    "qwen3, windowed from a layer on": (
        "Qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "max_window_layers": 2,
        },
    ),
    "qwen3, biased": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3, windowed": ("Phi3", {"sliding_window": WINDOW}),
    "phi3, half rotated": ("Phi3", {"partial_rotary_factor": 0.5, "sliding_window": None}),
    "phi3, longrope": (
        "Phi3",
        {
            "rope_parameters": longrope(4),
            "original_max_position_embeddings": ORIGINAL_CONTEXT_TOKENS,
            "sliding_window": None,
        },
    ),
    "gemma2": ("Gemma2", GEMMA),
    "gemma2, capped softly": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 5.0}),
    "gemma2, capped hard": (
        "Gemma2",
        {
            **GEMMA,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma3": ("Gemma3Text", {**GEMMA, "num_hidden_layers": 7}),
    "gemma3, scaled": (
        "Gemma3Text",
        {
            **GEMMA,
            "num_hidden_layers": 7,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "gpt2": ("GPT2", {}),
    "gpt2, untied": ("GPT2", {"tie_word_embeddings": False, "n_inner": 72}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "mixtral, windowed": (
        "Mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW},
    ),
    "qwen3-moe, windowed": (
        "Qwen3Moe",
        {**EXPERTS, "head_dim": 16, "use_sliding_window": True, "sliding_window": WINDOW}
        | {"max_window_layers": 0},
    ),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3-moe, as it comes": (
        "Qwen3Moe",
        {**EXPERTS, "head_dim": 16, "norm_topk_prob": False, "mlp_only_layers": [1]},
    ),
}


# Of each family, the case that has most of what is its own.
FAMILIES = (
    "llama",
    "mistral, windowed",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3",
    "gpt2",
    "mixtral",
    "qwen3-moe",
)
# Sizes that the native kernels serve, and weights small enough for differences to stay small from
# layer to layer; what a family takes beside or in place of them, None for what it has not.
SERVED: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 160,
    "initializer_range": 0.1,
    "sharpness": 1.4,
}
_CHANGES: dict[str, dict[str, Any]] = {
    "phi3": {"head_dim": None},
    "gpt2": {"head_dim": None, "n_inner": 96},
    "qwen3-moe": {"moe_intermediate_size": 32},
    # A larger difference would send more rows to other experts.
    "mixtral": {"head_dim": None, "sharpness": 1.0},
}


def served(case: str, **changes: Any) -> dict[str, Any]:
    """What changes a case to SERVED, and more."""
    fields = SERVED | _CHANGES.get(case.split(",")[0], {}) | changes
    if case == "phi3, longrope":
        fields["rope_parameters"] = longrope(8)
    return {name: value for name, value in fields.items() if value is not None}


def make_model(case: str, *, sharpness: float = 1.0, **changes: Any) -> Any:
    """A model of a case with some changes, random and sure of itself.

    sharpness: factor on the weights of queries and keys. With small weights every token sees the
    average of all others, which would hide mistakes of attention.
    """
    kind, own = CASES[case]
    fields = {**COMMON, **own, **changes}
    if kind == "GPT2":
        renamed = {
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        }
        dropped = ("intermediate_size", "num_key_value_heads")
        fields = {renamed.get(k, k): v for k, v in fields.items() if k not in dropped}
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**fields)
    # With the sliding window of Mistral and others: without, not all masks hold to it.
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    # Biases and norms start as zeros and ones, which would hide mistakes with them.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
        _sharpen(model, sharpness)
    return model.eval()


def _sharpen(model: Any, factor: float) -> None:
    """Where queries and keys are normed, it changes nothing."""
    config = model.config
    for name, weight in model.named_parameters():
        module, kind = name.split(".")[-2:]
        if kind != "weight":
            continue
        if module in ("q_proj", "k_proj"):
            weight *= factor
        elif module == "qkv_proj":
            head_dim = config.hidden_size // config.num_attention_heads
            weight[: -config.num_key_value_heads * head_dim] *= factor
        elif module == "c_attn":
            weight[:, : 2 * config.hidden_size] *= factor


def save_model(case: str, directory: Path, **changes: Any) -> Any:
    """Write a model of a case as a HF directory; returns it."""
    model = make_model(case, **changes)
    model.save_pretrained(directory)
    return model
