"""The shape of a model, read from a HF config.json or from GGUF metadata."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from services.engine.core.layers.rotary import RopeConfig, RopeScaling
from services.engine.core.models.fields import Fields, read_json
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.gguf_model import GGUFModel

# No transformer comes near these; a file that claims more is damaged or hostile, and is refused
# before anything is sized by it. Their products stay within what a tensor's size can express.
_MAX_VOCAB = 1 << 24
_MAX_WIDTH = 1 << 22
_MAX_HEADS = 1 << 14
_MAX_HEAD_DIM = 1 << 12
_MAX_LAYERS = 4096
_MAX_CONTEXT_TOKENS = 1 << 30


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a model family needs to build itself, and the engine to size its KV cache."""

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()


def check_config(path: Path, config: ModelConfig) -> ModelConfig:
    """Return `config` unchanged; raise ModelFileError where its numbers cannot be a model's."""
    extents = {
        "num_layers": (config.num_layers, _MAX_LAYERS),
        "hidden_size": (config.hidden_size, _MAX_WIDTH),
        "intermediate_size": (config.intermediate_size, _MAX_WIDTH),
        "heads": (config.heads, _MAX_HEADS),
        "kv_heads": (config.kv_heads, _MAX_HEADS),
        "head_dim": (config.head_dim, _MAX_HEAD_DIM),
        "vocab_size": (config.vocab_size, _MAX_VOCAB),
        "max_context_tokens": (config.max_context_tokens, _MAX_CONTEXT_TOKENS),
        "rotary_dim": (config.rope.rotary_dim, config.head_dim),
    }
    for name, (value, most) in extents.items():
        if not 1 <= value <= most:
            raise ModelFileError(path, f"{value} is not between 1 and {most}", what=name)
    if config.heads % config.kv_heads:
        problem = f"{config.heads} heads do not divide into {config.kv_heads} KV heads"
        raise ModelFileError(path, problem, what="kv_heads")
    if not (math.isfinite(config.rms_norm_eps) and config.rms_norm_eps > 0):
        problem = f"{config.rms_norm_eps} is not a positive number"
        raise ModelFileError(path, problem, what="rms_norm_eps")
    if (unusable := _rope_problem(config.rope)) is not None:
        raise ModelFileError(path, unusable, what="rope")
    return config


def _rope_problem(rope: RopeConfig) -> str | None:
    numbers = (rope.factor, rope.low_freq_factor, rope.high_freq_factor, rope.beta_fast)
    optional = (rope.attention_factor, rope.mscale, rope.mscale_all_dim)
    known = [rope.theta, rope.beta_slow, *numbers, *(each for each in optional if each is not None)]
    if not all(math.isfinite(each) and each > 0 for each in known):
        return f"not all of {known} are positive numbers"
    if rope.theta <= 1:
        return f"a theta of {rope.theta} gives no frequencies"
    if rope.rotary_dim % 2 or (rope.scaling == "dynamic" and rope.rotary_dim == 2):
        return f"{rope.rotary_dim} dimensions cannot be rotated"
    if rope.scaling in ("dynamic", "llama3", "yarn") and rope.original_context_tokens < 1:
        return f"{rope.scaling} scaling needs the context length it was trained for"
    if rope.scaling == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        return "high_freq_factor is not above low_freq_factor"
    divisors = rope.divisors
    if divisors is not None:
        if len(divisors) != rope.rotary_dim // 2:
            return f"{len(divisors)} divisors do not fit {rope.rotary_dim // 2} frequencies"
        if not all(math.isfinite(each) and each > 0 for each in divisors):
            return "not all divisors of the frequencies are positive numbers"
    return None


def config_from_hf(directory: Path) -> ModelConfig:
    """Read config.json and, where there is one, generation_config.json.

    Raises ModelFileError for a file that is missing, no JSON, or without a needed number.
    """
    path = directory / "config.json"
    fields = Fields(path, read_json(path))
    architectures = fields.raw.get("architectures")
    if not (isinstance(architectures, list) and architectures):
        raise ModelFileError(path, "names no architecture", what="architectures")
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", hidden_size // max(heads, 1))
    bias = fields.flag("attention_bias")
    max_context_tokens = fields.integer("max_position_embeddings", 2048)
    generation_path = directory / "generation_config.json"
    generation = Fields(
        generation_path, read_json(generation_path) if generation_path.exists() else {}
    )
    config = ModelConfig(
        architecture=str(architectures[0]),
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size"),
        max_context_tokens=max_context_tokens,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=_rope_from_hf(fields, head_dim, max_context_tokens),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
        bos_token_id=next(iter(fields.token_ids("bos_token_id")), None),
        eos_token_ids=generation.token_ids("eos_token_id") or fields.token_ids("eos_token_id"),
    )
    return check_config(path, config)


def _rope_from_hf(fields: Fields, head_dim: int, max_context_tokens: int) -> RopeConfig:
    # `rope_parameters` is the newer name of `rope_scaling`, and holds theta as well.
    found = fields.raw.get("rope_parameters") or fields.raw.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ModelFileError(fields.path, "is not a table", what="rope_parameters")
    rope = Fields(fields.path, found)
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    kind = found.get("rope_type", found.get("type", "default"))
    rotary = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * rotary)
    if kind == "default":
        return RopeConfig(theta, rotary_dim)
    kinds: dict[str, RopeScaling] = {
        "linear": "linear",
        "dynamic": "dynamic",
        "llama3": "llama3",
        "yarn": "yarn",
    }
    if kind not in kinds:
        known = ", ".join(("default", *kinds))
        raise ModelFileError(
            fields.path, f"{kind!r} is not supported, only {known} are", what="rope_type"
        )
    return RopeConfig(
        theta,
        rotary_dim,
        scaling=kinds[kind],
        factor=rope.number("factor"),
        original_context_tokens=rope.integer(
            "original_max_position_embeddings", max_context_tokens
        ),
        low_freq_factor=rope.number("low_freq_factor", 1.0),
        high_freq_factor=rope.number("high_freq_factor", 4.0),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", default=True),
    )


def config_from_gguf(file: GGUFModel) -> ModelConfig:
    """Read the metadata of a Llama-family GGUF file.

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
    config = ModelConfig(
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
        rms_norm_eps=metadata.number(key("attention.layer_norm_rms_epsilon")),
        rope=_rope_from_gguf(file, architecture, head_dim, max_context_tokens),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        bos_token_id=metadata.integer(bos) if bos in metadata else None,
        eos_token_ids=tuple(
            dict.fromkeys(metadata.integer(end) for end in ends if end in metadata)
        ),
    )
    return check_config(path, config)


def _rope_from_gguf(
    file: GGUFModel, architecture: str, head_dim: int, max_context_tokens: int
) -> RopeConfig:
    metadata, prefix = file.metadata, f"{architecture}.rope"
    kind = metadata.string(f"{prefix}.scaling.type", "none")
    kinds: dict[str, RopeScaling] = {"none": "none", "linear": "linear", "yarn": "yarn"}
    if kind not in kinds:
        problem = f"{kind!r} is not supported, only {', '.join(kinds)} are"
        raise ModelFileError(file.path, problem, what=f"key '{prefix}.scaling.type'")
    factor = metadata.number(f"{prefix}.scaling.factor", 1.0)
    original = f"{prefix}.scaling.original_context_length"
    temperature = metadata.number(f"{prefix}.scaling.attn_factor", 1.0)
    return RopeConfig(
        theta=metadata.number(f"{prefix}.freq_base", 10_000.0),
        rotary_dim=metadata.integer(f"{prefix}.dimension_count", head_dim),
        scaling=kinds[kind],
        factor=factor,
        original_context_tokens=metadata.integer(original, max_context_tokens),
        # GGUF's factor multiplies YaRN's own temperature where HF's replaces it.
        attention_factor=temperature * (1.0 + 0.1 * math.log(max(factor, 1.0))),
        divisors=_read_divisors(file),
    )


def _read_divisors(file: GGUFModel) -> tuple[float, ...] | None:
    """Llama 3 scaling in GGUF: a tensor of divisors, one per frequency."""
    info = file.tensors.get("rope_freqs.weight")
    if info is None:
        return None
    if info.type.name != "F32" or len(info.shape) != 1:
        problem = f"is {info.type.name} {list(info.shape)}, not a vector of F32"
        raise ModelFileError(file.path, problem, what="tensor 'rope_freqs.weight'")
    return tuple(file.tensor_bytes(info.name).view("<f4").tolist())
