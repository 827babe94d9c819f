"""Poolings, dense layers and activations, as `modules.json` and `config.json` ask for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional

from services.engine.core.encoding.answers import Answers, load_dense
from services.engine.core.encoding.heads import ClassificationHead
from services.engine.core.encoding.outputs import OutputConfig, read_outputs
from services.engine.core.encoding.pooling import POOLINGS, Pooling, pool
from services.engine.core.messages import EncodeTask
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.fields import Fields

SIZE = 8
LENGTHS = (3, 1, 6)
PREFIX = "sentence_transformers.models."


def hidden() -> Tensor:
    return torch.randn(sum(LENGTHS), SIZE, generator=torch.Generator().manual_seed(0))


def by_hand(vectors: Tensor, pooling: Pooling) -> Tensor:
    """One sequence's vector, as sentence-transformers' documentation defines it."""
    count = len(vectors)
    weights = torch.arange(1, count + 1).unsqueeze(1)
    return {
        "mean": vectors.mean(0),
        "first": vectors[0],
        "last": vectors[-1],
        "max": vectors.max(0).values,
        "mean_sqrt_len": vectors.sum(0) / count**0.5,
        "weighted_mean": (vectors * weights).sum(0) / weights.sum(),
    }[pooling]


@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_pooling_takes_each_sequence_by_itself(pooling: Pooling) -> None:
    expected = torch.stack([by_hand(each, pooling) for each in hidden().split(LENGTHS)])
    torch.testing.assert_close(pool(hidden(), LENGTHS, pooling), expected)


def write(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def read(directory: Path, num_labels: int = 0, **fields: Any) -> OutputConfig:
    config = Fields(directory / "config.json", fields)
    return read_outputs(directory, config, SIZE, labels=("class",) * num_labels)


def write_modules(directory: Path, *modules: tuple[str, str]) -> None:
    write(
        directory / "modules.json",
        [{"type": PREFIX + kind, "path": path} for kind, path in (("Transformer", ""), *modules)],
    )


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, ("first",)),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": True}, ("mean", "max")),
        ({"pooling_mode_lasttoken": True}, ("last",)),
        ({"pooling_mode": "weightedmean"}, ("weighted_mean",)),
        ({"pooling_mode": ["cls", "mean_sqrt_len_tokens"]}, ("first", "mean_sqrt_len")),
        ({}, ("mean",)),
    ],
)
def test_poolings_are_read_in_old_and_new_words(
    tmp_path: Path, pooling: dict[str, object], expected: tuple[str, ...]
) -> None:
    write_modules(tmp_path, ("Pooling", "1_Pooling"))
    write(tmp_path / "1_Pooling/config.json", pooling)
    assert read(tmp_path).poolings == expected


def test_a_directory_without_modules_is_averaged(tmp_path: Path) -> None:
    assert read(tmp_path) == OutputConfig(poolings=("mean",), normalize=False)


def test_modules_are_computed_one_after_the_other(tmp_path: Path) -> None:
    write_modules(tmp_path, ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3_N"))
    write(tmp_path / "1_Pooling/config.json", {"pooling_mode": ["mean", "max"]})
    write(
        tmp_path / "2_Dense/config.json",
        {"in_features": 16, "out_features": 4, "activation_function": "torch.nn.Tanh"},
    )
    write(tmp_path / "sentence_bert_config.json", {"max_seq_length": 5})
    weights = {"linear.weight": torch.randn(4, 16), "linear.bias": torch.randn(4)}
    save_file(weights, tmp_path / "2_Dense/model.safetensors")
    outputs = read(tmp_path)
    assert outputs.max_tokens == 5
    answers = Answers(outputs, SIZE, dense=[load_dense(each) for each in outputs.dense])
    assert answers.embedding_size == 4
    found = answers.make(hidden(), LENGTHS, [EncodeTask("embed")] * 3)
    for vector, own in zip(found, hidden().split(LENGTHS), strict=True):
        pooled = torch.cat([own.mean(0), own.max(0).values])
        dense = (weights["linear.weight"] @ pooled + weights["linear.bias"]).tanh()
        np.testing.assert_allclose(vector, functional.normalize(dense, dim=0), atol=1e-6)


def test_each_sequence_gets_what_its_own_task_asks_for() -> None:
    answers = Answers(OutputConfig(poolings=("mean",), normalize=True), SIZE)
    tasks = [
        EncodeTask("embed", "first", normalize=False),
        EncodeTask("embed", dimensions=3),
        EncodeTask("embed", "last", normalize=False, dimensions=2),
    ]
    first, second, third = answers.make(hidden(), LENGTHS, tasks)
    own = hidden().split(LENGTHS)
    np.testing.assert_array_equal(first, own[0][0])
    # What is left of a vector has length 1 again.
    np.testing.assert_allclose(second, functional.normalize(own[1][0, :3], dim=0), atol=1e-6)
    np.testing.assert_array_equal(third, own[2][-1, :2])


@pytest.mark.parametrize(
    ("labels", "fields", "classes", "score"),
    [
        (3, {}, "softmax", "sigmoid"),
        (3, {"problem_type": "multi_label_classification"}, "sigmoid", "sigmoid"),
        (1, {"problem_type": "regression"}, "none", "sigmoid"),
        (1, {}, "sigmoid", "sigmoid"),
        (
            1,
            {"sentence_transformers": {"activation_fn": "torch.nn.modules.linear.Identity"}},
            "sigmoid",
            "none",
        ),
        (
            1,
            {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity"},
            "sigmoid",
            "none",
        ),
    ],
)
def test_activations_follow_the_configuration(
    tmp_path: Path, labels: int, fields: dict[str, object], classes: str, score: str
) -> None:
    outputs = read(tmp_path, labels, **fields)
    assert (outputs.class_activation, outputs.score_activation) == (classes, score)


def test_scores_are_activated() -> None:
    torch.manual_seed(0)
    head = ClassificationHead(SIZE, 1, activation="tanh")
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    answers = Answers(OutputConfig(class_activation="none"), SIZE, head.requires_grad_(False))
    (score,) = answers.make(hidden()[:3], (3,), [EncodeTask("score")])
    (raw,) = answers.make(hidden()[:3], (3,), [EncodeTask("classify")])
    assert score == pytest.approx(1 / (1 + np.exp(-raw)))


@pytest.mark.parametrize(
    ("modules", "what"),
    [
        ("{", "modules.json"),
        ({"type": "x"}, "list of modules"),
        ([], "transformer"),
        ([{"type": PREFIX + "Pooling", "path": "1_Pooling"}], "transformer"),
        ([{"type": PREFIX + "Giraffe", "path": ""}], "Giraffe"),
        ([{"type": PREFIX + "Transformer", "path": "../elsewhere"}], "path"),
        ([{"type": 3, "path": ""}], "type"),
        (
            [
                {"type": PREFIX + "Transformer", "path": ""},
                {"type": PREFIX + "Pooling", "path": "bad"},
            ],
            "pooling_mode",
        ),
        (
            [
                {"type": PREFIX + "Transformer", "path": ""},
                {"type": PREFIX + "Dense", "path": "wide"},
            ],
            "in_features",
        ),
        (
            [
                {"type": PREFIX + "Transformer", "path": ""},
                {"type": PREFIX + "Dense", "path": "odd"},
            ],
            "activation_function",
        ),
    ],
)
def test_what_modules_cannot_mean_is_named(tmp_path: Path, modules: object, what: str) -> None:
    content = modules if isinstance(modules, str) else json.dumps(modules)
    (tmp_path / "modules.json").write_text(content)
    write(tmp_path / "bad/config.json", {"pooling_mode": "giraffe"})
    write(tmp_path / "wide/config.json", {"in_features": 9, "out_features": 4})
    odd = {"in_features": SIZE, "out_features": 4, "activation_function": "os.system"}
    write(tmp_path / "odd/config.json", odd)
    with pytest.raises(ModelFileError, match=what):
        read(tmp_path)


def test_a_dense_layer_of_another_shape_is_refused(tmp_path: Path) -> None:
    write_modules(tmp_path, ("Dense", "1_Dense"))
    write(tmp_path / "1_Dense/config.json", {"in_features": SIZE, "out_features": 4})
    tensors = {"linear.weight": torch.randn(4, 9), "linear.bias": torch.randn(4)}
    save_file(tensors, tmp_path / "1_Dense/model.safetensors")
    with pytest.raises(ModelFileError, match=r"linear\.weight"):
        load_dense(read(tmp_path).dense[0])
