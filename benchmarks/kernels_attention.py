"""What the native attention gives by itself, beside what the machine's memory and arithmetic allow.

    python benchmarks/kernels_attention.py --threads 2 --isa avx512bf16

Every case runs the attention, and the rotary embedding with its write to the cache, of a model of
the demo model's sizes. Layers differ, so that keys and values come from memory as they do in a
model; blocks lie scattered over the pool. Times are of one layer, the shortest of the repetitions.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from services.engine.core.kernels.cpu import library
from services.engine.core.kernels.cpu.attention import Step, attention, rotary_kv
from services.engine.core.kernels.cpu.kv_cache import KvFormat, PackedKVCache
from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.team import Team

HEADS, KV_HEADS, HEAD_DIM, LAYERS, BLOCK_SIZE = 9, 3, 64, 30, 16
STALE_BYTE = 0x3C  # bf16, int8 and float made of it are small numbers


@dataclass(frozen=True, slots=True)
class Case:
    """Sequences of one kind: each has `queries` new tokens of a context of `context`."""

    name: str
    sequences: int
    queries: int
    context: int
    layers: int = LAYERS
    repetitions: int = 30


CASES = (
    Case("decode", 1, 1, 256),
    Case("decode", 1, 1, 4_096),
    Case("decode", 8, 1, 256),
    Case("decode", 32, 1, 256),
    Case("verify", 1, 5, 256),
    Case("prefill", 1, 128, 128),
    Case("prefill", 1, 512, 512, repetitions=5),
    Case("prefill", 1, 4_096, 4_096, layers=1, repetitions=5),
    Case("chunk", 1, 512, 4_096, layers=2, repetitions=5),
)


def measure(kernels: Library, case: Case, kv_format: KvFormat, threads: int) -> str:
    """Run a case; return its line of the table."""
    per_sequence = -(-case.context // BLOCK_SIZE)
    tables = torch.randperm(case.sequences * per_sequence).view(case.sequences, per_sequence)
    cache = PackedKVCache(LAYERS, tables.numel(), BLOCK_SIZE, KV_HEADS, HEAD_DIM, kv_format)
    cache.fill(STALE_BYTE)
    step = Step.of(
        [case.queries] * case.sequences, [case.context] * case.sequences, tables, BLOCK_SIZE
    )
    qkv = torch.randn(len(step.positions), (HEADS + 2 * KV_HEADS) * HEAD_DIM)
    output = torch.empty(len(qkv), HEADS * HEAD_DIM)
    cos, sin = torch.ones(case.context, HEAD_DIM // 2), torch.zeros(case.context, HEAD_DIM // 2)
    layers = range(case.layers)
    team = Team(kernels, threads)
    attention_s = shortest_s(
        lambda: attention(team, step, cache, layers, qkv, HEADS, HEAD_DIM**-0.5, output), case
    )
    rotary_kv_s = shortest_s(
        lambda: rotary_kv(team, step, cache, layers, qkv, HEADS, cos, sin), case
    )
    # Scores and weighted sums of every query with every key that it sees.
    seen = sum(range(case.context - case.queries + 1, case.context + 1))
    products = case.sequences * seen * HEADS * HEAD_DIM * 2
    block_bytes = PackedKVCache.bytes_per_block(1, BLOCK_SIZE, KV_HEADS, HEAD_DIM, kv_format)
    read = tables.numel() * block_bytes
    return (
        f"{kernels.isa:10} {kv_format.name.lower():4} {case.name:8} {case.sequences:9} "
        f"{case.queries:7} {case.context:7} {attention_s * 1e6:9.1f} "
        f"{products / attention_s / 1e9:7.1f} {read / attention_s / 1e9:6.1f} "
        f"{rotary_kv_s * 1e6:9.1f}"
    )


def shortest_s(run: Callable[[], None], case: Case) -> float:
    """Return the shortest time of one layer, in seconds."""
    times_s = []
    for _ in range(case.repetitions):
        started = time.perf_counter()
        run()
        times_s.append((time.perf_counter() - started) / case.layers)
    return min(times_s)


def main(arguments: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--isa", nargs="+", help="instruction sets; all that the machine has")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    path = library.find_or_build()
    print("isa        kv   case     sequences queries context  us/layer  GMAC/s   GB/s rotary+kv")
    for isa in options.isa or library.isa_names(path):
        kernels = library.load(path, isa)
        for kv_format in KvFormat:
            for case in CASES:
                print(measure(kernels, case, kv_format, options.threads), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
