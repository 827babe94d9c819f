"""Models of known shapes whose weights are made where they are wanted: nothing is downloaded.

Weights are normal with a standard deviation of 0.02, as models are initialised, and norms are one:
what a step takes depends on shapes alone, as long as no number overflows.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from services.engine.core.kernels.cpu.packing import GroupedWeight
from services.engine.core.model_config import SparseAttention
from services.engine.core.models.loader import OpenedModel, build_skeleton, read_config
from services.engine.core.weights.loading import weight_slots

LLAMA_31_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
QWEN3_600M: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_STD = 0.02


def tiny(config: dict[str, Any]) -> dict[str, Any]:
    """The same architecture in a size that any processor computes at once."""
    return config | {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_scaling": None,
    }


class SyntheticCheckpoint:
    """A checkpoint whose tensors are made on a device when they are read; see `Checkpoint`."""

    is_quantised = False

    def __init__(self, path: Path, shapes: dict[str, tuple[int, ...]], device: torch.device):
        self.path = path
        self.shapes = shapes
        self.unknown: list[str] = []
        self._device = device

    @property
    def num_bytes(self) -> int:
        return sum(map(self.stored_bytes, self.shapes))

    def read(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if len(shape) == 1:
            fill = 0.0 if name.endswith(".bias") else 1.0
            return torch.full(shape, fill, dtype=torch.bfloat16, device=self._device)
        generator = torch.Generator(self._device).manual_seed(zlib.crc32(name.encode()))
        empty = torch.empty(shape, dtype=torch.bfloat16, device=self._device)
        return empty.normal_(std=_STD, generator=generator)

    def read_grouped(self, name: str) -> GroupedWeight | None:
        return None

    def outline(self, name: str) -> GroupedWeight | None:
        return None

    def stored_as(self, name: str) -> str:
        return "BF16"

    def stored_bytes(self, name: str) -> int:
        return 2 * torch.Size(self.shapes[name]).numel()

    def source_name(self, name: str) -> str:
        return name

    def release(self) -> None:
        pass

    def close(self) -> None:
        pass


def write_config(config: dict[str, Any], directory: Path) -> Path:
    """Make a model's directory, with its configuration alone."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_adapter(config: dict[str, Any], directory: Path, *, rank: int, seed: int = 0) -> Path:
    """Make an adapter of all projections of a Llama or a Qwen, as PEFT writes it."""
    directory.mkdir(parents=True, exist_ok=True)
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head_dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    projections = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) * shape[1] ** -0.5).bfloat16()

    tensors: dict[str, Tensor] = {}
    for layer in range(config["num_hidden_layers"]):
        for name, (outputs, inputs) in projections.items():
            module = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{module}.lora_A.weight"] = normal(rank, inputs)
            tensors[f"{module}.lora_B.weight"] = normal(outputs, rank)
    save_file(tensors, directory / "adapter_model.safetensors")
    # The same scale as of small weights, so that no number overflows.
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": 0.1 * rank}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    return directory


def opener(device: torch.device) -> Any:
    """An `open_model` that reads a directory's configuration and makes up its weights."""

    def open_synthetic(
        path: Path | str,
        *,
        max_context_tokens: int | None = None,
        allow_pickled: bool = False,
        sparse_attention: SparseAttention | None = None,
    ) -> OpenedModel:
        config = replace(read_config(path), sparse_attention=sparse_attention)
        if max_context_tokens is not None:
            config = replace(config, max_context_tokens=max_context_tokens)
        skeleton = build_skeleton(config)
        shapes = {name: tuple(slot.shape) for name, slot in weight_slots(skeleton).items()}
        return OpenedModel(config, SyntheticCheckpoint(Path(path), shapes, device), skeleton)

    return open_synthetic
