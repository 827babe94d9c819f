"""Damaged model files are refused by name: never a crash, a hang, or much memory for a lie."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.gguf_files import write_gguf
from tests.fakes.quantised_checkpoints import (
    awq,
    awq_config,
    compressed,
    compressed_config,
    float_config,
    fp8,
    fp8_config,
    gptq,
    gptq_config,
    quantise_checkpoint,
)

ROOT = Path(__file__).parents[3]
SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
SMALL |= {"num_attention_heads": 4, "vocab_size": 64}
HEADS_OF_16 = {"head_dim": 16}
TOOLS: dict[str, tuple[Any, dict[str, Any]]] = {
    "gptq": (partial(gptq, bits=4, group_size=32, act_order=True), gptq_config(4, 32)),
    "awq": (partial(awq, group_size=32), awq_config(32)),
    "compressed": (
        partial(compressed, bits=4, group_size=32, packed=True, symmetric=False),
        compressed_config(4, packed=True),
    ),
    "floats": (partial(fp8, block=(1, None)), float_config("channel")),
    "fp8": (partial(fp8, block=(32, 32), scale="weight_scale_inv"), fp8_config([32, 32])),
}
CASES = [
    ("gguf", "plain", 70),
    ("gguf", "split", 30),
    ("header", "plain", 60),
    ("header", "gptq", 60),
    ("index", "sharded", 30),
    ("config", "plain", 100),
    ("config", "gptq", 40),
    ("config", "awq", 30),
    ("config", "compressed", 40),
    ("config", "floats", 15),
    ("config", "fp8", 15),
    ("tensors", "gptq", 60),
    ("tensors", "fp8", 20),
    ("tensors", "compressed", 40),
]


def files(kind: str, tool: str, make_checkpoint: Any, tmp_path: Path) -> list[Path]:
    shards = {"max_shard_size": "50KB"} if tool == "sharded" else {}
    made, model = make_checkpoint(**SMALL, **HEADS_OF_16, **shards)
    if kind == "gguf":
        folder = tmp_path / f"{kind} {tool}"
        folder.mkdir()
        write_gguf(model, folder / "model.gguf", "Q4_0", tensors_each=9 * (tool == "split"))
    else:
        if tool in TOOLS:
            quantise_checkpoint(made, model, *TOOLS[tool])
        folder = made.rename(tmp_path / f"{kind} {tool}")
    return sorted(folder.iterdir())


def run(times: int, make_checkpoint: Any, tmp_path: Path) -> None:
    jobs = [
        (kind, examples * times, [*map(str, files(kind, tool, make_checkpoint, tmp_path))])
        for kind, tool, examples in CASES
    ]
    command = [sys.executable, "-m", "tests.fakes.fuzzing", json.dumps(jobs)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-6000:]


def test_damaged_files_are_read_or_refused(make_checkpoint: Any, tmp_path: Path) -> None:
    run(1, make_checkpoint, tmp_path)


@pytest.mark.slow
def test_files_damaged_in_many_ways_are_read_or_refused(
    make_checkpoint: Any, tmp_path: Path
) -> None:
    run(30, make_checkpoint, tmp_path)
