"""DeBERTa v2 and v3: what tokens contain and how far they are apart are attended to separately.

He et al., arXiv:2006.03654 and arXiv:2111.09543.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from services.engine.core.encoding.batch import EncoderBatch
from services.engine.core.encoding.config import (
    EncoderConfig,
    read_activation,
    read_common,
    read_token_types,
)
from services.engine.core.encoding.heads import ClassificationHead
from services.engine.core.encoding.layers import (
    ACTIVATIONS,
    InputEmbeddings,
    LayerNorm,
    PostNormLayer,
)
from services.engine.core.encoding.model import Encoder
from services.engine.core.layers import Embedding, Linear, MergedLinear
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.fields import Fields

_KINDS = ("c2p", "p2c")
_MOST_SPAN = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DebertaV2Config(EncoderConfig):
    """`span`: distances are told apart up to so many, farther ones being gathered in buckets that
    grow to `max_distance` where `has_buckets`; 0: distances do not matter. `kinds` are those of
    attention to them."""

    has_positions: bool
    kinds: tuple[str, ...]
    span: int
    has_buckets: bool
    max_distance: int
    shares_keys: bool
    norms_distances: bool
    conv_size: int  # 0: no convolution after the first layer
    conv_activation: str
    head_activation: str


class DisentangledAttention(nn.Module):
    """Scores of contents with contents, contents with distances and distances with contents."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads, self.head_dim = config.heads, config.head_dim
        self.kinds = config.kinds
        self.qkv = MergedLinear(size, {"q": size, "k": size, "v": size}, bias=True)
        self.output = Linear(size, size, bias=True)
        own = config.span > 0 and not config.shares_keys
        self.distance_key = Linear(size, size, bias=True) if own and "c2p" in self.kinds else None
        self.distance_query = Linear(size, size, bias=True) if own and "p2c" in self.kinds else None
        self.scale = (self.head_dim * (1 + len(self.kinds))) ** -0.5
        # Of all distances, [heads, 2 * span, head_dim], made when they are first needed.
        self._distances: tuple[Tensor | None, Tensor | None] | None = None

    def project_distances(self, distances: Tensor) -> None:
        """Make keys and queries of the embeddings of distances, [2 * span, size]."""
        if self._distances is None:
            self._distances = self._keys(distances), self._queries(distances)

    def forward(self, hidden: Tensor, step: _Step) -> Tensor:
        queries, keys, values = self.qkv(hidden).view(-1, 3, self.heads, self.head_dim).unbind(1)
        output = torch.empty_like(queries)
        for group in step.batch.groups:
            rows = group.rows

            def by_sequence(
                heads: Tensor, rows: Tensor | None = rows, length: int = group.length
            ) -> Tensor:
                picked = heads if rows is None else heads.index_select(0, rows)
                return picked.view(-1, length, self.heads, self.head_dim).transpose(1, 2)

            q, k, v = by_sequence(queries), by_sequence(keys), by_sequence(values)
            scores = q @ k.transpose(-1, -2)
            scores += self._distance_scores(q, k, step.indices(group.length))
            weights = functional.softmax(scores * self.scale, dim=-1)
            attended = (weights @ v).transpose(1, 2).flatten(0, 1)
            if rows is None:
                output = attended
            else:
                output.index_copy_(0, rows, attended)
        projected: Tensor = self.output(output.flatten(1))
        return projected

    def _distance_scores(self, queries: Tensor, keys: Tensor, index: Tensor | None) -> Tensor:
        """[num_sequences, heads, length, length], of each query and key."""
        scores = queries.new_zeros(())
        if index is None or self._distances is None:
            return scores
        distance_keys, distance_queries = self._distances
        index = index.expand(*queries.shape[:2], -1, -1)
        if distance_keys is not None:
            scores = (queries @ distance_keys.transpose(-1, -2)).gather(-1, index)
        if distance_queries is not None:
            by_key = (keys @ distance_queries.transpose(-1, -2)).gather(-1, index.transpose(-1, -2))
            scores = scores + by_key.transpose(-1, -2)
        return scores

    def _keys(self, distances: Tensor) -> Tensor | None:
        if "c2p" not in self.kinds:
            return None
        return self._by_head(
            self._part(distances, 1) if self.distance_key is None else self.distance_key(distances)
        )

    def _queries(self, distances: Tensor) -> Tensor | None:
        if "p2c" not in self.kinds:
            return None
        return self._by_head(
            self._part(distances, 0)
            if self.distance_query is None
            else self.distance_query(distances)
        )

    def _part(self, distances: Tensor, part: int) -> Tensor:
        parts: tuple[Tensor, ...] = self.qkv(distances).chunk(3, dim=-1)
        return parts[part]

    def _by_head(self, projected: Tensor) -> Tensor:
        return projected.view(-1, self.heads, self.head_dim).transpose(0, 1).contiguous()


class _Step:
    """What all layers of a step share."""

    def __init__(self, batch: EncoderBatch, config: DebertaV2Config) -> None:
        self.batch = batch
        self._config = config
        self._indices: dict[int, Tensor] = {}

    def indices(self, length: int) -> Tensor | None:
        """Which distance is between each query and key of a sequence, [length, length]."""
        if not self._config.span:
            return None
        if length not in self._indices:
            index = distance_indices(length, self._config)
            self._indices[length] = index.to(self.batch.token_ids.device)
        return self._indices[length]


def distance_indices(length: int, config: DebertaV2Config) -> Tensor:
    """Rows of the embeddings of distances, by query and key: [length, length] int64."""
    position = torch.arange(length)
    distance = position.view(-1, 1) - position
    if config.has_buckets:
        distance = _bucket(distance, config.span, config.max_distance)
    return (distance + config.span).clamp(0, 2 * config.span - 1)


def _bucket(distance: Tensor, buckets: int, max_distance: int) -> Tensor:
    """Half of the buckets are single distances, the other half grow with their logarithm."""
    middle = buckets // 2
    far = distance.abs().clamp(min=middle)
    most = torch.log(torch.tensor((max_distance - 1) / middle))
    steps = torch.log(far / middle) / most * (middle - 1)
    return torch.where(
        distance.abs() <= middle, distance, distance.sign() * (steps.ceil().long() + middle)
    )


class Convolution(nn.Module):
    """Over neighbouring tokens of the input, added to the first layer's output (DeBERTa v2)."""

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__()
        size = config.hidden_size
        self.weight = nn.Parameter(torch.empty(size, size, config.conv_size))
        self.bias = nn.Parameter(torch.empty(size))
        self.activation = config.conv_activation

    def forward(self, hidden: Tensor, batch: EncoderBatch) -> Tensor:
        output = torch.empty_like(hidden)
        for group in batch.groups:
            rows = hidden if group.rows is None else hidden.index_select(0, group.rows)
            tokens = rows.view(-1, group.length, hidden.shape[1]).transpose(1, 2)
            padding = (self.weight.shape[-1] - 1) // 2
            convolved = functional.conv1d(tokens, self.weight, self.bias, padding=padding)
            flattened = convolved.transpose(1, 2).flatten(0, 1)
            if group.rows is None:
                output = flattened
            else:
                output.index_copy_(0, group.rows, flattened)
        return ACTIVATIONS[self.activation](output)


class DebertaV2(Encoder):
    """A DeBERTa v2 encoder."""

    PREFIX = "deberta"
    NAMES: ClassVar = {
        "embeddings.word_embeddings": "embeddings.word",
        "embeddings.position_embeddings": "embeddings.position",
        "embeddings.token_type_embeddings": "embeddings.token_type",
        "embeddings.LayerNorm": "embeddings.norm",
        "encoder.rel_embeddings": "distances",
        "encoder.LayerNorm": "distance_norm",
        "encoder.conv.conv": "convolution",
        "encoder.conv.LayerNorm": "convolution_norm",
        "encoder.layer.{}.attention.self.query_proj": "layers.{}.attention.q",
        "encoder.layer.{}.attention.self.key_proj": "layers.{}.attention.k",
        "encoder.layer.{}.attention.self.value_proj": "layers.{}.attention.v",
        "encoder.layer.{}.attention.self.pos_key_proj": "layers.{}.attention.distance_key",
        "encoder.layer.{}.attention.self.pos_query_proj": "layers.{}.attention.distance_query",
        "encoder.layer.{}.attention.output.dense": "layers.{}.attention.output",
        "encoder.layer.{}.attention.output.LayerNorm": "layers.{}.attention_norm",
        "encoder.layer.{}.intermediate.dense": "layers.{}.feed_forward.up",
        "encoder.layer.{}.output.dense": "layers.{}.feed_forward.down",
        "encoder.layer.{}.output.LayerNorm": "layers.{}.feed_forward_norm",
    }
    HEAD_NAMES: ClassVar = {"pooler.dense": "head.dense", "classifier": "head.output"}
    config: DebertaV2Config

    def __init__(self, config: DebertaV2Config) -> None:
        super().__init__(config)
        size, eps = config.hidden_size, config.norm_eps
        self.embeddings = InputEmbeddings(
            config.vocab_size,
            size,
            eps,
            positions=config.positions if config.has_positions else 0,
            token_types=config.token_types,
        )
        self.layers = nn.ModuleList(
            PostNormLayer(
                DisentangledAttention(config),
                size,
                config.intermediate_size,
                config.activation,
                eps,
            )
            for _ in range(config.num_layers)
        )
        self.distances = Embedding(2 * config.span, size) if config.span else None
        self.distance_norm = LayerNorm(size, eps) if config.norms_distances else None
        self.convolution = Convolution(config) if config.conv_size else None
        self.convolution_norm = LayerNorm(size, eps) if config.conv_size else None
        if config.labels:
            self.head = ClassificationHead(
                size, len(config.labels), activation=config.head_activation
            )

    @classmethod
    def read_config(cls, fields: Fields) -> DebertaV2Config:
        common = read_common(fields, norm_eps="layer_norm_eps", activation="hidden_act")
        for name, own in (
            ("embedding_size", "hidden_size"),
            ("attention_head_size", None),
            ("pooler_hidden_size", "hidden_size"),
        ):
            usual = common[own] if own else common["hidden_size"] // common["heads"]
            if fields.integer(name, usual) != usual:
                raise ModelFileError(fields.path, f"only {usual} is supported", what=name)
        is_relative = fields.flag("relative_attention")
        buckets = fields.integer("position_buckets", -1)
        max_distance = fields.integer("max_relative_positions", -1)
        if max_distance < 1:
            max_distance = common["positions"]
        span = (buckets if buckets > 0 else max_distance) if is_relative else 0
        if span > _MOST_SPAN or (span and buckets > 0 and not 2 <= buckets < 2 * max_distance - 2):
            raise ModelFileError(fields.path, f"{span} distances make no sense", what="span")
        conv_size = fields.integer("conv_kernel_size", 0)
        if conv_size > 64 or (conv_size > 0 and conv_size % 2 == 0):
            raise ModelFileError(fields.path, f"{conv_size} is not odd", what="conv_kernel_size")
        if fields.integer("conv_groups", 1) != 1:
            raise ModelFileError(fields.path, "only 1 is supported", what="conv_groups")
        norms = [each.strip() for each in fields.text("norm_rel_ebd", "none").lower().split("|")]
        return DebertaV2Config(
            **common,
            token_types=read_token_types(fields, 0),
            has_positions=fields.flag("position_biased_input", default=True),
            kinds=_kinds(fields),
            span=span,
            has_buckets=buckets > 0,
            max_distance=max_distance,
            shares_keys=fields.flag("share_att_key"),
            norms_distances="layer_norm" in norms,
            conv_size=max(conv_size, 0),
            conv_activation=read_activation(fields, "conv_act", "tanh"),
            head_activation=read_activation(fields, "pooler_hidden_act"),
        )

    @torch.inference_mode()
    def encode(self, batch: EncoderBatch) -> Tensor:
        self._project_distances()
        step = _Step(batch, self.config)
        embedded: Tensor = self.embeddings(batch)
        hidden = embedded
        for index, layer in enumerate(self.layers):
            hidden = layer(hidden, step)
            if index == 0 and self.convolution is not None and self.convolution_norm is not None:
                hidden = self.convolution_norm(hidden + self.convolution(embedded, batch))
        return hidden

    def _project_distances(self) -> None:
        if self.distances is None:
            return
        distances: Tensor = self.distances.weight
        if self.distance_norm is not None:
            distances = self.distance_norm(distances)
        for layer in self.layers:
            assert isinstance(layer, PostNormLayer)
            assert isinstance(layer.attention, DisentangledAttention)
            layer.attention.project_distances(distances)


def _kinds(fields: Fields) -> tuple[str, ...]:
    kinds: Any = fields.raw.get("pos_att_type") or []
    if isinstance(kinds, str):
        kinds = [each.strip() for each in kinds.lower().split("|")]
    if not isinstance(kinds, list) or any(kind not in _KINDS for kind in kinds):
        raise ModelFileError(fields.path, f"{kinds!r} is not of {_KINDS}", what="pos_att_type")
    return tuple(kind for kind in _KINDS if kind in kinds)
