"""GPT-2: learned positions, LayerNorm, one feed-forward layer that nothing gates.

Radford et al., "Language Models are Unsupervised Multitask Learners", 2019.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels.cpu.program import Buffer, Epilogue, ProgramBuilder
from services.engine.core.layers import Attention, Embedding, FeedForward, LayerNorm, StepContext
from services.engine.core.model_config import ModelConfig
from services.engine.core.models.base import Model
from services.engine.core.models.family import Family
from services.engine.core.models.hf_config import HfConfig, activation
from services.engine.core.weights.names import Treatment, decoder_names
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.gguf_model import GGUFModel


class GPT2Layer(nn.Module):
    """Attention and feed-forward, each behind a norm, both adding to the residual stream."""

    def __init__(self, config: ModelConfig, layer_index: int) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.attention = Attention(config, layer_index, rotary=None)
        self.feed_forward_norm = LayerNorm(config.hidden_size, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, hidden: Tensor, step: StepContext) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden), step)
        total: Tensor = hidden + self.feed_forward(self.feed_forward_norm(hidden))
        return total

    def lower(self, program: ProgramBuilder, *, is_last: bool) -> None:
        """The same as operations of the native kernels, on the residual stream."""
        program.norm(self.attention_norm)
        self.attention.lower(program, is_last=is_last)
        program.adapted_linear(self.attention.output, Buffer.RESIDUAL, epilogue=Epilogue.ADD)
        program.norm(self.feed_forward_norm)
        self.feed_forward.lower(program)
        program.adapted_linear(self.feed_forward.down, Buffer.RESIDUAL, epilogue=Epilogue.ADD)


class GPT2(Model):
    """A GPT-2 decoder."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.positions = Embedding(config.learned_positions, config.hidden_size)

    def make_layer(self, layer_index: int) -> nn.Module:
        return GPT2Layer(self.config, layer_index)

    def make_norm(self) -> LayerNorm:
        return LayerNorm(self.config.hidden_size, self.config.norm_eps)

    def embed(self, batch: ForwardBatch) -> Tensor:
        embedded: Tensor = self.embedding(batch.token_ids) + self.positions(batch.positions)
        return embedded

    def lower(self, program: ProgramBuilder) -> None:
        program.embed(self.embedding, positions=self.positions)
        for layer in self.layers:
            assert isinstance(layer, GPT2Layer)
            layer.lower(program, is_last=layer is self.layers[-1])
        program.norm(self.norm)
        program.linear(self.embedding if self.head is None else self.head, Buffer.LOGITS)


def _hf_config(hf: HfConfig) -> ModelConfig:
    fields = hf.model
    for name in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"):
        if fields.flag(name):
            raise ModelFileError(fields.path, "is not supported", what=name)
    hidden_size, heads = fields.integer("n_embd"), fields.integer("n_head")
    head_dim = hidden_size // max(heads, 1)
    return ModelConfig(
        architecture=hf.architecture,
        num_layers=fields.integer("n_layer"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("n_inner", 4 * hidden_size),
        heads=heads,
        kv_heads=heads,
        head_dim=head_dim,
        vocab_size=fields.integer("vocab_size"),
        max_context_tokens=fields.integer("n_positions"),
        norm_eps=fields.number("layer_norm_epsilon", 1e-5),
        rope=None,
        learned_positions=fields.integer("n_positions"),
        tie_embeddings=fields.flag("tie_word_embeddings", default=True),
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        activation=activation(fields),
        bos_token_id=hf.bos_token_id,
        eos_token_ids=hf.eos_token_ids,
    )


def _gguf_config(config: ModelConfig, file: GGUFModel) -> ModelConfig:
    return replace(
        config,
        rope=None,
        learned_positions=config.max_context_tokens,
        activation="gelu_tanh",
    )


def _treatment(name: str) -> Treatment:
    """The projections of a HF checkpoint lie column by column."""
    projections = ("attention.qkv.weight", "attention.output.weight", "up.weight", "down.weight")
    return "transposed" if name.endswith(projections) else "as stored"


GPT2_FAMILY = Family(
    GPT2,
    hf_names=decoder_names(
        {
            "wte": "embedding",
            "wpe": "positions",
            "ln_f": "norm",
            "lm_head": "head",
            "h.{}.ln_1": "layers.{}.attention_norm",
            "h.{}.attn.c_attn": "layers.{}.attention.qkv",
            "h.{}.attn.c_proj": "layers.{}.attention.output",
            "h.{}.ln_2": "layers.{}.feed_forward_norm",
            "h.{}.mlp.c_fc": "layers.{}.feed_forward.up",
            "h.{}.mlp.c_proj": "layers.{}.feed_forward.down",
        },
        drop=("transformer.",),
        treatment=_treatment,
    ),
    gguf_names=decoder_names(
        {
            "token_embd": "embedding",
            "position_embd": "positions",
            "output_norm": "norm",
            "output": "head",
            "blk.{}.attn_norm": "layers.{}.attention_norm",
            "blk.{}.attn_qkv": "layers.{}.attention.qkv",
            "blk.{}.attn_output": "layers.{}.attention.output",
            "blk.{}.ffn_norm": "layers.{}.feed_forward_norm",
            "blk.{}.ffn_up": "layers.{}.feed_forward.up",
            "blk.{}.ffn_down": "layers.{}.feed_forward.down",
        }
    ),
    hf_config=_hf_config,
    gguf_config=_gguf_config,
)
