"""What the config.json of a HF directory says of a decoder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.engine.core.model_config import Activation, ModelConfig, RopeConfig, RopeScaling
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.fields import Fields, read_json

_ACTIVATIONS: dict[str, Activation] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
}
_SCALINGS: dict[str, RopeScaling] = {
    "default": "none",
    "linear": "linear",
    "dynamic": "dynamic",
    "llama3": "llama3",
    "yarn": "yarn",
    "longrope": "longrope",
    "su": "longrope",
}


@dataclass(frozen=True, slots=True)
class HfConfig:
    """The files config.json and, where there is one, generation_config.json.

    `model` holds the fields of the decoder, which a model that also sees images has in a table of
    their own.
    """

    architecture: str
    model: Fields
    generation: Fields

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a sequence, if there is one."""
        return next(iter(self.model.token_ids("bos_token_id")), None)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a sequence."""
        return self.generation.token_ids("eos_token_id") or self.model.token_ids("eos_token_id")


def read_hf_config(directory: Path) -> HfConfig:
    """Read them. Raises ModelFileError for what is missing, no JSON, or names no architecture."""
    path = directory / "config.json"
    raw = read_json(path)
    architectures = raw.get("architectures")
    if not (isinstance(architectures, list) and architectures):
        raise ModelFileError(path, "names no architecture", what="architectures")
    text = raw.get("text_config")
    generation_path = directory / "generation_config.json"
    return HfConfig(
        str(architectures[0]),
        Fields(path, {**raw, **text} if isinstance(text, dict) else raw),
        Fields(generation_path, read_json(generation_path) if generation_path.exists() else {}),
    )


def decoder_config(hf: HfConfig) -> ModelConfig:
    """What most decoders have in common. Raises ModelFileError without a needed number."""
    fields = hf.model
    hidden_size, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    head_dim = fields.integer("head_dim", hidden_size // max(heads, 1))
    bias = fields.flag("attention_bias")
    max_context_tokens = fields.integer("max_position_embeddings", 2048)
    return ModelConfig(
        architecture=hf.architecture,
        num_layers=fields.integer("num_hidden_layers"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        heads=heads,
        kv_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size"),
        max_context_tokens=max_context_tokens,
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope=rope_config(fields, head_dim, max_context_tokens),
        tie_embeddings=fields.flag("tie_word_embeddings"),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=fields.flag("mlp_bias"),
        activation=activation(fields),
        windows=windows(fields),
        bos_token_id=hf.bos_token_id,
        eos_token_ids=hf.eos_token_ids,
    )


def activation(fields: Fields) -> Activation:
    """That of feed-forward layers."""
    for name in ("hidden_activation", "hidden_act", "activation_function"):
        if fields.raw.get(name) is not None:
            found = fields.text(name)
            if found not in _ACTIVATIONS:
                problem = f"{found!r} is not supported, only {', '.join(_ACTIVATIONS)} are"
                raise ModelFileError(fields.path, problem, what=name)
            return _ACTIVATIONS[found]
    return "silu"


def windows(fields: Fields) -> tuple[int | None, ...]:
    """How far back each layer sees; empty where all see everything.

    A sliding window concerns the layers that `layer_types` names; where that is absent, all of
    them, unless the window is switched off or begins at a layer.
    """
    window = fields.raw.get("sliding_window")
    if window is None or not fields.flag("use_sliding_window", default=True):
        return ()
    size, num_layers = fields.integer("sliding_window"), fields.integer("num_hidden_layers")
    types = fields.raw.get("layer_types")
    if isinstance(types, list):
        return tuple(size if kind == "sliding_attention" else None for kind in types)
    first = fields.integer("max_window_layers", 0) if "use_sliding_window" in fields.raw else 0
    return tuple(size if index >= first else None for index in range(num_layers))


def rope_config(fields: Fields, head_dim: int, max_context_tokens: int) -> RopeConfig:
    """How positions become angles."""
    # `rope_parameters` is the newer name of `rope_scaling`, and holds theta as well.
    found = fields.raw.get("rope_parameters") or fields.raw.get("rope_scaling") or {}
    if not isinstance(found, dict):
        raise ModelFileError(fields.path, "is not a table", what="rope_parameters")
    return rope_of(fields, Fields(fields.path, found), head_dim, max_context_tokens)


def rope_of(fields: Fields, rope: Fields, head_dim: int, max_context_tokens: int) -> RopeConfig:
    """The same from a table of its own; what it lacks is looked for in the fields of the model."""
    theta = rope.number("rope_theta", fields.number("rope_theta", 10_000.0))
    kind = str(rope.raw.get("rope_type", rope.raw.get("type", "default")))
    rotary = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * rotary)
    if kind not in _SCALINGS:
        problem = f"{kind!r} is not supported, only {', '.join(_SCALINGS)} are"
        raise ModelFileError(fields.path, problem, what="rope_type")
    scaling = _SCALINGS[kind]
    if scaling == "none":
        return RopeConfig(theta, rotary_dim)
    original = rope.integer(
        "original_max_position_embeddings",
        fields.integer("original_max_position_embeddings", max_context_tokens),
    )
    if scaling == "longrope":
        return RopeConfig(
            theta,
            rotary_dim,
            scaling=scaling,
            factor=rope.number("factor", max_context_tokens / max(original, 1)),
            original_context_tokens=original,
            attention_factor=rope.optional_number("attention_factor"),
            divisors=rope.numbers("short_factor"),
            long_divisors=rope.numbers("long_factor"),
        )
    return RopeConfig(
        theta,
        rotary_dim,
        scaling=scaling,
        factor=rope.number("factor"),
        original_context_tokens=original,
        low_freq_factor=rope.number("low_freq_factor", 1.0),
        high_freq_factor=rope.number("high_freq_factor", 4.0),
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.flag("truncate", default=True),
    )
