"""Decoders whose feed-forward layers are mixtures of experts: Mixtral, Qwen3-MoE.

Jiang et al., arXiv:2401.04088; Yang et al., arXiv:2505.09388.
"""

from __future__ import annotations

from dataclasses import replace

from services.engine.core.model_config import ExpertsConfig, ModelConfig
from services.engine.core.models.family import Family
from services.engine.core.models.hf_config import HfConfig, decoder_config
from services.engine.core.models.llama import QK_NORMS_GGUF, QK_NORMS_HF, Llama
from services.engine.core.weights.names import FROM_GGUF, FROM_HF, decoder_names
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.gguf_model import GGUFModel


def _mixtral_config(hf: HfConfig) -> ModelConfig:
    config, fields = decoder_config(hf), hf.model
    experts = ExpertsConfig(
        count=fields.integer("num_local_experts"),
        per_token=fields.integer("num_experts_per_tok"),
        intermediate_size=config.intermediate_size,
        normalize=True,
    )
    return replace(config, experts=experts)


def _qwen3_config(hf: HfConfig) -> ModelConfig:
    config, fields = decoder_config(hf), hf.model
    every = fields.integer("decoder_sparse_step", 1)
    if every < 1:
        raise ModelFileError(fields.path, f"{every} is no distance", what="decoder_sparse_step")
    dense = {layer for layer in range(config.num_layers) if (layer + 1) % every}
    experts = ExpertsConfig(
        # The newer name is that of Mixtral.
        count=fields.integer("num_experts" if "num_experts" in fields.raw else "num_local_experts"),
        per_token=fields.integer("num_experts_per_tok"),
        intermediate_size=fields.integer("moe_intermediate_size"),
        normalize=fields.flag("norm_topk_prob"),
        dense_layers=frozenset(dense.union(fields.integers("mlp_only_layers"))),
    )
    return replace(config, qk_norm=True, experts=experts)


def gguf_experts(config: ModelConfig, file: GGUFModel) -> ModelConfig:
    """With the experts that a GGUF file has, if any."""
    metadata, prefix = file.metadata, config.architecture
    count = metadata.integer(f"{prefix}.expert_count", 0)
    if count == 0:
        return config
    size = metadata.integer(f"{prefix}.expert_feed_forward_length", config.intermediate_size)
    experts = ExpertsConfig(
        count=count,
        per_token=metadata.integer(f"{prefix}.expert_used_count"),
        intermediate_size=size,
        normalize=True,
        dense_layers=frozenset(
            layer
            for layer in range(min(config.num_layers, len(file.tensors)))
            if f"blk.{layer}.ffn_gate_inp.weight" not in file.tensors
        ),
    )
    return replace(config, experts=experts)


def _qwen3_gguf(config: ModelConfig, file: GGUFModel) -> ModelConfig:
    return replace(gguf_experts(config, file), qk_norm=True)


GGUF_EXPERTS = {
    "blk.{}.ffn_gate_inp": "layers.{}.feed_forward.router",
    "blk.{}.ffn_gate_exps": "layers.{}.feed_forward.experts.gate",
    "blk.{}.ffn_up_exps": "layers.{}.feed_forward.experts.up",
    "blk.{}.ffn_down_exps": "layers.{}.feed_forward.experts.down",
}
MIXTRAL_HF = FROM_HF | {
    "model.layers.{}.block_sparse_moe.gate": "layers.{}.feed_forward.router",
    "model.layers.{}.block_sparse_moe.experts.{}.w1": "layers.{}.feed_forward.experts.{}.gate",
    "model.layers.{}.block_sparse_moe.experts.{}.w3": "layers.{}.feed_forward.experts.{}.up",
    "model.layers.{}.block_sparse_moe.experts.{}.w2": "layers.{}.feed_forward.experts.{}.down",
}
QWEN3_MOE_HF = (
    FROM_HF
    | QK_NORMS_HF
    | {
        "model.layers.{}.mlp.gate": "layers.{}.feed_forward.router",
        **{
            f"model.layers.{{}}.mlp.experts.{{}}.{part}_proj": (
                f"layers.{{}}.feed_forward.experts.{{}}.{part}"
            )
            for part in ("gate", "up", "down")
        },
    }
)
MIXTRAL = Family(
    Llama,
    hf_names=decoder_names(MIXTRAL_HF),
    # In GGUF it is a `llama` with experts.
    gguf_names=None,
    hf_config=_mixtral_config,
)
QWEN3_MOE = Family(
    Llama,
    hf_names=decoder_names(QWEN3_MOE_HF),
    gguf_names=decoder_names(FROM_GGUF | QK_NORMS_GGUF | GGUF_EXPERTS),
    hf_config=_qwen3_config,
    gguf_config=_qwen3_gguf,
)
