"""Where a model that is to be quantised comes from, in the names and files of a HF directory."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from services.engine.core.model_config import ModelConfig
from services.engine.core.models.llama import QK_NORMS_HF
from services.engine.core.models.loader import OpenedModel
from services.engine.core.models.mixture import MIXTRAL_HF, QWEN3_MOE_HF
from services.engine.core.weights.checkpoint import Checkpoint
from services.engine.core.weights.names import FROM_HF, model_name
from services.engine.core.weights.tensor_files import SafetensorsFiles
from services.runtime.modelfiles import ModelFileError


@dataclass(frozen=True, slots=True)
class _Becomes:
    """What a GGUF file's architecture is called in HF, and the names of its tensors there."""

    architecture: str
    model_type: str
    names: Mapping[str, str]


# GGUF's architectures that become a HF one of the same shape, by whether they have experts.
_FROM_GGUF = {
    ("llama", False): _Becomes("LlamaForCausalLM", "llama", FROM_HF),
    ("llama", True): _Becomes("MixtralForCausalLM", "mixtral", MIXTRAL_HF),
    ("qwen2", False): _Becomes("Qwen2ForCausalLM", "qwen2", FROM_HF),
    ("qwen3", False): _Becomes("Qwen3ForCausalLM", "qwen3", FROM_HF | QK_NORMS_HF),
    ("qwen3moe", True): _Becomes("Qwen3MoeForCausalLM", "qwen3_moe", QWEN3_MOE_HF),
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
    kind = (config.architecture, config.experts is not None)
    if kind not in _FROM_GGUF:
        known = ", ".join(sorted({architecture for architecture, _ in _FROM_GGUF}))
        problem = f"is a GGUF file of {config.architecture!r}; of these only {known} can be "
        raise ModelFileError(checkpoint.path, problem + "quantised: give a HF directory")
    names = {ours: theirs for theirs, ours in _FROM_GGUF[kind].names.items()}

    def name_of(name: str) -> str:
        found = model_name(name, names)
        assert found is not None, name
        return found

    def others(rounded: Collection[str]) -> Iterator[tuple[str, Tensor]]:
        for name in checkpoint.shapes:
            if name in rounded or (name == "head.weight" and config.tie_embeddings):
                continue
            # The matrices of all experts are one stack there, and files of their own in HF.
            pieces = _pieces(name, len(checkpoint.shapes[name]), config)
            left = [(index, each) for index, each in pieces if each not in rounded]
            tensor = checkpoint.read(name).to(torch.bfloat16) if left else None
            for index, each in left:
                assert tensor is not None
                yield name_of(each), tensor if index is None else tensor[index]
            checkpoint.release()

    return Source(_hf_config(config, checkpoint.path, _FROM_GGUF[kind]), name_of, others)


def _pieces(name: str, dimensions: int, config: ModelConfig) -> list[tuple[int | None, str]]:
    """The tensors of HF that one of a GGUF file holds, by the model's names."""
    if dimensions < 3 or config.experts is None:
        return [(None, name)]
    head, _, part = name.rpartition(".experts.")
    return [(index, f"{head}.experts.{index}.{part}") for index in range(config.experts.count)]


def _hf_config(config: ModelConfig, path: Path, becomes: _Becomes) -> dict[str, Any]:
    rope = config.rope
    assert rope is not None
    if rope.scaling not in ("none", "linear") or rope.divisors is not None:
        problem = "stretches its context in a way that is not carried over: give a HF directory"
        raise ModelFileError(path, problem)
    scaling = {"rope_type": "linear", "factor": rope.factor} if rope.scaling == "linear" else None
    return {
        "architectures": [becomes.architecture],
        "model_type": becomes.model_type,
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
        **_of_experts(config),
    }


def _of_experts(config: ModelConfig) -> dict[str, Any]:
    experts = config.experts
    if experts is None:
        return {}
    if config.architecture == "llama":
        return {"num_local_experts": experts.count, "num_experts_per_tok": experts.per_token}
    return {
        "num_experts": experts.count,
        "num_experts_per_tok": experts.per_token,
        "moe_intermediate_size": experts.intermediate_size,
        "norm_topk_prob": experts.normalize,
        "mlp_only_layers": sorted(experts.dense_layers),
        "decoder_sparse_step": 1,
    }
