"""The least time a step can take on this machine, and what a step does take.

    python -m benchmarks.floors --model smollm2-135m

Two floors: the bytes that a step reads (all weights once, and the keys and values of the context)
over the bandwidth of the memory, and the products that it computes over the machine's peak for
their type. The higher one is what a kernel can hope for; both peaks are measured first (peak.cpp).
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import cpu
from services.engine.core.kernels.cpu.build import find_compiler
from services.engine.core.kernels.cpu.kv_cache import PackedKVCache
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.models.loader import open_model
from services.engine.core.models.native import NativeModel, WeightChoice
from services.runtime.modelfiles import locate

BLOCK_SIZE = 16
CHOICES: tuple[WeightChoice, ...] = ("bfloat16", "int8", "int4")
# (sequences, tokens of each, context of each): decode, and a chunk of a prompt.
STEPS = ((1, 1, 256), (8, 1, 256), (32, 1, 256), (1, 512, 512))


def measure_peaks(threads: int) -> dict[str, float]:
    """GB/s read and 10^9 products a second by type, over all threads."""
    source = Path(__file__).with_name("peak.cpp")
    with tempfile.TemporaryDirectory() as directory:
        program = Path(directory) / "peak"
        compiler = find_compiler().command
        flags = ["-O2", "-std=c++20", "-march=native", "-pthread", "-w"]
        subprocess.run([*compiler, *flags, str(source), "-o", str(program)], check=True)
        printed = subprocess.run(
            [str(program), str(threads)], check=True, capture_output=True, text=True
        ).stdout
    return {name: float(value) for name, value in map(str.split, printed.splitlines())}


def step_batch(sequences: int, tokens: int, context: int, vocab_size: int) -> ForwardBatch:
    """A step of `sequences` that compute their last `tokens` of `context` tokens."""
    blocks = -(-context // BLOCK_SIZE)
    tables = torch.arange(sequences * blocks, dtype=torch.int32).view(sequences, blocks)
    positions = torch.arange(context - tokens, context).repeat(sequences)
    owners = torch.arange(sequences).repeat_interleave(tokens)
    slots = tables[owners, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    generator = np.random.default_rng(1)
    return ForwardBatch(
        token_ids=torch.from_numpy(generator.integers(0, vocab_size, sequences * tokens)),
        positions=positions,
        slots=slots.long(),
        block_tables=tables,
        query_lengths=(tokens,) * sequences,
        context_lengths=(context,) * sequences,
        logits_rows=(torch.arange(sequences) + 1) * tokens - 1,
    )


def main() -> None:
    """Print both floors and the measured time of each step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=50)
    options = parser.parse_args()
    library = cpu.activate("auto")
    if library is None:
        parser.error("the native kernels are not available here")
    peaks = measure_peaks(options.threads)
    shown = ", ".join(f"{name} {value:,.0f}" for name, value in peaks.items())
    print(f"{options.threads} threads, {library.isa}: {shown} (GB/s; 10^9 products/s)\n")
    print("| weights | step | bytes | products | measured | of the floor | decode against bf16 |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    team = Team(library, options.threads)
    bf16_ms: dict[int, float] = {}
    for weights in CHOICES:
        opened = open_model(locate(options.model))
        config = opened.config
        model = NativeModel(opened.skeleton, opened.checkpoint, team, weights)
        weight_bytes = sum(model.weight_bytes.values())
        embedding = config.vocab_size * config.hidden_size
        parameters = sum(weight.numel() for weight in opened.skeleton.parameters())
        body = parameters - embedding * (1 if config.tie_embeddings else 2)
        shape = (config.num_layers, 1024, BLOCK_SIZE, config.kv_heads, config.head_dim)
        cache = PackedKVCache(*shape)
        model.bind(cache, max_batch_tokens=1024)
        product_peak = peaks.get("bf16" if weights == "bfloat16" else "int8", float("nan"))
        for sequences, tokens, context in STEPS:
            batch = step_batch(sequences, tokens, context, config.vocab_size)
            kv_bytes = sequences * context * cache.bytes_per_block(*shape[:1], *shape[2:])
            bytes_ms = (weight_bytes + kv_bytes / BLOCK_SIZE) / peaks["read"] / 1e6
            # Attention's own products are in bf16 and few beside these while contexts are short.
            products = sequences * (tokens * body + embedding)
            products_ms = products / product_peak / 1e6
            times = []
            for _ in range(options.repeats if tokens == 1 else options.repeats // 5 + 1):
                started = time.perf_counter()
                model(batch, cache)
                times.append(time.perf_counter() - started)
            measured_ms = float(np.median(times)) * 1e3
            if weights == "bfloat16":
                bf16_ms[sequences * tokens] = measured_ms
            name = f"{sequences} x {tokens} of {context}"
            print(
                f"| {weights} | {name} | {bytes_ms:.2f} ms | {products_ms:.2f} ms | "
                f"{measured_ms:.2f} ms | {100 * max(bytes_ms, products_ms) / measured_ms:.0f} % | "
                f"{bf16_ms[sequences * tokens] / measured_ms:.2f} x |"
            )


if __name__ == "__main__":
    main()
