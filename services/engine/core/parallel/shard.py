"""What one rank has of a decoder: the layers of its stage, and of these its heads and columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import AdapterParts
from services.engine.core.kv_cache import KVCache
from services.engine.core.layers import Embedding, MixtureOfExperts
from services.engine.core.layers.adapters import PlacedAdapter
from services.engine.core.model_config import ModelConfig
from services.engine.core.models.base import Model
from services.engine.core.models.kept import KeptWeights, load_kept, multiplies_fp8
from services.engine.core.models.loader import build_skeleton
from services.engine.core.parallel.checkpoint_share import CheckpointShare
from services.engine.core.parallel.layout import Place, shard_config
from services.engine.core.parallel.partition import Partition
from services.engine.core.parallel.ranks import Ranks
from services.engine.core.weights.checkpoint import Checkpoint
from services.engine.core.weights.loading import load_weights


class Shard:
    """Computes a rank's part of steps: `shard(batch, kv_cache)`, on all ranks at the same time.

    The KV cache has the layers of the stage and the rank's heads.
    """

    def __init__(self, model: Model, config: ModelConfig, ranks: Ranks) -> None:
        """model: what `outline_shard` made, with weights. config: of the whole model."""
        self.model = model
        self._ranks, self._place = ranks, ranks.place
        self._hidden_size, self._vocab_size = config.hidden_size, config.vocab_size
        self._partition = Partition(config, ranks.place)
        self._like = next(model.layers.parameters())  # a norm's, if of nothing else
        if ranks.place.layout.tensor == 1:
            return
        for path, module in model.named_modules():
            if isinstance(module, MixtureOfExperts) or self._partition.sums_over_ranks(path):
                module.register_forward_hook(self._sum)

    def _sum(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return self._ranks.sum(output)

    @torch.inference_mode()
    def __call__(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """Compute a step. Returns its logits, float32 [num_rows, vocab_size], on rank 0, and
        nothing that is of use on others."""
        place, model = self._place, self.model
        if place.is_first:
            hidden = model.embed(batch)
        else:
            hidden = self._like.new_empty(len(batch.token_ids), self._hidden_size)
            self._ranks.take_over(hidden)
        hidden = model.advance(hidden, batch, kv_cache)
        if not place.is_last:
            self._ranks.pass_on(hidden)
        shape = (len(batch.logits_rows), model.config.vocab_size)
        if shape[0] == 0:
            return hidden.new_empty((0, self._vocab_size), dtype=torch.float32)
        share = model.logits(hidden, batch).contiguous() if place.is_last else hidden
        if place.rank != 0:
            self._ranks.collect(share, None)
            return share
        shares = hidden.new_empty((place.layout.tensor, *shape), dtype=torch.float32)
        self._ranks.collect(share, shares)
        whole = shares.transpose(0, 1).reshape(shape[0], -1)
        return whole[:, : self._vocab_size].contiguous()

    def place_adapter(self, parts: AdapterParts) -> PlacedAdapter:
        """What the rank has of an adapter, as `set_adapter` takes it."""
        own = {path for path, _ in self.model.named_modules()}
        here = {path: each for path, each in parts.items() if path in own}
        return self.model.prepare_adapter(self._partition.cut_adapter(here))

    def set_adapter(self, slot: int, adapter: PlacedAdapter | None) -> None:
        """Keep an adapter under a number by which batches name it; None: forget it."""
        self.model.set_adapter(slot, adapter)


class VocabularyShard(Embedding):
    """The rows of an embedding from `first` on; other tokens' are zeros, so that a sum over the
    ranks is the embedding."""

    def __init__(self, vocab_size: int, size: int, first: int) -> None:
        super().__init__(vocab_size, size)
        self._first, self._size = first, vocab_size

    def forward(self, token_ids: Tensor) -> Tensor:
        own = token_ids - self._first
        elsewhere = (own < 0) | (own >= self._size)
        embedded = super().forward(own.masked_fill(elsewhere, 0))
        return embedded.masked_fill_(elsewhere.unsqueeze(-1), 0)


def outline_shard(config: ModelConfig, place: Place, stage: range, dtype: torch.dtype) -> Model:
    """What a rank has of a model of this shape, on the meta device. `stage`: its layers."""
    model = build_skeleton(shard_config(config, place.layout.tensor)).to(dtype)
    layers = nn.ModuleList()
    for index in stage:
        # Under the number that it has in the model, which is that of its weights.
        layers.add_module(str(index), model.layers[index])
    model.layers = layers
    share = model.config.vocab_size
    with torch.device("meta"):
        embedding = VocabularyShard(share, config.hidden_size, place.tensor_rank * share)
    model.embedding = embedding.to(dtype)
    if not place.is_first:
        _leave_out(model, "positions")
        if not (place.is_last and config.tie_embeddings):
            _leave_out(model, "embedding")
    if not place.is_last:
        _leave_out(model, "norm")
        _leave_out(model, "head")
    partition = Partition(config, place)
    for path, module in model.named_modules():
        if partition.leaves_bias_to_others(path) and getattr(module, "bias", None) is not None:
            module.bias = None
    return model


def _leave_out(model: Model, name: str) -> None:
    if getattr(model, name, None) is not None:
        setattr(model, name, None)


def load_shard(
    outline: Model,
    config: ModelConfig,
    place: Place,
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str,
    weights: KeptWeights = "bfloat16",
) -> Model:
    """Give an outline its weights. weights: what matrices are kept in, as OpenedModel has it.

    Raises ModelFileError for a tensor that cannot be read and torch.OutOfMemoryError where the
    device has not the room.
    """
    share = CheckpointShare(checkpoint, Partition(config, place))
    if weights == "bfloat16" or (weights == "auto" and not checkpoint.is_quantised):
        model = outline.to_empty(device=device)
        load_weights(model, share)
        return model.eval().requires_grad_(False)
    load_kept(
        outline, share, weights, dtype, device, multiplies_fp8=multiplies_fp8(torch.device(device))
    )
    return outline
