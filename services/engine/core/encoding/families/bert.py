"""BERT and RoBERTa, XLM-R and CamemBERT, which count their positions otherwise.

Devlin et al., arXiv:1810.04805; Liu et al., arXiv:1907.11692; Conneau et al., arXiv:1911.02116.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from services.engine.core.encoding.batch import EncoderBatch
from services.engine.core.encoding.config import EncoderConfig, read_common, read_token_types
from services.engine.core.encoding.heads import ClassificationHead
from services.engine.core.encoding.layers import Attention, InputEmbeddings, PostNormLayer
from services.engine.core.encoding.model import Encoder
from services.engine.core.kernels.cpu.encoder_program import EncoderBuffer, EncoderProgramBuilder
from services.engine.core.kernels.cpu.program import Epilogue
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.fields import Fields


class Bert(Encoder):
    """Layers that are normalised after each half, over embeddings of absolute positions."""

    PREFIX = "bert"
    NAMES: ClassVar = {
        "embeddings.word_embeddings": "embeddings.word",
        "embeddings.position_embeddings": "embeddings.position",
        "embeddings.token_type_embeddings": "embeddings.token_type",
        "embeddings.LayerNorm": "embeddings.norm",
        "encoder.layer.{}.attention.self.query": "layers.{}.attention.q",
        "encoder.layer.{}.attention.self.key": "layers.{}.attention.k",
        "encoder.layer.{}.attention.self.value": "layers.{}.attention.v",
        "encoder.layer.{}.attention.output.dense": "layers.{}.attention.output",
        "encoder.layer.{}.attention.output.LayerNorm": "layers.{}.attention_norm",
        "encoder.layer.{}.intermediate.dense": "layers.{}.feed_forward.up",
        "encoder.layer.{}.output.dense": "layers.{}.feed_forward.down",
        "encoder.layer.{}.output.LayerNorm": "layers.{}.feed_forward_norm",
    }
    HEAD_NAMES: ClassVar = {"bert.pooler.dense": "head.dense", "classifier": "head.output"}

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__(config)
        self.embeddings = InputEmbeddings(
            config.vocab_size,
            config.hidden_size,
            config.norm_eps,
            positions=config.positions,
            token_types=config.token_types,
            first_position=config.first_position,
        )
        self.layers = nn.ModuleList(
            PostNormLayer(
                Attention(config.hidden_size, config.heads),
                config.hidden_size,
                config.intermediate_size,
                config.activation,
                config.norm_eps,
            )
            for _ in range(config.num_layers)
        )
        if config.labels:
            self.head = ClassificationHead(
                config.hidden_size, len(config.labels), activation="tanh"
            )

    @classmethod
    def read_config(cls, fields: Fields) -> EncoderConfig:
        kind = fields.text("position_embedding_type", "absolute")
        if kind != "absolute":
            raise ModelFileError(
                fields.path, f"{kind!r} is not supported", what="position_embedding_type"
            )
        common = read_common(fields, norm_eps="layer_norm_eps", activation="hidden_act")
        return EncoderConfig(**common, token_types=read_token_types(fields, 2))

    @torch.inference_mode()
    def encode(self, batch: EncoderBatch) -> Tensor:
        hidden: Tensor = self.embeddings(batch)
        for layer in self.layers:
            hidden = layer(hidden, batch)
        return hidden

    def lower(self, program: EncoderProgramBuilder) -> None:
        embeddings = self.embeddings
        program.embed(
            embeddings.word, embeddings.position, embeddings.token_type, embeddings.first_position
        )
        program.norm(embeddings.norm, replaces=True)
        for layer in self.layers:
            assert isinstance(layer, PostNormLayer)
            attention, feed_forward = layer.attention, layer.feed_forward
            assert isinstance(attention, Attention)
            program.linear(attention.qkv, EncoderBuffer.PROJECTED)
            program.attention()
            program.activate(EncoderBuffer.ATTENDED)
            program.linear(attention.output, EncoderBuffer.HIDDEN, epilogue=Epilogue.ADD)
            program.norm(layer.attention_norm, replaces=True)
            program.linear(feed_forward.up, EncoderBuffer.INNER)
            program.activate(EncoderBuffer.INNER, feed_forward.activation)
            program.linear(feed_forward.down, EncoderBuffer.HIDDEN, epilogue=Epilogue.ADD)
            program.norm(layer.feed_forward_norm, replaces=True)


class Roberta(Bert):
    """Its positions begin after that of the padding token."""

    PREFIX = "roberta"
    HEAD_NAMES: ClassVar = {"classifier.dense": "head.dense", "classifier.out_proj": "head.output"}

    @classmethod
    def read_config(cls, fields: Fields) -> EncoderConfig:
        common = read_common(fields, norm_eps="layer_norm_eps", activation="hidden_act")
        first = fields.integer("pad_token_id", 1) + 1
        if not 0 <= first < common["positions"]:
            problem = f"{first - 1} leaves no position"
            raise ModelFileError(fields.path, problem, what="pad_token_id")
        token_types = read_token_types(fields, 1)
        return EncoderConfig(**common, token_types=token_types, first_position=first)
