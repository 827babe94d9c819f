"""What each way of storing weights costs in perplexity, on real English text.

    python -m benchmarks.perplexity --model smollm2-135m --tokens 8192

The text is the project's own prose, cut into windows of `--window` tokens, each computed from an
empty context. "float32 on torch" is the reference: the file's own weights and no other rounding.
"""

from __future__ import annotations

import argparse
from typing import get_args

import torch

from benchmarks.prompts import english_prompts
from services.engine.core.kernels import cpu, select
from services.engine.core.kernels.cpu.kv_cache import KvFormat
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.models.loader import open_model
from services.engine.core.models.native import NativeModel
from services.engine.core.models.precision import WeightChoice
from services.engine.core.quantization.measuring import native_step, perplexity, torch_step
from services.runtime.modelfiles import locate

CHOICES: tuple[WeightChoice, ...] = get_args(WeightChoice)


def main() -> None:
    """Print a table: one line for each way of storing weights and KV cache."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--window", type=int, default=512)
    options = parser.parse_args()
    windows = english_prompts(options.model, options.tokens // options.window, options.window)
    path = locate(options.model)
    select("cpu")
    library = cpu.activate("auto")
    reference = perplexity(torch_step(open_model(path), options.window), windows)
    _print("float32 on torch", None, reference, reference)
    if library is None:
        return
    team = Team(library, torch.get_num_threads())
    for weights in CHOICES:
        for kv_format in KvFormat:
            opened = open_model(path)
            model = NativeModel(opened.skeleton, opened.checkpoint, team, weights)
            step = native_step(model, kv_format, options.window)
            name = f"{weights}, KV cache {kv_format.name.lower()}"
            _print(name, sum(model.weight_bytes.values()), perplexity(step, windows), reference)


def _print(name: str, num_bytes: int | None, perplexity: float, reference: float) -> None:
    size = "" if num_bytes is None else f"{num_bytes / 2**20:8.1f} MiB"
    print(f"{name:32} {size:>12}  {perplexity:8.3f}  {100 * (perplexity / reference - 1):+6.2f} %")


if __name__ == "__main__":
    main()
