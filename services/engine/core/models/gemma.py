"""Gemma 2 and 3: norms after each part as well as before, layers that see a window and layers that
see everything, soft-capped products (2) or norms of queries and keys (3).

Gemma Team, arXiv:2408.00118 and arXiv:2503.19786.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from services.engine.core.kernels.cpu.program import Buffer, Epilogue, ProgramBuilder
from services.engine.core.layers import Attention, GatedFeedForward, RMSNorm, StepContext
from services.engine.core.layers.rotary import RotaryEmbedding
from services.engine.core.model_config import ModelConfig, RopeConfig
from services.engine.core.models.base import Model
from services.engine.core.models.family import Family
from services.engine.core.models.hf_config import HfConfig, decoder_config, rope_of
from services.engine.core.models.llama import QK_NORMS_GGUF, QK_NORMS_HF
from services.engine.core.weights.names import FROM_GGUF, FROM_HF, Treatment, decoder_names
from services.runtime.modelfiles.fields import Fields
from services.runtime.modelfiles.gguf_model import GGUFModel

# Where a file does not say which layers have a window.
GEMMA2_PERIOD = 2
GEMMA3_PERIOD = 6
GEMMA3_LOCAL_THETA = 10_000.0
# The largest ones scale by the width of a head as if heads shared the hidden size; in GGUF, their
# number of layers alone tells them.
_GEMMA2_27B_LAYERS = 46
_GEMMA3_27B_LAYERS = 62


class GemmaLayer(nn.Module):
    """Attention and feed-forward, each between two norms, both adding to the residual stream."""

    def __init__(
        self, config: ModelConfig, layer_index: int, rotary: RotaryEmbedding | None
    ) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer_index, rotary)
        self.attention_post_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = GatedFeedForward(config)
        self.feed_forward_post_norm = RMSNorm(config.hidden_size, config.norm_eps)

    def forward(self, hidden: Tensor, step: StepContext) -> Tensor:
        normed, hidden = step.normed(self.attention_norm, hidden, self.attention.takes)
        attended = self.attention(normed, step)
        normed, hidden = self.feed_forward_norm.add(
            attended, hidden, self.feed_forward.takes, before=self.attention_post_norm
        )
        step.add_next(self.feed_forward(normed), before=self.feed_forward_post_norm)
        return hidden

    def lower(self, program: ProgramBuilder, *, is_last: bool) -> None:
        """The same as operations of the native kernels, on the residual stream."""
        program.norm(self.attention_norm)
        self.attention.lower(program, is_last=is_last)
        # The projections of queries, keys and values have been read, so theirs is a place to go.
        program.adapted_linear(self.attention.output, Buffer.PROJECTED)
        program.add_norm(self.attention_post_norm, Buffer.PROJECTED)
        program.norm(self.feed_forward_norm)
        self.feed_forward.lower(program)
        program.adapted_linear(self.feed_forward.down, Buffer.PROJECTED)
        program.add_norm(self.feed_forward_post_norm, Buffer.PROJECTED)


class Gemma(Model):
    """A Gemma 2 or 3 decoder."""

    def make_layer(self, layer_index: int) -> nn.Module:
        return GemmaLayer(self.config, layer_index, self.rotary_of(layer_index))

    def make_norm(self) -> RMSNorm:
        return RMSNorm(self.config.hidden_size, self.config.norm_eps)

    def lower(self, program: ProgramBuilder) -> None:
        # As a number of the weights' precision, as `embed` has it.
        scale = torch.tensor(self.config.embedding_scale, dtype=torch.bfloat16).item()
        program.embed(self.embedding, scale=scale)
        for layer in self.layers:
            assert isinstance(layer, GemmaLayer)
            layer.lower(program, is_last=layer is self.layers[-1])
        program.norm(self.norm)
        head, cap = self.head or self.embedding, self.config.logit_softcap
        if cap is None:
            program.linear(head, Buffer.LOGITS)
        else:
            program.linear(head, Buffer.LOGITS, epilogue=Epilogue.CAPPED, cap=cap)


def _gemma2_config(hf: HfConfig) -> ModelConfig:
    fields = hf.model
    config = _common(decoder_config(hf), fields, period=GEMMA2_PERIOD)
    return replace(
        config,
        attention_softcap=fields.optional_number("attn_logit_softcapping"),
        logit_softcap=fields.optional_number("final_logit_softcapping"),
    )


def _gemma3_config(hf: HfConfig) -> ModelConfig:
    fields = hf.model
    found = fields.raw.get("rope_parameters")
    tables = found if isinstance(found, dict) else {}
    by_kind = all(isinstance(each, dict) for each in tables.values()) and tables
    # One table for each kind of layer, or the old fields: the scaling is of those that see all.
    plain = replace(hf, model=Fields(fields.path, {**fields.raw, "rope_parameters": None}))
    config = decoder_config(plain if by_kind else hf)
    if by_kind:
        full, local = (
            rope_of(
                fields,
                Fields(fields.path, tables.get(kind) or {}),
                config.head_dim,
                config.max_context_tokens,
            )
            for kind in ("full_attention", "sliding_attention")
        )
    else:
        theta = fields.number("rope_local_base_freq", GEMMA3_LOCAL_THETA)
        assert config.rope is not None
        full, local = config.rope, RopeConfig(theta, config.head_dim)
    config = replace(_common(config, fields, period=GEMMA3_PERIOD), rope=full, local_rope=local)
    return replace(
        config,
        qk_norm=True,
        attention_softcap=fields.optional_number("attn_logit_softcapping"),
        logit_softcap=fields.optional_number("final_logit_softcapping"),
    )


def _common(config: ModelConfig, fields: Fields, *, period: int) -> ModelConfig:
    scale = fields.number("query_pre_attn_scalar", config.head_dim)
    windows = config.windows
    if windows and not isinstance(fields.raw.get("layer_types"), list):
        windows = _windows(
            config.num_layers,
            fields.integer("sliding_window"),
            fields.integer("sliding_window_pattern", period),
        )
    return replace(
        config,
        windows=windows,
        # Both have it so unless they say otherwise, and most do not say.
        tie_embeddings=fields.flag("tie_word_embeddings", default=True),
        activation="gelu_tanh",
        attention_scale=scale**-0.5 if scale > 0 else scale,
        embedding_scale=config.hidden_size**0.5,
    )


def _windows(num_layers: int, size: int, period: int) -> tuple[int | None, ...]:
    """One layer in `period` sees everything: the last of each."""
    return tuple(size if (layer + 1) % max(period, 1) else None for layer in range(num_layers))


def _gemma2_gguf(config: ModelConfig, file: GGUFModel) -> ModelConfig:
    metadata = file.metadata
    window = metadata.integer("gemma2.attention.sliding_window", 4096)
    return replace(
        _common_gguf(config, _GEMMA2_27B_LAYERS),
        windows=_windows(config.num_layers, window, GEMMA2_PERIOD),
        attention_softcap=metadata.number("gemma2.attn_logit_softcapping", 50.0),
        logit_softcap=metadata.number("gemma2.final_logit_softcapping", 30.0),
    )


def _gemma3_gguf(config: ModelConfig, file: GGUFModel) -> ModelConfig:
    metadata = file.metadata
    window = metadata.integer("gemma3.attention.sliding_window", 0)
    theta = metadata.number("gemma3.rope.freq_base_swa", GEMMA3_LOCAL_THETA)
    return replace(
        _common_gguf(config, _GEMMA3_27B_LAYERS),
        windows=_windows(config.num_layers, window, GEMMA3_PERIOD) if window else (),
        local_rope=RopeConfig(theta, config.head_dim),
        qk_norm=True,
    )


def _common_gguf(config: ModelConfig, layers_of_27b: int) -> ModelConfig:
    is_27b = config.num_layers == layers_of_27b
    width = config.hidden_size // config.heads if is_27b else config.head_dim
    return replace(
        config,
        activation="gelu_tanh",
        attention_scale=width**-0.5,
        embedding_scale=config.hidden_size**0.5,
    )


def _treatment(name: str) -> Treatment:
    """HF stores what norms differ from 1 by; GGUF stores them as they are."""
    return "plus one" if name.endswith("norm.weight") else "as stored"


_HF_NAMES = FROM_HF | {
    "model.layers.{}.post_attention_layernorm": "layers.{}.attention_post_norm",
    "model.layers.{}.pre_feedforward_layernorm": "layers.{}.feed_forward_norm",
    "model.layers.{}.post_feedforward_layernorm": "layers.{}.feed_forward_post_norm",
}
_GGUF_NAMES = FROM_GGUF | {
    "blk.{}.post_attention_norm": "layers.{}.attention_post_norm",
    "blk.{}.post_ffw_norm": "layers.{}.feed_forward_post_norm",
}
GEMMA2 = Family(
    Gemma,
    hf_names=decoder_names(_HF_NAMES, treatment=_treatment),
    gguf_names=decoder_names(_GGUF_NAMES),
    hf_config=_gemma2_config,
    gguf_config=_gemma2_gguf,
)
GEMMA3 = Family(
    Gemma,
    hf_names=decoder_names(
        _HF_NAMES | QK_NORMS_HF,
        # Of the ones that also see images, the decoder alone is served.
        drop=("language_model.", "model.language_model."),
        needless=("vision_tower.", "model.vision_tower.", "multi_modal_projector."),
        treatment=_treatment,
    ),
    gguf_names=decoder_names(_GGUF_NAMES | QK_NORMS_GGUF),
    hf_config=_gemma3_config,
    gguf_config=_gemma3_gguf,
)
