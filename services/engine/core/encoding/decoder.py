"""Embeddings of decoders: the vectors of their tokens before the head, each seeing those before it.

A directory of sentence-transformers with a decoder in it, such as Qwen3-Embedding, is one. Every
family of decoders computes them, with nothing but another head: one that changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from services.engine.core.batch import ForwardBatch
from services.engine.core.encoding.batch import EncoderBatch
from services.engine.core.encoding.model import EncoderShape
from services.engine.core.encoding.outputs import OutputConfig, read_outputs, served_tokens
from services.engine.core.kernels.cpu.kv_cache import PackedKVCache
from services.engine.core.kernels.cpu.packing import GroupedWeight
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.kv_cache import KVCache
from services.engine.core.layers import Linear
from services.engine.core.model_config import ModelConfig, check_config
from services.engine.core.models.base import Model
from services.engine.core.models.hf_config import read_hf_config
from services.engine.core.models.loader import build_skeleton
from services.engine.core.models.native import NativeModel
from services.engine.core.models.precision import WeightChoice
from services.engine.core.models.registry import HF_FAMILIES
from services.engine.core.weights.checkpoint import Checkpoint
from services.engine.core.weights.loading import check_weights, load_weights
from services.engine.core.weights.names import Names
from services.engine.core.weights.opening import open_checkpoint
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.fields import Fields, read_json

_BLOCK_TOKENS = 16
_HEAD = "head.weight"


@dataclass(frozen=True, slots=True)
class OpenedDecoder:
    """A decoder that was found fit to make embeddings, and no memory taken for it yet."""

    config: ModelConfig
    checkpoint: Checkpoint
    skeleton: Model  # on the meta device, without a head
    outputs: OutputConfig

    @property
    def shape(self) -> EncoderShape:
        """What the engine says of it."""
        config = self.config
        return EncoderShape(
            config.architecture,
            config.num_layers,
            config.hidden_size,
            config.vocab_size,
            config.max_context_tokens,
        )

    def load_head(self, device: torch.device) -> None:
        """It has none."""

    def load(
        self, dtype: torch.dtype, device: torch.device, *, batch_tokens: int
    ) -> DecoderVectors:
        """Load it for plain torch; longer sequences are computed in steps of `batch_tokens`."""
        with torch.device(device):
            model = build_skeleton(self.config).to(dtype).to_empty(device=device)
        load_weights(model, self.checkpoint)
        model.head = nn.Identity()  # type: ignore[assignment]
        config = self.config
        cache = KVCache(
            config.num_layers,
            _most_blocks(config, batch_tokens),
            _BLOCK_TOKENS,
            config.kv_heads,
            config.head_dim,
            dtype,
            device,
        )
        return DecoderVectors(model.eval().requires_grad_(False), cache, batch_tokens)

    def load_natively(
        self, team: Team, weights: WeightChoice, *, batch_tokens: int
    ) -> tuple[DecoderVectors, dict[str, int]]:
        """Load it for the native kernels."""
        config = self.config
        skeleton = build_skeleton(config)
        with torch.device("meta"):
            skeleton.head = Linear(config.hidden_size, config.hidden_size, bias=False)
        checkpoint: Any = _WithIdentity(self.checkpoint, config.hidden_size)
        model = NativeModel(skeleton, checkpoint, team, weights)
        cache = PackedKVCache(
            config.num_layers,
            _most_blocks(config, batch_tokens),
            _BLOCK_TOKENS,
            config.kv_heads,
            config.head_dim,
        )
        model.bind(cache, max_batch_tokens=batch_tokens)
        return DecoderVectors(model, cache, batch_tokens), model.weight_bytes


class _WithIdentity:
    """A checkpoint whose head is the identity."""

    def __init__(self, checkpoint: Checkpoint, size: int) -> None:
        self._checkpoint = checkpoint
        self._size = size

    def read(self, name: str) -> Tensor:
        return torch.eye(self._size) if name == _HEAD else self._checkpoint.read(name)

    def read_grouped(self, name: str) -> GroupedWeight | None:
        return None if name == _HEAD else self._checkpoint.read_grouped(name)

    def stored_as(self, name: str) -> str:
        return "F32" if name == _HEAD else self._checkpoint.stored_as(name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._checkpoint, name)


class DecoderVectors:
    """Computes the vectors of all tokens of a batch, as an encoder does.

    What it keeps of keys and values is of no use to the next batch, which writes over it.
    """

    def __init__(self, model: Any, kv_cache: Any, batch_tokens: int) -> None:
        self._model = model
        self._kv_cache = kv_cache
        self._batch_tokens = batch_tokens

    def __call__(self, batch: EncoderBatch) -> Tensor:
        """float32 [num_tokens, hidden_size]. A batch has `batch_tokens`, or one sequence."""
        steps = [
            self._model(step, self._kv_cache).clone() for step in _steps(batch, self._batch_tokens)
        ]
        vectors = steps[0] if len(steps) == 1 else torch.cat(steps)
        if isinstance(self._kv_cache, KVCache) and not vectors.isfinite().all():
            # Plain torch hides what a sequence does not see by adding to it, which hides no NaN.
            self._kv_cache.clear()
        return vectors


def _steps(batch: EncoderBatch, most_tokens: int) -> Iterator[ForwardBatch]:
    """The batch in one step, or its only sequence in several."""
    lengths = batch.lengths
    device = batch.token_ids.device
    blocks = [-(-length // _BLOCK_TOKENS) for length in lengths]
    firsts = np.cumsum([0, *blocks[:-1]])
    tables = np.zeros((len(lengths), max(blocks)), np.int32)
    for row, (first, count) in enumerate(zip(firsts, blocks, strict=True)):
        tables[row, :count] = np.arange(first, first + count)
    first_slots = torch.from_numpy(np.repeat(firsts * _BLOCK_TOKENS, lengths)).to(device)
    slots = first_slots + batch.positions
    block_tables = torch.from_numpy(tables).to(device)
    total = len(batch.token_ids)
    for begin in range(0, total, most_tokens):
        end = min(begin + most_tokens, total)
        whole = total <= most_tokens
        yield ForwardBatch(
            token_ids=batch.token_ids[begin:end],
            positions=batch.positions[begin:end],
            slots=slots[begin:end],
            block_tables=block_tables,
            query_lengths=lengths if whole else (end - begin,),
            context_lengths=lengths if whole else (end,),
            logits_rows=torch.arange(end - begin, device=device),
        )


def _most_blocks(config: ModelConfig, batch_tokens: int) -> int:
    """Blocks for any batch: each of its sequences may leave most of its last block empty."""
    return max(batch_tokens, -(-config.max_context_tokens // _BLOCK_TOKENS))


def makes_embeddings(path: Path | str) -> bool:
    """Whether a model is a directory of sentence-transformers with a decoder in it."""
    directory = Path(path)
    if not (directory / "modules.json").exists():
        return False
    try:
        return _causal(read_hf_config(directory).architecture) in HF_FAMILIES
    except ModelFileError:
        return False


def open_decoder(
    path: Path | str, *, max_context_tokens: int | None = None, allow_pickled: bool = False
) -> OpenedDecoder:
    """Open a decoder and check names and shapes of its weights; arguments as of `open_encoder`.

    Raises ModelFileError for files that are missing, damaged or do not fit the architecture.
    """
    directory = Path(path)
    hf = read_hf_config(directory)
    architecture = _causal(hf.architecture)
    family = HF_FAMILIES[architecture]
    config = check_config(directory / "config.json", family.hf_config(hf))
    fields = Fields(directory / "config.json", read_json(directory / "config.json"))
    outputs = read_outputs(directory, fields, config.hidden_size, labels=())
    # A head is of no use here; a model without a tied one would need its own.
    config = replace(
        config,
        architecture=architecture,
        max_context_tokens=served_tokens(
            directory, config.max_context_tokens, outputs.max_tokens, max_context_tokens
        ),
        tie_embeddings=True,
        logit_softcap=None,
    )
    checkpoint = open_checkpoint(directory, _names(family.hf_names), allow_pickled=allow_pickled)
    if config.num_layers > len(checkpoint.shapes):
        problem = f"claims {config.num_layers} layers but has {len(checkpoint.shapes)} tensors"
        raise ModelFileError(directory, problem)
    skeleton = build_skeleton(config)
    check_weights(skeleton, checkpoint, tied=True)
    return OpenedDecoder(config, checkpoint, skeleton, outputs)


def _causal(architecture: str) -> str:
    """Decoders are saved with a head, or without one under another name."""
    causal = architecture.removesuffix("Model") + "ForCausalLM"
    return causal if architecture not in HF_FAMILIES and causal in HF_FAMILIES else architecture


def _names(names: Names) -> Names:
    """The same for checkpoints that were saved without a head, which leave a prefix out."""

    def of(source: str) -> str | None:
        return names.of(source) or names.of(f"model.{source}")

    def is_needless(source: str) -> bool:
        return names.is_needless(source) or names.is_needless(f"model.{source}")

    return Names(of, is_needless, names.treatment)
