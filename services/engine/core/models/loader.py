"""From a path to a model that can run a step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from services.engine.core.model_config import ModelConfig, SparseAttention, check_config
from services.engine.core.models.base import Model
from services.engine.core.models.family import Family
from services.engine.core.models.gguf_config import gguf_decoder_config
from services.engine.core.models.hf_config import read_hf_config
from services.engine.core.models.kept import KeptWeights, load_kept
from services.engine.core.models.registry import GGUF_FAMILIES, HF_FAMILIES
from services.engine.core.weights.checkpoint import Checkpoint
from services.engine.core.weights.loading import check_weights, load_weights
from services.engine.core.weights.opening import open_checkpoint
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.gguf_model import GGUFModel


def read_config(path: Path | str) -> ModelConfig:
    """Return the shape of the model at `path`, a HF directory or a .gguf file.

    Raises ModelFileError for a file that is missing, damaged or of an unknown architecture.
    """
    path = Path(path)
    if path.is_dir():
        hf = read_hf_config(path)
        family = _family(HF_FAMILIES, hf.architecture, path)
        return check_config(path / "config.json", family.hf_config(hf))
    with GGUFModel(path) as file:
        architecture = file.metadata.string("general.architecture")
        family = _family(GGUF_FAMILIES, architecture, path)
        return check_config(path, family.gguf_config(gguf_decoder_config(file), file))


def _family(families: Mapping[str, Family], architecture: str, path: Path) -> Family:
    if architecture not in families:
        problem = f"architecture {architecture!r} is not supported, only {', '.join(families)} are"
        raise ModelFileError(path, problem)
    return families[architecture]


@dataclass(frozen=True, slots=True)
class OpenedModel:
    """A model that was found fit for its architecture, and no memory taken for it yet."""

    config: ModelConfig
    checkpoint: Checkpoint
    skeleton: Model  # on the meta device

    def load(self, dtype: torch.dtype, device: torch.device | str) -> Model:
        """Load it for inference on plain torch.

        Raises ModelFileError for a tensor that cannot be read and torch.OutOfMemoryError where the
        device has not the room.
        """
        model = _build(self.config, dtype, device)
        load_weights(model, self.checkpoint)
        return model.eval().requires_grad_(False)

    def load_kept(
        self,
        weights: KeptWeights,
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        multiplies_fp8: bool = True,
    ) -> tuple[Model, Mapping[str, int]]:
        """Load it for torch with matrices that stay in few bits, and say which were rounded.

        Raises what `load` raises; see `kept.load_kept`.
        """
        if weights == "bfloat16" or (weights == "auto" and not self.checkpoint.is_quantised):
            return self.load(dtype, device), {}
        model = build_skeleton(self.config)
        rounded = load_kept(
            model, self.checkpoint, weights, dtype, device, multiplies_fp8=multiplies_fp8
        )
        return model, rounded


def open_model(
    path: Path | str,
    *,
    max_context_tokens: int | None = None,
    allow_pickled: bool = False,
    sparse_attention: SparseAttention | None = None,
) -> OpenedModel:
    """Open a model and check names and shapes of its weights.

    `max_context_tokens` serves a context other than the model's own: a shorter one, or, for models
    whose rope scaling is dynamic, a longer one. `allow_pickled` is as for `open_checkpoint`. With
    `sparse_attention` layers show less than the model was trained with. Raises ModelFileError for
    files that are missing, damaged or do not fit the architecture, and for a context that the model
    does not stretch to.
    """
    config = read_config(path)
    if max_context_tokens is not None:
        stretches = config.rope is not None and config.rope.scaling == "dynamic"
        if max_context_tokens > config.max_context_tokens and not stretches:
            problem = f"has a context of {config.max_context_tokens} tokens and no dynamic rope "
            problem += f"scaling that would stretch it to {max_context_tokens}"
            raise ModelFileError(path, problem)
        config = replace(config, max_context_tokens=max_context_tokens)
    config = replace(config, windows=_binding(config), sparse_attention=sparse_attention)
    checkpoint = _open_checkpoint(Path(path), config, allow_pickled=allow_pickled)
    if config.num_layers > len(checkpoint.shapes):
        problem = f"claims {config.num_layers} layers but has {len(checkpoint.shapes)} tensors"
        raise ModelFileError(path, problem)
    # Without memory, so that a wrong file is refused before any is taken.
    skeleton = build_skeleton(config)
    check_weights(skeleton, checkpoint, tied=config.tie_embeddings)
    return OpenedModel(config, checkpoint, skeleton)


def _binding(config: ModelConfig) -> tuple[int | None, ...]:
    """The windows that hide anything from sequences of the context that is served."""
    windows = tuple(
        None if window is None or window >= config.max_context_tokens else window
        for window in config.windows
    )
    # Layers without a window may have positions of another kind.
    has_one = any(windows) or config.local_rope is not None
    return config.windows if has_one else ()


def _open_checkpoint(path: Path, config: ModelConfig, *, allow_pickled: bool) -> Checkpoint:
    if path.is_dir():
        names = HF_FAMILIES[config.architecture].hf_names
        return open_checkpoint(path, names, allow_pickled=allow_pickled)
    family = GGUF_FAMILIES[config.architecture]
    assert family.gguf_names is not None
    pairs = {"q": config.heads, "k": config.kv_heads} if family.gguf_pairs_rows else None
    return open_checkpoint(path, family.gguf_names, pairs)


def load_model(
    path: Path | str,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
    max_context_tokens: int | None = None,
) -> tuple[Model, ModelConfig]:
    """Open a model and load it for plain torch; raises what `open_model` and `load` raise."""
    opened = open_model(path, max_context_tokens=max_context_tokens)
    return opened.load(dtype, device), opened.config


def build_skeleton(config: ModelConfig) -> Model:
    """Return a model of this shape that takes no memory: its parameters are on the meta device."""
    return _build(config, torch.float32, "meta")


def _build(config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> Model:
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            return (HF_FAMILIES | GGUF_FAMILIES)[config.architecture].model(config)
    finally:
        torch.set_default_dtype(previous)
