"""What a model's generation_config.json says is taken over where it makes sense."""

from __future__ import annotations

from pathlib import Path

import pytest

from services.engine.core.generation_defaults import read_generation_defaults


def defaults_of(directory: Path, text: str) -> dict[str, float]:
    (directory / "generation_config.json").write_text(text)
    return read_generation_defaults(directory)


def test_numbers_are_taken_over(tmp_path: Path) -> None:
    text = '{"do_sample": true, "temperature": 0.6, "top_k": 20, "eos_token_id": [1, 2]}'
    assert defaults_of(tmp_path, text) == {"temperature": 0.6, "top_k": 20}


def test_numbers_without_sampling_have_no_effect(tmp_path: Path) -> None:
    assert defaults_of(tmp_path, '{"temperature": 0.6}') == {}


def test_a_model_without_the_file_has_none(tmp_path: Path) -> None:
    assert read_generation_defaults(tmp_path) == {}
    file = tmp_path / "model.gguf"
    file.touch()
    assert read_generation_defaults(file) == {}


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "null",
        '{"do_sample": true, "temperature": "hot"}',
        '{"do_sample": true, "temperature": NaN}',
        '{"do_sample": true, "top_p": 0}',
        '{"do_sample": true, "top_k": true}',
    ],
)
def test_nonsense_is_left_aside(tmp_path: Path, text: str) -> None:
    assert defaults_of(tmp_path, text) == {}
