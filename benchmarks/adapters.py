"""What a native step takes with adapters in it: random ones on all projections of a model.

    python -m benchmarks.adapters --rank 16

For each batch of sequences that generate, steps alternate between those in which nobody has an
adapter, all have the same one, and they share eight; "without room" is a model that was loaded to
take none. Medians of single steps, and how much longer than the model without room for them.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from statistics import median
from typing import Any

import torch

from services.engine.core.adapters.targets import Targets
from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import LowRankPart, cpu, select
from services.engine.core.kernels.cpu.kv_cache import PackedKVCache
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.models.loader import open_model
from services.engine.core.models.native import NativeModel
from services.engine.core.models.precision import WeightChoice
from services.runtime.modelfiles import locate

NUM_ADAPTERS = 8
CONTEXT_TOKENS = 64


def decode_batch(sequences: int) -> ForwardBatch:
    """A step in which so many sequences get their next token."""
    blocks = CONTEXT_TOKENS // 16
    tables = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    position = CONTEXT_TOKENS - 1
    return ForwardBatch(
        token_ids=torch.arange(sequences) + 5,
        positions=torch.full((sequences,), position),
        slots=16 * tables[:, -1].long() + position % 16,
        block_tables=tables,
        query_lengths=(1,) * sequences,
        context_lengths=(CONTEXT_TOKENS,) * sequences,
        logits_rows=torch.arange(sequences),
    )


def random_adapter(targets: Targets, rank: int, seed: int) -> dict[str, tuple[LowRankPart, ...]]:
    """One of this rank for every projection that checkpoints hold by itself."""
    generator = torch.Generator().manual_seed(seed)
    parts: dict[str, list[LowRankPart]] = {}
    for path, target in targets.of.items():
        if path.endswith((".qkv", ".gate_up")):
            continue
        down = torch.randn(rank, target.inputs, generator=generator) * 0.01
        up = torch.randn(target.outputs, rank, generator=generator) * 0.01
        parts.setdefault(target.module, []).append(LowRankPart(down, up, target.first))
    return {module: tuple(own) for module, own in parts.items()}


def main() -> None:
    """Print a line for each batch."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--weights", default="int8", choices=("bfloat16", "int8", "int4"))
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    options = parser.parse_args()
    select("cpu")
    kernels = cpu.activate("auto")
    assert kernels is not None
    team = Team(kernels, options.threads)
    plain = _load(options.model, options.weights, team, max_adapters=0, rank=options.rank)
    model = _load(
        options.model, options.weights, team, max_adapters=NUM_ADAPTERS, rank=options.rank
    )
    targets = Targets.of_model(open_model(locate(options.model)).skeleton)
    for slot in range(NUM_ADAPTERS):
        prepared = model[0].prepare_adapter(random_adapter(targets, options.rank, slot))
        model[0].set_adapter(slot, prepared)
    print(f"an adapter takes {prepared.num_bytes / 2**20:.1f} MiB; {kernels.isa}")
    for sequences in options.batches:
        _print_batch(sequences, plain, model, options.steps)


def _load(
    name: str, weights: WeightChoice, team: Team, *, max_adapters: int, rank: int
) -> tuple[NativeModel, PackedKVCache]:
    opened = open_model(locate(name))
    config = opened.config
    model = NativeModel(
        opened.skeleton,
        opened.checkpoint,
        team,
        weights,
        max_adapters=max_adapters,
        max_adapter_rank=rank,
    )
    cache = PackedKVCache(config.num_layers, 256, 16, config.kv_heads, config.head_dim)
    model.bind(cache, max_batch_tokens=512)
    return model, cache


def _print_batch(sequences: int, plain: Any, adapted: Any, steps: int) -> None:
    batch = decode_batch(sequences)
    ways = {
        "without room": (plain, batch),
        "none": (adapted, batch),
        "one": (adapted, dataclasses.replace(batch, adapters=(0,) * sequences)),
        "eight": (
            adapted,
            dataclasses.replace(
                batch, adapters=tuple(index % NUM_ADAPTERS for index in range(sequences))
            ),
        ),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(steps + 2):
        for name, ((model, cache), each) in ways.items():
            started = time.perf_counter()
            model(each, cache)
            if step >= 2:
                times[name].append(time.perf_counter() - started)
    base = median(times["without room"])
    columns = "  ".join(
        f"{name} {1e3 * median(taken):.2f} ms ({100 * (median(taken) / base - 1):+.0f} %)"
        for name, taken in times.items()
    )
    print(f"{sequences:3} sequences: {columns}", flush=True)


if __name__ == "__main__":
    main()
