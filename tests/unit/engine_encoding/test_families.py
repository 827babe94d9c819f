"""Every family computes what `transformers` computes, all sequences of a batch at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from services.engine.core.encoding.batch import make_batch
from services.engine.core.encoding.loader import is_encoder, open_encoder
from services.engine.core.encoding.pooling import pool
from services.runtime.modelfiles import ModelFileError
from tests.fakes.small_encoders import (
    MODELS,
    SECOND_TEXTS,
    SavedEncoders,
    batch_of_all,
    class_logits,
    sequences,
    token_vectors,
)


@pytest.mark.parametrize("name", MODELS)
def test_token_vectors_are_those_of_transformers(saved: SavedEncoders, name: str) -> None:
    reference, opened = saved.open(name)
    batch = batch_of_all()
    found = opened.load(torch.float32, "cpu")(batch).split(batch.lengths)
    for vectors, token_ids, second in zip(found, sequences(), SECOND_TEXTS, strict=True):
        expected = token_vectors(reference, token_ids, second)
        torch.testing.assert_close(vectors, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_stays_close(saved: SavedEncoders, name: str) -> None:
    reference, opened = saved.open(name)
    token_ids = sequences()[4]
    found = opened.load(torch.bfloat16, "cpu")(make_batch([token_ids])).mean(0)
    expected = token_vectors(reference, token_ids).mean(0)
    assert torch.cosine_similarity(found, expected, dim=0) > 0.999


@pytest.mark.parametrize("name", [name for name in MODELS if "classifies" in name])
def test_class_logits_are_those_of_transformers(saved: SavedEncoders, name: str) -> None:
    reference, opened = saved.open(name)
    model = opened.load(torch.float32, "cpu")
    assert model.head is not None
    assert model.config.labels == ("bad", "so-so", "good")
    batch = batch_of_all()
    logits = model.head(pool(model(batch), batch.lengths, model.head.pooling))
    for found, token_ids, second in zip(logits, sequences(), SECOND_TEXTS, strict=True):
        expected = class_logits(reference, token_ids, second)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_one_batch_does_not_mix_its_sequences(saved: SavedEncoders) -> None:
    _, opened = saved.open("modernbert")
    model = opened.load(torch.float32, "cpu")
    together = model(batch_of_all()).split(batch_of_all().lengths)
    for vectors, token_ids in zip(together, sequences(), strict=True):
        torch.testing.assert_close(model(make_batch([token_ids])), vectors)


def test_names_of_older_checkpoints_are_known(saved: SavedEncoders, tmp_path: Path) -> None:
    """`gamma` and `beta`, and tables of positions beside the weights."""
    reference, path = saved.save("bert of masked words")
    tensors = {
        source.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for source, tensor in load_file(path / "model.safetensors").items()
    }
    assert any(source.startswith("bert.") and "gamma" in source for source in tensors)
    tensors["bert.embeddings.position_ids"] = torch.arange(80).unsqueeze(0)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(path / "config.json", tmp_path)
    token_ids = sequences()[0]
    found = open_encoder(tmp_path).load(torch.float32, "cpu")(make_batch([token_ids]))
    torch.testing.assert_close(found, token_vectors(reference, token_ids), atol=1e-4, rtol=1e-4)


def edited(saved: SavedEncoders, name: str, to: Path, **changes: object) -> Path:
    """A copy of a model with other fields in its config.json."""
    _, path = saved.save(name)
    shutil.copytree(path, to, dirs_exist_ok=True)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


@pytest.mark.parametrize(
    ("name", "changes", "what"),
    [
        ("bert", {"num_attention_heads": 7}, "hidden_size"),
        ("bert", {"hidden_size": 1 << 30}, "hidden_size"),
        ("bert", {"num_hidden_layers": 4000}, "layers"),
        ("bert", {"num_hidden_layers": 2}, "layer.2"),
        ("bert", {"num_hidden_layers": 4}, "layers.3"),
        ("bert", {"vocab_size": 98}, "word_embeddings"),
        ("bert", {"vocab_size": "97"}, "vocab_size"),
        ("bert", {"hidden_act": "gelu_of_tomorrow"}, "hidden_act"),
        ("bert", {"layer_norm_eps": -1}, "layer_norm_eps"),
        ("bert", {"layer_norm_eps": float("nan")}, "layer_norm_eps"),
        ("bert", {"type_vocab_size": -1}, "type_vocab_size"),
        ("bert", {"architectures": ["GiraffeModel"]}, "GiraffeModel"),
        ("bert", {"architectures": []}, "architectures"),
        ("bert that classifies", {"id2label": {"0": "bad", "7": "good"}}, "id2label"),
        ("bert that classifies", {"id2label": ["bad", "good"]}, "id2label"),
        ("roberta", {"pad_token_id": 79}, "pad_token_id"),
        ("modernbert", {"layer_types": ["full_attention"]}, "layer_types"),
        ("modernbert", {"layer_types": ["linear_attention"] * 3}, "layer_types"),
        ("modernbert", {"local_attention": 0}, "local_attention"),
        ("modernbert", {"rope_parameters": {"full_attention": 3}}, "rope_parameters"),
        ("modernbert", {"rope_parameters": {"full_attention": {"rope_theta": 0}}}, "rope_theta"),
        ("deberta", {"pos_att_type": ["c2p", "x2y"]}, "pos_att_type"),
        ("deberta", {"pos_att_type": [["c2p"]]}, "pos_att_type"),
        ("deberta", {"position_buckets": 1 << 30}, "span"),
        ("deberta", {"attention_head_size": 8}, "attention_head_size"),
        ("deberta", {"conv_kernel_size": 4}, "conv_kernel_size"),
    ],
)
def test_what_a_configuration_cannot_mean_is_named(
    saved: SavedEncoders, tmp_path: Path, name: str, changes: dict[str, object], what: str
) -> None:
    with pytest.raises(ModelFileError, match=what):
        open_encoder(edited(saved, name, tmp_path, **changes))


def test_encoders_are_told_from_other_models(saved: SavedEncoders, tmp_path: Path) -> None:
    _, path = saved.save("bert")
    assert is_encoder(path)
    assert not is_encoder(edited(saved, "bert", tmp_path, architectures=["LlamaForCausalLM"]))
    assert not is_encoder(tmp_path / "missing")
