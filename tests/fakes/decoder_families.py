"""Small random models of every decoder family, as `transformers` makes and computes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from safetensors.numpy import load_file

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
ROPE_PAIRS = 4  # of heads of 8 dimensions
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0 + index / 10 for index in range(ROPE_PAIRS)],
    "long_factor": [2.0 + index for index in range(ROPE_PAIRS)],
    "original_max_position_embeddings": 16,
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
    "qwen3, biased": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "phi3": ("Phi3", {"sliding_window": None}),
    "phi3, windowed": ("Phi3", {"sliding_window": WINDOW}),
    "phi3, half rotated": ("Phi3", {"partial_rotary_factor": 0.5, "sliding_window": None}),
    "phi3, longrope": ("Phi3", {"rope_parameters": LONGROPE, "sliding_window": None}),
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
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 16, "norm_topk_prob": True}),
    "qwen3-moe, as it comes": (
        "Qwen3Moe",
        {**EXPERTS, "head_dim": 16, "norm_topk_prob": False, "mlp_only_layers": [1]},
    ),
}


def make_model(case: str, **changes: Any) -> Any:
    """A model of a case with some changes, random and sure of itself."""
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
    return model.eval()


def save_model(case: str, directory: Path, **changes: Any) -> Any:
    """Write a model of a case as a HF directory; returns it."""
    model = make_model(case, **changes)
    model.save_pretrained(directory)
    return model


# GGUF's architecture of a case, where a GGUF file says all that its configuration does.
IN_GGUF = {
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "qwen2": "qwen2",
    "qwen2, tied": "qwen2",
    "qwen3": "qwen3",
    "qwen3-moe": "qwen3moe",
    "phi3": "phi3",
    "phi3, windowed": "phi3",
    "phi3, half rotated": "phi3",
    "phi3, longrope": "phi3",
    "gemma2": "gemma2",
    "gemma2, capped softly": "gemma2",
    "gemma3": "gemma3",
    "gpt2": "gpt2",
}
_PARTS_OF_EXPERTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


def save_gguf(directory: Path, case: str, path: Path) -> None:
    """Write a saved model as GGUF converters do, by the `gguf` package's own table of names."""
    architecture = IN_GGUF[case]
    config = transformers.AutoConfig.from_pretrained(directory)
    writer = gguf.GGUFWriter(path, architecture)
    _write_metadata(writer, config)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    for source, values in _stacked(load_file(directory / "model.safetensors")).items():
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        assert name is not None, source
        writer.add_tensor(name, _converted(architecture, config, source, values))
    rope = getattr(config, "rope_parameters", None) or {}
    for length in ("short", "long"):
        if f"{length}_factor" in rope:
            factors = np.array(rope[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_metadata(writer: gguf.GGUFWriter, config: Any) -> None:
    def field(name: str, default: Any = None) -> Any:
        value = getattr(config, name, None)
        return default if value is None else value

    heads = config.num_attention_heads
    head_dim = field("head_dim", config.hidden_size // heads)
    rope = field("rope_parameters", {})
    full = rope.get("full_attention", rope)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(field("intermediate_size", 4 * config.hidden_size))
    writer.add_head_count(heads)
    writer.add_head_count_kv(field("num_key_value_heads", heads))
    writer.add_key_length(head_dim)
    if hasattr(config, "layer_norm_epsilon"):
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(full["rope_theta"])
        writer.add_rope_dimension_count(int(head_dim * full.get("partial_rotary_factor", 1)))
    if "original_max_position_embeddings" in full:
        writer.add_rope_scaling_orig_ctx_len(full["original_max_position_embeddings"])
    if field("sliding_window"):
        writer.add_sliding_window(config.sliding_window)
    if field("attn_logit_softcapping"):
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
    if field("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if experts := field("num_local_experts", field("num_experts", 0)):
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        if field("moe_intermediate_size"):
            writer.add_expert_feed_forward_length(config.moe_intermediate_size)


def _stacked(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """With the matrices of a layer's experts as one."""
    stacks: dict[str, dict[int, np.ndarray]] = {}
    others = {}
    for name, values in tensors.items():
        head, found, rest = name.partition(".experts.")
        if not found:
            others[name] = values
            continue
        number, part, _ = rest.split(".")
        head = head.replace("block_sparse_moe", "mlp")
        whole = f"{head}.experts.{_PARTS_OF_EXPERTS.get(part, part)}.weight"
        stacks.setdefault(whole, {})[int(number)] = values
    return others | {
        name: np.stack([parts[index] for index in range(len(parts))])
        for name, parts in stacks.items()
    }


def _converted(architecture: str, config: Any, source: str, values: np.ndarray) -> np.ndarray:
    """A tensor as a converter writes it."""
    heads = {"q_proj": config.num_attention_heads}
    heads["k_proj"] = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    module = source.split(".")[-2]
    if architecture == "llama" and module in heads:
        halves = values.reshape(heads[module], 2, -1, *values.shape[1:])
        values = halves.swapaxes(1, 2).reshape(values.shape)
    if architecture.startswith("gemma") and source.endswith("norm.weight"):
        values = values + 1
    if architecture == "gpt2" and module.startswith("c_") and source.endswith(".weight"):
        values = values.T
    return np.ascontiguousarray(values, np.float32)
