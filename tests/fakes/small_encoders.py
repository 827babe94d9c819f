"""Small random encoders of every family, as `transformers` saves them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    DebertaV2Model,
    ModernBertConfig,
    ModernBertForMaskedLM,
    ModernBertForSequenceClassification,
    ModernBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
    RobertaModel,
    XLMRobertaConfig,
    XLMRobertaForSequenceClassification,
    XLMRobertaModel,
)

from services.engine.core.encoding.batch import EncoderBatch, make_batch
from services.engine.core.encoding.loader import OpenedEncoder, open_encoder

VOCAB_SIZE = 97
HIDDEN_SIZE = 64
# Weights of a size that makes attention care for what it sees.
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 80,
    "initializer_range": 0.15,
}
_ROBERTA: dict[str, Any] = {**_SHAPE, "type_vocab_size": 1, "pad_token_id": 1}
_MODERN: dict[str, Any] = {
    **_SHAPE,
    "local_attention": 16,
    "pad_token_id": 0,
    "cls_token_id": 1,
    "bos_token_id": 1,
    "sep_token_id": 2,
    "eos_token_id": 2,
}
_BIASES = {"norm_bias": True, "attention_bias": True, "mlp_bias": True, "classifier_bias": True}
_DEBERTA: dict[str, Any] = {
    **_SHAPE,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "position_buckets": 16,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
}
_CLASSES = {"id2label": {0: "bad", 1: "so-so", 2: "good"}}

MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "bert": lambda: BertModel(BertConfig(**_SHAPE)),
    "bert with another activation": lambda: BertModel(
        BertConfig(**_SHAPE, hidden_act="gelu_new", type_vocab_size=3)
    ),
    "bert of masked words": lambda: BertForMaskedLM(BertConfig(**_SHAPE)),
    "bert that classifies": lambda: BertForSequenceClassification(BertConfig(**_SHAPE, **_CLASSES)),
    "bert that scores": lambda: BertForSequenceClassification(BertConfig(**_SHAPE, num_labels=1)),
    "roberta": lambda: RobertaModel(RobertaConfig(**_ROBERTA)),
    "xlm-roberta that classifies": lambda: XLMRobertaForSequenceClassification(
        XLMRobertaConfig(**_ROBERTA, **_CLASSES)
    ),
    "roberta that classifies": lambda: RobertaForSequenceClassification(
        RobertaConfig(**_ROBERTA, **_CLASSES)
    ),
    "roberta that scores": lambda: RobertaForSequenceClassification(
        RobertaConfig(**_ROBERTA, num_labels=1)
    ),
    "xlm-roberta": lambda: XLMRobertaModel(XLMRobertaConfig(**_ROBERTA)),
    "xlm-roberta that scores": lambda: XLMRobertaForSequenceClassification(
        XLMRobertaConfig(**_ROBERTA, num_labels=1)
    ),
    "modernbert that scores": lambda: ModernBertForSequenceClassification(
        ModernBertConfig(**_MODERN, num_labels=1)
    ),
    "deberta that scores": lambda: DebertaV2ForSequenceClassification(
        DebertaV2Config(**_DEBERTA, num_labels=1)
    ),
    "modernbert": lambda: ModernBertModel(ModernBertConfig(**_MODERN)),
    "modernbert of masked words": lambda: ModernBertForMaskedLM(ModernBertConfig(**_MODERN)),
    "modernbert that classifies": lambda: ModernBertForSequenceClassification(
        ModernBertConfig(**_MODERN, **_CLASSES, **_BIASES, classifier_pooling="mean")
    ),
    "deberta": lambda: DebertaV2Model(DebertaV2Config(**_DEBERTA)),
    "deberta that classifies": lambda: DebertaV2ForSequenceClassification(
        DebertaV2Config(**_DEBERTA, **_CLASSES)
    ),
    "deberta of version 2": lambda: DebertaV2Model(
        DebertaV2Config(
            **_DEBERTA | {"share_att_key": False, "type_vocab_size": 2},
            conv_kernel_size=3,
            conv_act="gelu",
        )
    ),
    "deberta without buckets": lambda: DebertaV2Model(
        DebertaV2Config(
            **_DEBERTA
            | {"position_buckets": -1, "pos_att_type": ["c2p"], "position_biased_input": True},
            max_relative_positions=20,
        )
    ),
}


def save_small_encoder(name: str, path: Path) -> PreTrainedModel:
    """Save the model of `name` in MODELS, with biases and norms that do something; return it."""
    torch.manual_seed(0)
    model = MODELS[name]().float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.save_pretrained(path)
    return model


def token_vectors(
    model: PreTrainedModel, token_ids: list[int], second_text_start: int | None = None
) -> torch.Tensor:
    """What `transformers` computes for one sequence, [num_tokens, hidden_size]."""
    with torch.no_grad():
        return model.base_model(**_inputs(model, token_ids, second_text_start)).last_hidden_state[0]


def class_logits(
    model: PreTrainedModel, token_ids: list[int], second_text_start: int | None = None
) -> torch.Tensor:
    """The logits of the classes, [num_labels]."""
    with torch.no_grad():
        return model(**_inputs(model, token_ids, second_text_start)).logits[0]


def _inputs(
    model: PreTrainedModel, token_ids: list[int], second_text_start: int | None
) -> dict[str, torch.Tensor]:
    ids = torch.tensor([token_ids])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if getattr(model.config, "type_vocab_size", 0) > 1 and second_text_start is not None:
        inputs["token_type_ids"] = (torch.arange(len(token_ids)) >= second_text_start).long()[None]
    return inputs


# Of several lengths, some of them more than once; longer than a window and a bucket.
LENGTHS = (5, 30, 3, 5, 70, 1, 30, 17)
SECOND_TEXTS = (2, None, None, 3, 40, None, 11, None)


def sequences() -> list[list[int]]:
    """Sequences of LENGTHS."""
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS
    ]


def batch_of_all() -> EncoderBatch:
    """All of them."""
    return make_batch(sequences(), SECOND_TEXTS)


class SavedEncoders:
    """Saves each model once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._models: dict[str, PreTrainedModel] = {}

    def save(self, name: str) -> tuple[PreTrainedModel, Path]:
        """The model as `transformers` has it, and where it is."""
        path = self._directory / name
        if name not in self._models:
            self._models[name] = save_small_encoder(name, path)
        return self._models[name], path

    def open(self, name: str) -> tuple[PreTrainedModel, OpenedEncoder]:
        """The model as `transformers` has it, and as we open it."""
        model, path = self.save(name)
        return model, open_encoder(path)
