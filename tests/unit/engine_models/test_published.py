"""The configuration files of published models are read as they are meant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from services.engine.core.model_config import ModelConfig
from services.engine.core.models import read_config
from services.engine.core.models.loader import build_skeleton
from tests.fakes.published_models import GEMMA3_1B, PUBLISHED


@pytest.fixture
def published(tmp_path: Path) -> object:
    def read(name: str) -> ModelConfig:
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name][1]))
        return read_config(tmp_path)

    return read


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_the_parameters_that_it_has(name: str, published: object) -> None:
    model = build_skeleton(published(name))
    assert sum(parameter.numel() for parameter in model.parameters()) == PUBLISHED[name][0]


def test_windows_are_those_of_the_papers(published: object) -> None:
    assert published("Mistral-7B-v0.1").windows == (4096,) * 32
    assert published("Qwen2.5-7B").windows == ()
    assert published("Phi-3-mini-4k-instruct").windows == (2047,) * 32
    assert published("gemma-2-2b").windows == (4096, None) * 13
    gemma3 = published("gemma-3-1b-it")
    assert gemma3.windows[:7] == (512,) * 5 + (None, 512)
    assert gemma3.windows.count(None) == 4
    assert gemma3.rope.theta == 1e6
    assert gemma3.local_rope.theta == 1e4


def test_longrope_takes_its_factor_from_the_context(published: object) -> None:
    rope = published("Phi-3-mini-128k-instruct").rope
    assert (rope.scaling, rope.factor, rope.original_context_tokens) == ("longrope", 32.0, 4096)


def test_of_a_model_that_sees_images_the_decoder_is_read(tmp_path: Path) -> None:
    whole = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "eos_token_id": [1, 106],
        "text_config": GEMMA3_1B,
        "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27},
    }
    (tmp_path / "config.json").write_text(json.dumps(whole))
    config = read_config(tmp_path)
    assert (config.hidden_size, config.num_layers, config.eos_token_ids) == (1152, 26, (1, 106))
