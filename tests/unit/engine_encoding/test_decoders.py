"""Decoders give the vectors that `transformers` gives before the head, for embeddings of them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from services.engine.core.encoding.batch import make_batch
from services.engine.core.encoding.decoder import makes_embeddings, open_decoder
from services.engine.core.encoding.loader import is_encoder
from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.team import Team
from services.runtime.modelfiles import ModelFileError
from tests.fakes.decoder_families import FAMILIES, make_model, served
from tests.fakes.paged_step import libraries
from tests.fakes.small_encoders import VOCAB_SIZE, batch_of_all, sequences

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 80,
    "initializer_range": 0.1,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE)),
    "llama, tied": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE, tie_word_embeddings=True)),
    "llama without a head": lambda: LlamaModel(LlamaConfig(**_SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCAB_SIZE, n_embd=64, n_layer=3, n_head=4, n_positions=80)
    ),
} | {
    case: partial(make_model, case, **served(case, max_position_embeddings=80))
    for case in FAMILIES
    if case not in ("llama", "qwen3", "gpt2")
}


def save(name: str, path: Path, max_seq_length: int | None = None) -> PreTrainedModel:
    torch.manual_seed(0)
    model = MODELS[name]().float().eval()
    model.save_pretrained(path)
    kinds = [("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")]
    (path / "modules.json").write_text(
        json.dumps([{"type": f"sentence_transformers.models.{k}", "path": p} for k, p in kinds])
    )
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling/config.json").write_text('{"pooling_mode_lasttoken": true}')
    if max_seq_length is not None:
        (path / "sentence_bert_config.json").write_text(f'{{"max_seq_length": {max_seq_length}}}')
    return model


def expected_vectors(model: PreTrainedModel, token_ids: list[int]) -> Tensor:
    with torch.no_grad():
        return model.base_model(torch.tensor([token_ids])).last_hidden_state[0]


@pytest.mark.proves("{name}", "embeddings")
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("batch_tokens", [512, 16])
def test_vectors_are_those_of_transformers(tmp_path: Path, name: str, batch_tokens: int) -> None:
    """Of sequences together in one step, and of one in several."""
    reference = save(name, tmp_path)
    assert makes_embeddings(tmp_path)
    assert not is_encoder(tmp_path)
    opened = open_decoder(tmp_path)
    assert opened.outputs.poolings == ("last",)
    assert opened.outputs.normalize
    model = opened.load(torch.float32, torch.device("cpu"), batch_tokens=batch_tokens)
    groups = [sequences()] if batch_tokens > 100 else [[each] for each in sequences()]
    for group in groups:
        batch = make_batch(group)
        for found, token_ids in zip(model(batch).split(batch.lengths), group, strict=True):
            expected = expected_vectors(reference, token_ids)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not libraries(), reason="no native kernels on this machine")
@pytest.mark.parametrize("kernels", libraries(), ids=lambda each: each.isa)
@pytest.mark.parametrize("name", ["llama", "llama, tied", "llama without a head"])
def test_native_vectors_are_near(tmp_path: Path, kernels: Library, name: str) -> None:
    save(name, tmp_path)
    opened = open_decoder(tmp_path)
    plain = opened.load(torch.float32, torch.device("cpu"), batch_tokens=512)
    native, _ = opened.load_natively(Team(kernels, 2), "auto", batch_tokens=512)
    for _ in range(2):
        found, expected = native(batch_of_all()), plain(batch_of_all())
        assert torch.cosine_similarity(found, expected, dim=-1).min() > 0.999


def test_a_broken_sequence_leaves_nothing_to_the_next_batch(tmp_path: Path) -> None:
    save("llama", tmp_path)
    opened = open_decoder(tmp_path)
    model = opened.load(torch.float32, torch.device("cpu"), batch_tokens=512)
    expected = model(batch_of_all())
    weight = model._model.embedding.weight
    kept = weight[5].clone()
    weight[5] = float("nan")
    assert model(make_batch([[5] * 70] * 7)).isnan().all()
    weight[5] = kept
    torch.testing.assert_close(model(batch_of_all()), expected)


def test_the_context_is_what_the_model_was_made_for_or_what_is_asked(tmp_path: Path) -> None:
    save("llama", tmp_path, max_seq_length=40)
    assert open_decoder(tmp_path).shape.max_tokens == 40
    assert open_decoder(tmp_path, max_context_tokens=70).shape.max_tokens == 70
    with pytest.raises(ModelFileError, match="positions for 80"):
        open_decoder(tmp_path, max_context_tokens=81)


def test_a_decoder_of_its_own_generates(tmp_path: Path) -> None:
    save("llama", tmp_path)
    (tmp_path / "modules.json").unlink()
    assert not makes_embeddings(tmp_path)
