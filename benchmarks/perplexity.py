"""What each way of storing weights costs in perplexity, on real English text.

    python -m benchmarks.perplexity --model smollm2-135m --tokens 8192

The text is the project's own prose, cut into windows of `--window` tokens, each computed from an
empty context. "float32 on torch" is the reference: the file's own weights and no other rounding.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.prompts import english_prompts
from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import cpu, select
from services.engine.core.kernels.cpu.kv_cache import KvFormat, PackedKVCache
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.kv_cache import KVCache
from services.engine.core.models.loader import OpenedModel, open_model
from services.engine.core.models.native import NativeModel, WeightChoice
from services.runtime.modelfiles import locate

BLOCK_SIZE = 16
CHOICES: tuple[WeightChoice, ...] = ("auto", "bfloat16", "int8", "int4")


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


def torch_step(opened: OpenedModel, window: int) -> Callable[[ForwardBatch], Tensor]:
    """Return what computes the logits of a window in float32, with the weights as stored."""
    config = opened.config
    model = opened.load(torch.float32, "cpu")
    blocks = window // BLOCK_SIZE
    shape = (config.num_layers, blocks, BLOCK_SIZE, config.kv_heads, config.head_dim)
    cache = KVCache(*shape, torch.float32, "cpu")
    return lambda batch: model(batch, cache)


def native_step(
    model: NativeModel, kv_format: KvFormat, window: int
) -> Callable[[ForwardBatch], Tensor]:
    """Return what computes the logits of a window on the native kernels."""
    config = model.config
    blocks = window // BLOCK_SIZE
    shape = (config.num_layers, blocks, BLOCK_SIZE, config.kv_heads, config.head_dim)
    cache = PackedKVCache(*shape, kv_format)
    model.bind(cache, max_batch_tokens=window)
    return lambda batch: model(batch, cache)


def perplexity(step: Callable[[ForwardBatch], Tensor], windows: list[list[int]]) -> float:
    """Return the perplexity of windows of tokens, each computed from an empty context."""
    losses = []
    for window in windows:
        ids = torch.tensor(window)
        count = torch.arange(len(ids))
        blocks = torch.arange(len(ids) // BLOCK_SIZE, dtype=torch.int32).view(1, -1)
        batch = ForwardBatch(
            token_ids=ids,
            positions=count,
            slots=count,
            block_tables=blocks,
            query_lengths=(len(ids),),
            context_lengths=(len(ids),),
            logits_rows=count,
        )
        losses.append(functional.cross_entropy(step(batch)[:-1], ids[1:]).item())
    return math.exp(sum(losses) / len(losses))


def _print(name: str, num_bytes: int | None, perplexity: float, reference: float) -> None:
    size = "" if num_bytes is None else f"{num_bytes / 2**20:8.1f} MiB"
    print(f"{name:32} {size:>12}  {perplexity:8.3f}  {100 * (perplexity / reference - 1):+6.2f} %")


if __name__ == "__main__":
    main()
