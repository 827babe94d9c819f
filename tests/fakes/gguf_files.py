"""GGUF files as conversion tools write them, from small models."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from services.engine.core.weights.names import FROM_GGUF, FROM_HF
from services.runtime.modelfiles.ggml_types import GGML_TYPES, GGMLType

# Of types that the `gguf` package cannot write: where a block's halves are, and numbers for them
# that make weights of about 0.1.
_HALVES = {
    "Q2_K": {80: 0.015, 82: 0.02},
    "Q3_K": {108: 0.002},
    "Q4_K": {0: 5e-4, 2: 35e-4},
    "Q5_K": {0: 25e-5, 2: 35e-4},
    "Q6_K": {208: 1e-4},
    "IQ4_NL": {0: 0.0015},
    "IQ4_XS": {0: 1e-4},
}
TYPES = {storage.name: storage for storage in GGML_TYPES.values()}


def random_blocks(storage: GGMLType, num_blocks: int, seed: int = 0) -> np.ndarray:
    """Blocks of any content whose weights are of a usual size, uint8 [num_blocks, block_bytes]."""
    random = np.random.default_rng(seed)
    raw = random.integers(0, 256, (num_blocks, storage.block_bytes), np.uint8)
    for at, size in _HALVES[storage.name].items():
        halves = (size * random.uniform(0.5, 1.5, (num_blocks, 1))).astype(np.float16)
        raw[:, at : at + 2] = halves.view(np.uint8)
    return raw


def stored(values: np.ndarray, kind: str, seed: int = 0) -> np.ndarray:
    """A matrix as a type stores it, uint8 [rows, bytes]: rounded where `gguf` can, else random."""
    if kind not in _HALVES:
        raw: np.ndarray = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
        return raw.view(np.uint8)
    storage = TYPES[kind]
    return random_blocks(storage, values.size // storage.block_elements, seed).reshape(
        values.shape[0], -1
    )


def write_gguf(
    model: Any,
    path: Path,
    kind: str | Callable[[str], str] = "F32",
    *,
    tensors_each: int = 0,
    **extra: np.ndarray,
) -> None:
    """Write a HF Llama as GGUF does: its own names, query and key rows in its own order.

    kind: of all matrices, or of each by its name in the file; the model is changed to what was
    written. tensors_each: of each part of a split file.
    """
    config = model.config
    to_gguf = {module: name for name, module in FROM_GGUF.items()}
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    writer = gguf.GGUFWriter(path, "llama", split_max_tensors=tensors_each)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_eos_token_id(2)
    for index, (hf_name, tensor) in enumerate(model.state_dict().items()):
        if hf_name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        module, _, suffix = hf_name.rpartition(".")
        layer = next((part for part in module.split(".") if part.isdigit()), "")
        template = module.replace(f".{layer}.", ".{}.") if layer else module
        name = f"{to_gguf[FROM_HF[template]].format(layer)}.{suffix}"
        values = tensor.detach().numpy().astype(np.float32)
        count = heads.get(module.rpartition(".")[2])
        if count is not None:
            halves = values.reshape(count, 2, -1, *values.shape[1:])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        if values.ndim == 1:
            writer.add_tensor(name, values)
            continue
        chosen = kind if isinstance(kind, str) else kind(name)
        qtype = gguf.GGMLQuantizationType[chosen]
        raw = stored(values, chosen, index)
        writer.add_tensor(name, raw, raw_dtype=qtype)
        written = gguf.quants.dequantize(raw, qtype)
        if count is not None:
            pairs = written.reshape(count, -1, 2, written.shape[1])
            written = pairs.swapaxes(1, 2).reshape(written.shape)
        with torch.no_grad():
            tensor.copy_(torch.from_numpy(written))
    for name, values in extra.items():
        writer.add_tensor(name.replace("__", "."), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
