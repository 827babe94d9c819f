"""The shape of a decoder: what a model family needs to build itself, wherever it was read from."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from services.runtime.modelfiles import ModelFileError

Activation: TypeAlias = Literal["silu", "gelu_tanh"]
RopeScaling: TypeAlias = Literal["none", "linear", "dynamic", "llama3", "yarn", "longrope"]

# No transformer comes near these; a file that claims more is damaged or hostile, and is refused
# before anything is sized by it. Their products stay within what a tensor's size can express.
_MAX_VOCAB = 1 << 24
_MAX_WIDTH = 1 << 22
_MAX_HEADS = 1 << 14
_MAX_HEAD_DIM = 1 << 12
_MAX_LAYERS = 4096
_MAX_EXPERTS = 1 << 14
_MAX_CONTEXT_TOKENS = 1 << 30


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How positions become angles. Lengths are in tokens; unused numbers keep their defaults.

    `original_context_tokens` is the context the frequencies were trained for. `divisors`, where
    given, divide each of the rotary_dim / 2 frequencies (GGUF's rope_freqs tensor, LongRoPE's short
    factors), and `long_divisors` do so in their place beyond that context (LongRoPE).
    """

    theta: float
    rotary_dim: int
    scaling: RopeScaling = "none"
    factor: float = 1.0
    original_context_tokens: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    divisors: tuple[float, ...] | None = None
    long_divisors: tuple[float, ...] | None = None


@dataclass(frozen=True, slots=True)
class ExpertsConfig:
    """A mixture of experts in place of feed-forward layers.

    Attributes:
        count: experts of a layer.
        per_token: how many of them each token is sent to.
        intermediate_size: of one expert.
        normalize: whether the weights of a token's experts are made to sum up to 1.
        dense_layers: those that have an ordinary feed-forward layer.
    """

    count: int
    per_token: int
    intermediate_size: int
    normalize: bool
    dense_layers: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class SparseAttention:
    """What a token sees in layers that would show it all: so many tokens back, itself included, and
    the first so many of the sequence (Beltagy et al., arXiv:2004.05150; Xiao et al.,
    arXiv:2309.17453).

    Raises ValueError for a window that holds no token, or fewer global tokens than none.
    """

    window: int
    global_tokens: int = 0

    def __post_init__(self) -> None:
        if self.window < 1 or self.global_tokens < 0:
            raise ValueError(f"{self} shows a token nothing")


# What a token sees: so many tokens back, its own included, or these and the first of the sequence.
Window: TypeAlias = int | SparseAttention


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a model family needs to build itself, and the engine to size its KV cache.

    Attributes:
        rope: how positions become angles; None where they are learned.
        learned_positions: how many of them there are, whatever context is served.
        local_rope: the same of layers with a window, where it is another.
        windows: of each layer, how many tokens back a token sees, itself included; None: all.
        sparse_attention: what those without a window show instead of all, where it is set.
        attention_scale: factor on the products of queries and keys. Default: head_dim ** -0.5.
        attention_softcap: bound that these products are bent towards, if any.
        logit_softcap: the same of the logits.
        embedding_scale: factor on embeddings.
    """

    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_context_tokens: int
    norm_eps: float
    rope: RopeConfig | None
    tie_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    learned_positions: int = 0
    local_rope: RopeConfig | None = None
    windows: tuple[int | None, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    embedding_scale: float = 1.0
    activation: Activation = "silu"
    qk_norm: bool = False
    experts: ExpertsConfig | None = None
    sparse_attention: SparseAttention | None = None

    def window(self, layer_index: int) -> int | None:
        """How many tokens back a token sees in a layer, itself included; None: all."""
        return self.windows[layer_index] if self.windows else None

    def seen(self, layer_index: int) -> Window | None:
        """What a token sees in a layer as it is served; None: all."""
        window = self.window(layer_index)
        return self.sparse_attention if window is None else window

    @property
    def scale(self) -> float:
        """Factor on the products of queries and keys."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale


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
    }
    if config.experts is not None:
        extents["experts"] = (config.experts.count, _MAX_EXPERTS)
        extents["experts of a token"] = (config.experts.per_token, config.experts.count)
        extents["expert intermediate_size"] = (config.experts.intermediate_size, _MAX_WIDTH)
    for rope in (config.rope, config.local_rope):
        if rope is not None:
            extents["rotary_dim"] = (rope.rotary_dim, config.head_dim)
            if (unusable := _rope_problem(rope)) is not None:
                raise ModelFileError(path, unusable, what="rope")
    for name, (value, most) in extents.items():
        if not 1 <= value <= most:
            raise ModelFileError(path, f"{value} is not between 1 and {most}", what=name)
    if config.heads % config.kv_heads:
        problem = f"{config.heads} heads do not divide into {config.kv_heads} KV heads"
        raise ModelFileError(path, problem, what="kv_heads")
    positive = {
        "norm_eps": config.norm_eps,
        "attention_scale": config.scale,
        "attention_softcap": config.attention_softcap,
        "logit_softcap": config.logit_softcap,
        "embedding_scale": config.embedding_scale,
    }
    for name, number in positive.items():
        if number is not None and not (math.isfinite(number) and number > 0):
            raise ModelFileError(path, f"{number} is not a positive number", what=name)
    if config.windows and len(config.windows) != config.num_layers:
        problem = f"{len(config.windows)} layers have one, of {config.num_layers}"
        raise ModelFileError(path, problem, what="windows")
    if not all(window is None or window >= 1 for window in config.windows):
        raise ModelFileError(path, "a window holds a token at least", what="windows")
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
    trained = rope.original_context_tokens
    if rope.scaling in ("dynamic", "llama3", "yarn", "longrope") and trained < 1:
        return f"{rope.scaling} scaling needs the context length it was trained for"
    if rope.scaling == "llama3" and rope.high_freq_factor <= rope.low_freq_factor:
        return "high_freq_factor is not above low_freq_factor"
    if rope.scaling == "longrope" and (rope.divisors is None or rope.long_divisors is None):
        return "longrope scaling needs its short and its long factors"
    for divisors in (rope.divisors, rope.long_divisors):
        if divisors is None:
            continue
        if len(divisors) != rope.rotary_dim // 2:
            return f"{len(divisors)} divisors do not fit {rope.rotary_dim // 2} frequencies"
        if not all(math.isfinite(each) and each > 0 for each in divisors):
            return "not all divisors of the frequencies are positive numbers"
    return None
