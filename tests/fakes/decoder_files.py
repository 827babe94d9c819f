"""Small models of every decoder family in the formats that other tools write."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import transformers
from safetensors.numpy import load_file, save_file

from tests.fakes.gguf_files import stored

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


# What tools leave in F32.
_KEPT = ("position_embd.weight", "ffn_gate_inp.weight")


def save_gguf(directory: Path, case: str, path: Path, kinds: Sequence[str] = ("F32",)) -> None:
    """Write a saved model as GGUF converters do, by the `gguf` package's own table of names.

    kinds: the types of its matrices, one after the other and over again. The saved model is changed
    to what was written.
    """
    architecture = IN_GGUF[case]
    config = transformers.AutoConfig.from_pretrained(directory)
    writer = gguf.GGUFWriter(path, architecture)
    _write_metadata(writer, config)
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config.num_hidden_layers)
    tensors = load_file(directory / "model.safetensors")
    types = itertools.cycle(kinds)
    for index, (source, members) in enumerate(_stacks(tensors).items()):
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        assert name is not None, source
        values = np.stack([tensors[each] for each in members])
        is_stack = ".experts." in source
        converted = _converted(architecture, config, source, values if is_stack else values[0])
        if converted.ndim < 2 or name.endswith(_KEPT):
            writer.add_tensor(name, converted)
            continue
        chosen = next(types)
        qtype = gguf.GGMLQuantizationType[chosen]
        raw = stored(converted.reshape(-1, converted.shape[-1]), chosen, index)
        raw = raw.reshape(*converted.shape[:-1], -1)
        writer.add_tensor(name, raw, raw_dtype=qtype)
        written = gguf.quants.dequantize(raw, qtype).reshape(converted.shape)
        written = _restored(architecture, config, source, written)
        tensors |= dict(zip(members, written if is_stack else [written], strict=True))
    rope = getattr(config, "rope_parameters", None) or {}
    for length in ("short", "long"):
        if f"{length}_factor" in rope:
            factors = np.array(rope[f"{length}_factor"], np.float32)
            writer.add_tensor(f"rope_factors_{length}.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if any(kind != "F32" for kind in kinds):
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


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
    width = field("n_inner", 4 * config.hidden_size)
    writer.add_feed_forward_length(field("intermediate_size", width))
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


def _stacks(tensors: Mapping[str, np.ndarray]) -> dict[str, list[str]]:
    """The tensors that each of a converter's is made of: a layer's experts are one."""
    found: dict[str, dict[int, str]] = {}
    for source in tensors:
        head, has_experts, rest = source.partition(".experts.")
        if not has_experts:
            found[source] = {0: source}
            continue
        number, part, _ = rest.split(".")
        head = head.replace("block_sparse_moe", "mlp")
        whole = f"{head}.experts.{_PARTS_OF_EXPERTS.get(part, part)}.weight"
        found.setdefault(whole, {})[int(number)] = source
    return {whole: [parts[index] for index in range(len(parts))] for whole, parts in found.items()}


def _converted(architecture: str, config: Any, source: str, values: np.ndarray) -> np.ndarray:
    """A tensor as a converter writes it."""
    heads = _paired_heads(architecture, config, source)
    if heads:
        halves = values.reshape(heads, 2, -1, *values.shape[1:])
        values = halves.swapaxes(1, 2).reshape(values.shape)
    if architecture.startswith("gemma") and source.endswith("norm.weight"):
        values = values + 1
    if _is_transposed(architecture, source):
        values = values.T
    return np.ascontiguousarray(values, np.float32)


def _restored(architecture: str, config: Any, source: str, values: np.ndarray) -> np.ndarray:
    """A matrix as it was before a converter wrote it."""
    heads = _paired_heads(architecture, config, source)
    if heads:
        pairs = values.reshape(heads, -1, 2, *values.shape[1:])
        values = pairs.swapaxes(1, 2).reshape(values.shape)
    return np.ascontiguousarray(values.T if _is_transposed(architecture, source) else values)


def _paired_heads(architecture: str, config: Any, source: str) -> int:
    """The heads whose rows a converter brings into pairs; 0: none."""
    module = source.split(".")[-2]
    if architecture != "llama" or module not in ("q_proj", "k_proj"):
        return 0
    heads = config.num_attention_heads
    return heads if module == "q_proj" else getattr(config, "num_key_value_heads", heads)


def _is_transposed(architecture: str, source: str) -> bool:
    module, kind = source.split(".")[-2:]
    return architecture == "gpt2" and module.startswith("c_") and kind == "weight"
