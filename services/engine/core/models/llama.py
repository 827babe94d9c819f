"""The Llama family, and the many that share its layers: Llama 2 and 3, SmolLM2, Mistral, Qwen2,
Qwen3, Phi-3.

Touvron et al., arXiv:2307.09288; Grattafiori et al., arXiv:2407.21783; Jiang et al.,
arXiv:2310.06825; Qwen, arXiv:2412.15115 and 2505.09388; Abdin et al., arXiv:2404.14219.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from services.engine.core.kernels.cpu.program import Buffer, Epilogue, ProgramBuilder
from services.engine.core.layers import (
    Attention,
    GatedFeedForward,
    MixtureOfExperts,
    RMSNorm,
    StepContext,
)
from services.engine.core.layers.rotary import RotaryEmbedding
from services.engine.core.model_config import ModelConfig
from services.engine.core.models.base import Model
from services.engine.core.models.family import Family
from services.engine.core.models.hf_config import HfConfig, decoder_config
from services.engine.core.weights.names import FROM_GGUF, FROM_HF, decoder_names
from services.runtime.modelfiles.gguf_model import GGUFModel


class LlamaLayer(nn.Module):
    """Attention and feed-forward, each behind a norm, both adding to the residual stream."""

    def __init__(
        self, config: ModelConfig, layer_index: int, rotary: RotaryEmbedding | None
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer_index, rotary)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward: GatedFeedForward | MixtureOfExperts
        experts = config.experts
        if experts is None or layer_index in experts.dense_layers:
            self.feed_forward = GatedFeedForward(config)
        else:
            self.feed_forward = MixtureOfExperts(config, experts)

    def forward(self, hidden: Tensor, step: StepContext) -> Tensor:
        normed, hidden = step.normed(self.attention_norm, hidden, self.attention.takes)
        attended = self.attention(normed, step)
        normed, hidden = self.feed_forward_norm.add(attended, hidden, self.feed_forward.takes)
        step.add_next(self.feed_forward(normed))
        return hidden

    def lower(self, program: ProgramBuilder, *, is_last: bool) -> None:
        """The same as operations of the native kernels, on the residual stream."""
        program.norm(self.attention_norm)
        self.attention.lower(program, is_last=is_last)
        program.adapted_linear(self.attention.output, Buffer.RESIDUAL, epilogue=Epilogue.ADD)
        if isinstance(self.feed_forward, MixtureOfExperts):
            program.mixture_of_experts(
                self.feed_forward_norm, self.feed_forward, Epilogue.GATED_SILU
            )
            return
        program.norm(self.feed_forward_norm)
        self.feed_forward.lower(program)
        program.adapted_linear(self.feed_forward.down, Buffer.RESIDUAL, epilogue=Epilogue.ADD)


class Llama(Model):
    """A Llama-family decoder."""

    def make_layer(self, layer_index: int) -> nn.Module:
        return LlamaLayer(self.config, layer_index, self.rotary_of(layer_index))

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps)

    def lower(self, program: ProgramBuilder) -> None:
        program.embed(self.embedding)
        for layer in self.layers:
            assert isinstance(layer, LlamaLayer)
            layer.lower(program, is_last=layer is self.layers[-1])
        program.norm(self.norm)
        program.linear(self.embedding if self.head is None else self.head, Buffer.LOGITS)


def _qwen2_config(hf: HfConfig) -> ModelConfig:
    """Qwen2 has biases where no field says so."""
    return replace(decoder_config(hf), qkv_bias=True, output_bias=False)


def _qwen3_config(hf: HfConfig) -> ModelConfig:
    return replace(decoder_config(hf), qk_norm=True)


def _phi3_gguf(config: ModelConfig, file: GGUFModel) -> ModelConfig:
    window = file.metadata.integer("phi3.attention.sliding_window", 0)
    return replace(config, windows=(window,) * config.num_layers if window else ())


QK_NORMS_HF = {
    "model.layers.{}.self_attn.q_norm": "layers.{}.attention.q_norm",
    "model.layers.{}.self_attn.k_norm": "layers.{}.attention.k_norm",
}
QK_NORMS_GGUF = {
    "blk.{}.attn_q_norm": "layers.{}.attention.q_norm",
    "blk.{}.attn_k_norm": "layers.{}.attention.k_norm",
}
HF = decoder_names(FROM_HF)
GGUF = decoder_names(FROM_GGUF)

LLAMA = Family(Llama, hf_names=HF, gguf_names=GGUF, gguf_pairs_rows=True)
# The same in all but two: the window, which Mistral's configuration has, and GGUF's order of rows.
MISTRAL = LLAMA
QWEN2 = Family(Llama, hf_names=HF, gguf_names=GGUF, hf_config=_qwen2_config)
QWEN3 = Family(
    Llama,
    hf_names=decoder_names(FROM_HF | QK_NORMS_HF),
    gguf_names=decoder_names(FROM_GGUF | QK_NORMS_GGUF),
    hf_config=_qwen3_config,
    gguf_config=lambda config, file: replace(config, qk_norm=True),
)
# Projections of the same input are stored as one.
PHI3 = Family(
    Llama,
    hf_names=decoder_names(
        FROM_HF
        | {
            "model.layers.{}.self_attn.qkv_proj": "layers.{}.attention.qkv",
            "model.layers.{}.mlp.gate_up_proj": "layers.{}.feed_forward.gate_up",
        }
    ),
    gguf_names=decoder_names(
        FROM_GGUF
        | {
            "blk.{}.attn_qkv": "layers.{}.attention.qkv",
            "blk.{}.ffn_up": "layers.{}.feed_forward.gate_up",
        }
    ),
    gguf_config=_phi3_gguf,
)
