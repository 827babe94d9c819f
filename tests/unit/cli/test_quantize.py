"""`meshserve quantize`: a directory that is whole, and a report of what it costs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.fakes.small_llama import save_small_llama


@pytest.fixture
def model(tmp_path: Path) -> Path:
    directory = tmp_path / "model"
    save_small_llama(directory)
    tokenizer = Tokenizer(models.WordLevel({f"t{index}": index for index in range(97)}, "t0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    return directory


def write_text(path: Path, words: int) -> Path:
    numbers = random.Random(0)
    path.write_text(" ".join(f"t{numbers.randrange(97)}" for _ in range(words)))
    return path


def test_a_model_is_quantised_with_all_that_belongs_to_it(
    meshserve: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    text, out = write_text(tmp_path / "text", 2100), tmp_path / "out"
    line = ("quantize", str(model), "--to", "int8", "-o", str(out), "--calibration", str(text))
    result = meshserve(*line)
    assert result.code == 0, result.err
    for words in ("bfloat16", "quantised", "perplexity", "feed_forward.down", "8 bits", "0-1"):
        assert words in result.out
    assert (out / "chat_template.jinja").read_text() == "{{ messages[0].content }}"
    assert (out / "tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()
    shown = json.loads(meshserve("models", "show", str(out), "--json").out)
    assert shown["verdict"]["runs"]
    assert shown["quantization"]["bits"] == [8]
    again = meshserve(*line)
    assert again.code != 0
    assert "is there already" in again.err


def test_a_mixture_tells_how_its_budget_was_kept(
    meshserve: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    text, out = write_text(tmp_path / "text", 2100), tmp_path / "out"
    line = ("quantize", str(model), "--to", "mixed", "-o", str(out), "--calibration", str(text))
    result = meshserve(*line, "--budget", "1.3ppl")
    assert result.code == 0, result.err
    report = json.loads((out / "quantization_report.json").read_text())
    assert report["results"]["quantised"]["perplexity_ratio"] <= 1.3
    assert report["trials"]
    for words in ("foretold from single layers", "measured to find it"):
        assert words in result.out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--to", "int4", "--budget", "0.5x"), "--to mixed"),
        (("--to", "mixed", "--budget", "small"), "neither a size like 0.6x"),
        (("--to", "mixed", "--budget", "0.9ppl"), "must be above 1ppl"),
        (("--to", "int8"), "too short"),
        (("--to", "int8", "--calibration", "/no/such/file"), "cannot be read"),
    ],
)
def test_what_cannot_be_done_is_a_line_that_says_so(
    meshserve: Callable[..., Any],
    model: Path,
    tmp_path: Path,
    options: tuple[str, ...],
    says: str,
) -> None:
    text = write_text(tmp_path / "text", 100)
    calibration = () if "--calibration" in options else ("--calibration", str(text))
    result = meshserve("quantize", str(model), "-o", str(tmp_path / "out"), *options, *calibration)
    assert result.code != 0
    assert says in result.err
    assert not (tmp_path / "out").exists()
