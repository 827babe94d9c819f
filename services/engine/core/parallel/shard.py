"""What one rank has of a decoder: the layers of its stage, and of these its heads and columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from services.engine.core.batch import CapturedShape, ForwardBatch
from services.engine.core.graphs import GraphedModel, Recorder
from services.engine.core.kernels import AdapterParts, Matrix
from services.engine.core.kv_cache import KVCache
from services.engine.core.layers import Embedding, Linear, MergedLinear, MixtureOfExperts
from services.engine.core.layers.adapters import PlacedAdapter
from services.engine.core.layers.attention import AttentionBreaks
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


class Stage:
    """What a rank computes of steps between exchanges with other stages, called as a Model is: that
    can be captured as a model's steps are. It sums over the ranks of its stage.

    Attributes:
        config: of what the rank has.
    """

    def __init__(self, model: Model, place: Place, hidden_size: int) -> None:
        """model: what `outline_shard` made, with weights."""
        self.config = model.config
        self._model, self._place, self._hidden_size = model, place, hidden_size
        self._like = next(model.layers.parameters())  # a norm's, if of nothing else
        self._hidden: Tensor | None = None
        self._captured: Tensor | None = None

    @property
    def breaks(self) -> AttentionBreaks | None:
        """As of Model."""
        return self._model.breaks

    @breaks.setter
    def breaks(self, breaks: AttentionBreaks | None) -> None:
        self._model.breaks = breaks

    @property
    def logits_memory(self) -> Tensor | None:
        """As of Model, where there are logits."""
        return self._model.logits_memory

    @logits_memory.setter
    def logits_memory(self, memory: Tensor) -> None:
        if self._place.is_last:
            self._model.logits_memory = memory

    def expect_captured(self, max_tokens: int) -> None:
        """Have hidden states of captured steps arrive where graphs find them."""
        self._captured = self._like.new_zeros(max_tokens, self._hidden_size)

    def entrance(self, batch: ForwardBatch) -> Tensor:
        """Where the stage before is to leave the hidden states of a step, [num_tokens,
        hidden_size]."""
        if batch.captured is not None:
            return self._captured_hidden(batch)
        self._hidden = self._like.new_empty(len(batch.token_ids), self._hidden_size)
        return self._hidden

    def _captured_hidden(self, batch: ForwardBatch) -> Tensor:
        assert self._captured is not None, "it expects captured steps"
        return self._captured[: len(batch.token_ids)]

    def __call__(self, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """Compute the stage's part of a step; returns what `logits` does."""
        return self.logits(self.advance(self.embed(batch), batch, kv_cache), batch)

    def embed(self, batch: ForwardBatch) -> Tensor:
        """As Model; behind the first stage, what has arrived."""
        if self._place.is_first:
            return self._model.embed(batch)
        if batch.captured is not None:
            return self._captured_hidden(batch)
        assert self._hidden is not None, "an entrance was given"
        return self._hidden

    def advance(self, hidden: Tensor, batch: ForwardBatch, kv_cache: KVCache) -> Tensor:
        """As Model."""
        return self._model.advance(hidden, batch, kv_cache)

    def logits(self, hidden: Tensor, batch: ForwardBatch) -> Tensor:
        """The rank's share of the logits, [num_rows, share of the vocabulary], from the last stage;
        the hidden states, from others."""
        if not self._place.is_last:
            return hidden
        if len(batch.logits_rows) == 0:
            return hidden.new_empty((0, self.config.vocab_size), dtype=torch.float32)
        return self._model.logits(hidden, batch)


class Shard:
    """Computes a rank's part of steps: `shard(batch, kv_cache)`, on all ranks at the same time.

    The KV cache has the layers of the stage and the rank's heads.
    """

    def __init__(self, model: Model, config: ModelConfig, ranks: Ranks) -> None:
        """model: what `outline_shard` made, with weights. config: of the whole model."""
        self.model = model
        self._ranks, self._place = ranks, ranks.place
        self._vocab_size = config.vocab_size
        self._partition = Partition(config, ranks.place)
        self._stage = Stage(model, ranks.place, config.hidden_size)
        self._graphs: GraphedModel | None = None
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
        place = self._place
        if not place.is_first:
            self._ranks.take_over(self._stage.entrance(batch))
        computed = (self._graphs or self._stage)(batch, kv_cache)
        if not place.is_last:
            self._ranks.pass_on(computed)
        return self._collected(computed, len(batch.logits_rows))

    def _collected(self, computed: Tensor, num_rows: int) -> Tensor:
        """The logits of all ranks of the last stage, on rank 0."""
        place, share = self._place, self.model.config.vocab_size
        if num_rows == 0:
            return computed.new_empty((0, self._vocab_size), dtype=torch.float32)
        if place.rank != 0:
            self._ranks.collect(computed, None)
            return computed
        tensor = place.layout.tensor
        shares = computed.new_empty((tensor, num_rows, share), dtype=torch.float32)
        self._ranks.collect(computed, shares)
        ends = [min(share, max(0, self._vocab_size - rank * share)) for rank in range(tensor)]
        parts = [each[:, :end] for each, end in zip(shares, ends, strict=True)]
        return torch.cat(parts, dim=1) if tensor > 1 else parts[0].contiguous()

    def matrices(self) -> Iterator[Matrix]:
        """What the rank's projections multiply by, that which gives logits included."""
        if self._place.is_last:
            yield from self.model.matrices()
            return
        for module in self.model.modules():
            if isinstance(module, Linear | MergedLinear):
                yield module.weight

    def begin_capture(
        self, recorder: Recorder, shapes: Sequence[CapturedShape], device: torch.device
    ) -> None:
        """Compute steps by graphs where they have been captured; these shapes may be."""
        if not self._place.is_first:
            self._stage.expect_captured(max(each.num_tokens for each in shapes))
        self._graphs = GraphedModel(self._stage, recorder, shapes, device=device)

    @property
    def graphs(self) -> GraphedModel:
        """What captures steps. Ranks of a stage do so together; what goes from stage to stage, and
        to rank 0, is not captured. Precondition: begin_capture has been called."""
        assert self._graphs is not None, "capturing has begun"
        return self._graphs

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
