"""Where a model that is to be quantised comes from, in the names and files of a HF directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.engine.core.model_config import ModelConfig
from services.engine.core.models.llama import QK_NORMS_HF
from services.engine.core.models.loader import OpenedModel
from services.engine.core.weights.checkpoint import Checkpoint
from services.engine.core.weights.names import FROM_HF, model_name
from services.engine.core.weights.tensor_files import SafetensorsFiles
from services.runtime.modelfiles import ModelFileError

# GGUF's architectures that become a HF one of the same shape.
_FROM_GGUF = {
    "llama": ("LlamaForCausalLM", "llama"),
    "qwen2": ("Qwen2ForCausalLM", "qwen2"),
    "qwen3": ("Qwen3ForCausalLM", "qwen3"),
}


@dataclass(frozen=True, slots=True)
class Source:
    """A model in HF's names.

    Attributes:
        config: its config.json.
        name_of: HF's name of a tensor, by the model's.
        others: all tensors but those of the model's names given, with HF's, one at a time.
    """

    config: dict[str, Any]
    name_of: Callable[[str], str]
    others: Callable[[Collection[str]], Iterator[tuple[str, Tensor]]]


def open_source(opened: OpenedModel) -> Source:
    """Raises ModelFileError for a model that cannot be written as a quantised HF directory."""
    checkpoint, path = opened.checkpoint, opened.checkpoint.path
    if opened.config.experts is not None:
        raise ModelFileError(path, "is a mixture of experts, which cannot be quantised yet")
    if opened.config.rope is None:
        problem = "has projections that lie column by column, which compressed-tensors cannot hold"
        raise ModelFileError(path, problem)
    if path.is_dir():
        return _of_directory(path, checkpoint)
    return _of_gguf(opened)


def _of_directory(path: Path, checkpoint: Checkpoint) -> Source:
    if checkpoint.is_quantised:
        raise ModelFileError(path, "is quantised already; give the model that it was made from")

    def others(rounded: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        without = {checkpoint.source_name(name) for name in rounded}
        files = SafetensorsFiles(path)
        for source in files.entries:
            if source not in without:
                yield source, files.read(source).clone()
                files.release()
        files.close()

    config = json.loads((path / "config.json").read_bytes())
    return Source(config, checkpoint.source_name, others)


def _of_gguf(opened: OpenedModel) -> Source:
    config, checkpoint = opened.config, opened.checkpoint
    if config.architecture not in _FROM_GGUF:
        known = ", ".join(_FROM_GGUF)
        problem = f"is a GGUF file of {config.architecture!r}; of these only {known} can be "
        raise ModelFileError(checkpoint.path, problem + "quantised: give a HF directory")
    names = {ours: theirs for theirs, ours in (FROM_HF | QK_NORMS_HF).items()}

    def name_of(name: str) -> str:
        found = model_name(name, names)
        assert found is not None, name
        return found

    def others(rounded: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for name in checkpoint.shapes:
            if name in rounded or (name == "head.weight" and config.tie_embeddings):
                continue
            yield name_of(name), checkpoint.read(name).to(torch.bfloat16)
            checkpoint.release()

    return Source(_hf_config(config, checkpoint.path), name_of, others)


def _hf_config(config: ModelConfig, path: Path) -> dict[str, Any]:
    rope = config.rope
    assert rope is not None
    if rope.scaling not in ("none", "linear") or rope.divisors is not None:
        problem = "stretches its context in a way that is not carried over: give a HF directory"
        raise ModelFileError(path, problem)
    architecture, model_type = _FROM_GGUF[config.architecture]
    scaling = {"rope_type": "linear", "factor": rope.factor} if rope.scaling == "linear" else None
    return {
        "architectures": [architecture],
        "model_type": model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_context_tokens,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": config.output_bias,
        "mlp_bias": config.mlp_bias,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(config.eos_token_ids) or None,
        "torch_dtype": "bfloat16",
    }
