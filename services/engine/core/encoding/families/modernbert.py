"""ModernBERT: rotary positions, gated feed-forward layers, and local attention in most layers.

Warner et al., arXiv:2412.13663.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from services.engine.core.encoding.batch import EncoderBatch
from services.engine.core.encoding.config import EncoderConfig, read_activation, read_common
from services.engine.core.encoding.heads import ClassificationHead
from services.engine.core.encoding.layers import ACTIVATIONS, LayerNorm
from services.engine.core.encoding.model import Encoder
from services.engine.core.encoding.pooling import Pooling
from services.engine.core.kernels import rotary_embedding
from services.engine.core.kernels.cpu.encoder_program import EncoderBuffer, EncoderProgramBuilder
from services.engine.core.kernels.cpu.program import Epilogue, rotary_tables
from services.engine.core.kernels.encoder_attention import encoder_attention
from services.engine.core.layers import Embedding, Linear, RotaryEmbedding
from services.engine.core.model_config import RopeConfig
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.fields import Fields

_LAYER_TYPES = ("full_attention", "sliding_attention")
_POOLINGS: dict[str, Pooling] = {"cls": "first", "mean": "mean"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModernBertConfig(EncoderConfig):
    """`is_local` says of each layer whether its tokens see only those at most `window` away."""

    is_local: tuple[bool, ...]
    window: int
    global_theta: float
    local_theta: float
    norm_bias: bool
    attention_bias: bool
    mlp_bias: bool
    head_pooling: Pooling
    head_activation: str
    head_bias: bool


class ModernBertLayer(nn.Module):
    """Attention and feed-forward, each behind a norm, both adding to the residual stream."""

    def __init__(self, config: ModernBertConfig, index: int) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.norm_eps
        self.heads, self.head_dim = config.heads, config.head_dim
        self.is_local = config.is_local[index]
        self.window = config.window if self.is_local else None
        self.activation = config.activation
        # The embeddings are normalised, and the first layer takes them as they are.
        self.attention_norm = LayerNorm(size, eps, bias=config.norm_bias) if index else None
        self.qkv = Linear(size, 3 * size, bias=config.attention_bias)
        self.output = Linear(size, size, bias=config.attention_bias)
        self.feed_forward_norm = LayerNorm(size, eps, bias=config.norm_bias)
        # Halves: what is activated, and what it is multiplied by.
        self.gate_up = Linear(size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = Linear(config.intermediate_size, size, bias=config.mlp_bias)

    def forward(
        self, hidden: Tensor, batch: EncoderBatch, angles: dict[bool, tuple[Tensor, Tensor]]
    ) -> Tensor:
        normed = hidden if self.attention_norm is None else self.attention_norm(hidden)
        heads = self.qkv(normed).view(len(hidden), -1, self.head_dim)
        rotated = rotary_embedding(heads[:, : 2 * self.heads], *angles[self.is_local])
        attended = encoder_attention(
            rotated[:, : self.heads],
            rotated[:, self.heads :],
            heads[:, 2 * self.heads :],
            batch.groups,
            self.head_dim**-0.5,
            self.window,
        )
        hidden = hidden + self.output(attended.flatten(1))
        gate, up = self.gate_up(self.feed_forward_norm(hidden)).chunk(2, dim=-1)
        added: Tensor = hidden + self.down(ACTIVATIONS[self.activation](gate) * up)
        return added


class ModernBert(Encoder):
    """A ModernBERT encoder."""

    PREFIX = "model"
    NAMES: ClassVar = {
        "embeddings.tok_embeddings": "embedding",
        "embeddings.norm": "embedding_norm",
        "layers.{}.attn_norm": "layers.{}.attention_norm",
        "layers.{}.attn.Wqkv": "layers.{}.qkv",
        "layers.{}.attn.Wo": "layers.{}.output",
        "layers.{}.mlp_norm": "layers.{}.feed_forward_norm",
        "layers.{}.mlp.Wi": "layers.{}.gate_up",
        "layers.{}.mlp.Wo": "layers.{}.down",
        "final_norm": "norm",
    }
    HEAD_NAMES: ClassVar = {
        "head.dense": "head.dense",
        "head.norm": "head.norm",
        "classifier": "head.output",
    }
    config: ModernBertConfig

    def __init__(self, config: ModernBertConfig) -> None:
        super().__init__(config)
        size, eps = config.hidden_size, config.norm_eps
        self.embedding = Embedding(config.vocab_size, size)
        self.embedding_norm = LayerNorm(size, eps, bias=config.norm_bias)
        self.layers = nn.ModuleList(
            ModernBertLayer(config, index) for index in range(config.num_layers)
        )
        self.norm = LayerNorm(size, eps, bias=config.norm_bias)
        self.rotary = {
            is_local: RotaryEmbedding(RopeConfig(theta, config.head_dim), config.positions)
            for is_local, theta in ((False, config.global_theta), (True, config.local_theta))
        }
        if config.labels:
            self.head = ClassificationHead(
                size,
                len(config.labels),
                pooling=config.head_pooling,
                activation=config.head_activation,
                dense_bias=config.head_bias,
                norm=LayerNorm(size, eps, bias=config.norm_bias),
            )

    @classmethod
    def read_config(cls, fields: Fields) -> ModernBertConfig:
        common = read_common(fields, norm_eps="norm_eps", activation="hidden_activation")
        pooling = fields.text("classifier_pooling", "cls")
        if pooling not in _POOLINGS:
            raise ModelFileError(
                fields.path, f"{pooling!r} is not cls or mean", what="classifier_pooling"
            )
        if common["hidden_size"] // common["heads"] % 2:
            raise ModelFileError(fields.path, "gives heads that cannot be rotated", what="heads")
        return ModernBertConfig(
            **common,
            is_local=_local_layers(fields, common["num_layers"]),
            window=_window(fields),
            global_theta=_theta(fields, "full_attention", "global_rope_theta", 160_000.0),
            local_theta=_theta(fields, "sliding_attention", "local_rope_theta", 10_000.0),
            norm_bias=fields.flag("norm_bias"),
            attention_bias=fields.flag("attention_bias"),
            mlp_bias=fields.flag("mlp_bias"),
            head_pooling=_POOLINGS[pooling],
            head_activation=read_activation(fields, "classifier_activation"),
            head_bias=fields.flag("classifier_bias"),
        )

    @torch.inference_mode()
    def encode(self, batch: EncoderBatch) -> Tensor:
        hidden: Tensor = self.embedding_norm(self.embedding(batch.token_ids))
        angles = {
            is_local: rotary.angles(batch.positions, hidden.dtype)
            for is_local, rotary in self.rotary.items()
        }
        for layer in self.layers:
            hidden = layer(hidden, batch, angles)
        normed: Tensor = self.norm(hidden)
        return normed

    def lower(self, program: EncoderProgramBuilder) -> None:
        angles = {
            is_local: rotary_tables(rotary.frequencies, rotary.amplitude, self.config.positions)
            for is_local, rotary in self.rotary.items()
        }
        program.embed(self.embedding)
        program.norm(self.embedding_norm, replaces=True)
        for layer in self.layers:
            assert isinstance(layer, ModernBertLayer)
            if layer.attention_norm is not None:
                program.norm(layer.attention_norm, replaces=False)
            program.linear(layer.qkv, EncoderBuffer.PROJECTED)
            program.rotary(*angles[layer.is_local])
            program.attention(layer.window)
            program.activate(EncoderBuffer.ATTENDED)
            program.linear(layer.output, EncoderBuffer.HIDDEN, epilogue=Epilogue.ADD)
            program.norm(layer.feed_forward_norm, replaces=False)
            program.linear(layer.gate_up, EncoderBuffer.INNER)
            program.activate(EncoderBuffer.INNER, layer.activation, gated=True)
            program.linear(layer.down, EncoderBuffer.HIDDEN, epilogue=Epilogue.ADD)
        program.norm(self.norm, replaces=True)


def _local_layers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    types = fields.raw.get("layer_types")
    if types is None:
        every = fields.integer("global_attn_every_n_layers", 3)
        if every < 1:
            raise ModelFileError(
                fields.path, f"{every} is below 1", what="global_attn_every_n_layers"
            )
        return tuple(index % every > 0 for index in range(num_layers))
    if not isinstance(types, list) or len(types) != num_layers:
        raise ModelFileError(fields.path, f"does not list {num_layers} layers", what="layer_types")
    if unknown := [each for each in types if each not in _LAYER_TYPES]:
        raise ModelFileError(fields.path, f"{unknown[0]!r} is not supported", what="layer_types")
    return tuple(each == "sliding_attention" for each in types)


def _window(fields: Fields) -> int:
    window = fields.integer("local_attention", 128)
    if window < 2:
        raise ModelFileError(fields.path, f"{window} is below 2", what="local_attention")
    return window // 2


def _theta(fields: Fields, layer_type: str, older_name: str, default: float) -> float:
    tables: Any = fields.raw.get("rope_parameters") or {}
    table = tables.get(layer_type) or {} if isinstance(tables, dict) else None
    if not isinstance(table, dict):
        raise ModelFileError(fields.path, "is not a table", what="rope_parameters")
    rope = Fields(fields.path, table)
    if (kind := rope.text("rope_type", "default")) != "default":
        raise ModelFileError(fields.path, f"{kind!r} is not supported", what="rope_type")
    theta = rope.number("rope_theta", fields.number(older_name, default))
    if theta <= 1:
        raise ModelFileError(fields.path, f"{theta} gives no frequencies", what="rope_theta")
    return theta
