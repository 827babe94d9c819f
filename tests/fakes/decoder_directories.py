"""Small models of every decoder family in Hugging Face directories of every kind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.fakes.quantised_checkpoints import (
    Tensors,
    awq,
    awq_config,
    compressed,
    compressed_config,
    float_config,
    fp8,
    fp8_config,
    gptq,
    gptq_config,
)

Quantise = Callable[[Tensor], tuple[Tensors, Tensor]]
# What no tool quantises: routers are too small for it to be worth anything.
_KEPT = ("mlp.gate.weight", "block_sparse_moe.gate.weight")
QUANTISED: dict[str, tuple[Quantise, dict[str, Any]]] = {
    "GPTQ": (partial(gptq, bits=4, group_size=64), gptq_config(4, 64)),
    "AWQ": (partial(awq, group_size=64), awq_config(64)),
    "compressed-tensors": (
        partial(compressed, bits=8, group_size=-1, packed=False),
        compressed_config(8, packed=False, strategy="channel"),
    ),
    "FP8": (partial(fp8, block=(1, None), dtype=torch.bfloat16), float_config("channel")),
    "FP8 in blocks": (
        partial(fp8, block=(96, 128), scale="weight_scale_inv"),
        fp8_config([96, 128]),
    ),
}


def save_quantised(directory: Path, form: str, path: Path) -> None:
    """Write a saved model as the tools of a format in QUANTISED do: the projections of its layers
    quantised. The saved model is changed to what was written."""
    quantise, config = QUANTISED[form]
    tensors = load_file(directory / "model.safetensors")
    written: Tensors = {}
    for name, tensor in tensors.items():
        in_layer = ".layers." in name or ".h." in name
        if tensor.dim() != 2 or not in_layer or name.endswith(_KEPT):
            written[name] = tensor
            continue
        # GPT-2 has its matrices the other way round; quantised they lie as all others do.
        is_transposed = ".h." in name
        parts, values = quantise(tensor.T if is_transposed else tensor)
        module = name.removesuffix(".weight")
        written |= {f"{module}.{kind}": part.contiguous() for kind, part in parts.items()}
        tensors[name] = (values.T if is_transposed else values).contiguous()
    path.mkdir()
    save_file(written, path / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((directory / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(fields | {"quantization_config": config}))


def save_sharded(directory: Path, path: Path, shards: int = 3) -> None:
    """Write a saved model in several files and their index, tensors dealt out one by one."""
    tensors = load_file(directory / "model.safetensors")
    path.mkdir()
    shutil.copy(directory / "config.json", path)
    index = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        dealt = dict(list(tensors.items())[number::shards])
        save_file(dealt, path / file, metadata={"format": "pt"})
        index |= dict.fromkeys(dealt, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def save_pickled(directory: Path, path: Path) -> None:
    """Write a saved model as a pickle, as older tools do."""
    path.mkdir()
    shutil.copy(directory / "config.json", path)
    torch.save(load_file(directory / "model.safetensors"), path / "pytorch_model.bin")
