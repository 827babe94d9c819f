"""An encoder whose files are damaged is read or refused, never a crash, a hang or much memory."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.fakes.small_encoders import HIDDEN_SIZE, SavedEncoders

ROOT = Path(__file__).parents[3]
CASES = [
    ("bert", "config.json", 50),
    ("bert", "modules.json", 40),
    ("bert", "1_Pooling/config.json", 30),
    ("bert", "2_Dense/config.json", 30),
    ("bert", "sentence_bert_config.json", 20),
    ("bert", "model.safetensors", 40),
    ("bert", "2_Dense/model.safetensors", 30),
    ("xlm-roberta that classifies", "config.json", 40),
    ("deberta of version 2", "config.json", 60),
    ("modernbert that classifies", "config.json", 60),
]


def with_modules(path: Path, to: Path) -> Path:
    """A copy of a model with all that sentence-transformers puts beside it."""
    shutil.copytree(path, to)
    kinds = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Dense", "2_Dense"), ("Normalize", "3")
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": at} for kind, at in kinds]
    (to / "modules.json").write_text(json.dumps(modules))
    (to / "sentence_bert_config.json").write_text('{"max_seq_length": 40}')
    (to / "1_Pooling").mkdir()
    (to / "1_Pooling/config.json").write_text('{"pooling_mode": "mean"}')
    (to / "2_Dense").mkdir()
    dense = {"in_features": HIDDEN_SIZE, "out_features": 8, "bias": False}
    (to / "2_Dense/config.json").write_text(json.dumps(dense))
    save_file({"linear.weight": torch.ones(8, HIDDEN_SIZE)}, to / "2_Dense/model.safetensors")
    return to


def run(times: int, saved: SavedEncoders, directory: Path) -> None:
    models = {
        name: with_modules(saved.save(name)[1], directory / name)
        for name in dict.fromkeys(name for name, _, _ in CASES)
    }
    jobs = [(what, examples * times, str(models[name])) for name, what, examples in CASES]
    command = [sys.executable, "-m", "tests.fakes.encoder_fuzzing", json.dumps(jobs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]


def test_damaged_files_are_read_or_refused(saved: SavedEncoders, tmp_path: Path) -> None:
    run(1, saved, tmp_path)


@pytest.mark.slow
def test_files_damaged_in_many_ways_are_read_or_refused(
    saved: SavedEncoders, tmp_path: Path
) -> None:
    run(20, saved, tmp_path)
