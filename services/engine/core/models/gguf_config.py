"""What the metadata of a GGUF file says of a decoder."""

from __future__ import annotations

import math

from services.engine.core.model_config import ModelConfig, RopeConfig, RopeScaling
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.gguf_model import GGUFModel

_SCALINGS: dict[str, RopeScaling] = {
    "none": "none",
    "linear": "linear",
    "yarn": "yarn",
    "longrope": "longrope",
}


def gguf_decoder_config(file: GGUFModel) -> ModelConfig:
    """What most decoders have in common.

    Raises ModelFileError for a key that is missing or of the wrong type.
    """
    metadata, path = file.metadata, file.path
    architecture = metadata.string("general.architecture")

    def key(suffix: str) -> str:
        return f"{architecture}.{suffix}"

    hidden_size = metadata.integer(key("embedding_length"))
    heads = metadata.integer(key("attention.head_count"))
    head_dim = metadata.integer(key("attention.key_length"), hidden_size // max(heads, 1))
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise ModelFileError(path, "is missing", what="tensor 'token_embd.weight'")
    max_context_tokens = metadata.integer(key("context_length"))
    end_keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    ends = [f"tokenizer.ggml.{name}" for name in end_keys]
    bos = "tokenizer.ggml.bos_token_id"
    eps = key("attention.layer_norm_rms_epsilon")
    return ModelConfig(
        architecture=architecture,
        num_layers=metadata.integer(key("block_count")),
        hidden_size=hidden_size,
        intermediate_size=metadata.integer(key("feed_forward_length")),
        heads=heads,
        kv_heads=metadata.integer(key("attention.head_count_kv"), heads),
        head_dim=head_dim,
        # The embedding decides: the metadata's own count is optional and not always right.
        vocab_size=embedding.shape[0],
        max_context_tokens=max_context_tokens,
        norm_eps=metadata.number(eps if eps in metadata else key("attention.layer_norm_epsilon")),
        rope=gguf_rope(file, architecture, head_dim, max_context_tokens),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors or "blk.0.attn_qkv.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_up.bias" in file.tensors,
        bos_token_id=metadata.integer(bos) if bos in metadata else None,
        eos_token_ids=tuple(
            dict.fromkeys(metadata.integer(end) for end in ends if end in metadata)
        ),
    )


def gguf_rope(
    file: GGUFModel, architecture: str, head_dim: int, max_context_tokens: int
) -> RopeConfig:
    """How positions become angles."""
    metadata, prefix = file.metadata, f"{architecture}.rope"
    long_divisors = _read_divisors(file, "rope_factors_long.weight")
    kind = "longrope" if long_divisors else metadata.string(f"{prefix}.scaling.type", "none")
    if kind not in _SCALINGS:
        problem = f"{kind!r} is not supported, only {', '.join(_SCALINGS)} are"
        raise ModelFileError(file.path, problem, what=f"key '{prefix}.scaling.type'")
    original = f"{prefix}.scaling.original_context_length"
    trained = metadata.integer(original, max_context_tokens)
    temperature = f"{prefix}.scaling.attn_factor"
    theta = metadata.number(f"{prefix}.freq_base", 10_000.0)
    rotary_dim = metadata.integer(f"{prefix}.dimension_count", head_dim)
    if kind == "longrope":
        return RopeConfig(
            theta,
            rotary_dim,
            scaling="longrope",
            factor=max_context_tokens / max(trained, 1),
            original_context_tokens=trained,
            attention_factor=metadata.number(temperature) if temperature in metadata else None,
            divisors=_read_divisors(file, "rope_factors_short.weight"),
            long_divisors=long_divisors,
        )
    factor = metadata.number(f"{prefix}.scaling.factor", 1.0)
    return RopeConfig(
        theta,
        rotary_dim,
        scaling=_SCALINGS[kind],
        factor=factor,
        original_context_tokens=trained,
        # GGUF's factor multiplies YaRN's own temperature where HF's replaces it.
        attention_factor=metadata.number(temperature, 1.0)
        * (1.0 + 0.1 * math.log(max(factor, 1.0))),
        # Llama 3 scaling in GGUF: a tensor of divisors, one per frequency.
        divisors=_read_divisors(file, "rope_freqs.weight"),
    )


def _read_divisors(file: GGUFModel, name: str) -> tuple[float, ...] | None:
    info = file.tensors.get(name)
    if info is None:
        return None
    if info.type.name != "F32" or len(info.shape) != 1:
        problem = f"is {info.type.name} {list(info.shape)}, not a vector of F32"
        raise ModelFileError(file.path, problem, what=f"tensor {name!r}")
    return tuple(file.tensor_bytes(info.name).view("<f4").tolist())
