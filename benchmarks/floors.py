"""The least time a step can take on this machine, and what a step does take.

    python -m benchmarks.floors --model smollm2-135m

Two floors: the bytes that a step reads (all weights once, and the keys and values of the context)
over the bandwidth of the memory, and the products that it computes over the machine's peak for
their type. The higher one is what a kernel can hope for. A shared machine gives more in one second
and less in the next, so peaks (peak.cpp) and steps take turns, and the best round of each counts.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import cpu
from services.engine.core.kernels.cpu.build import find_compiler
from services.engine.core.kernels.cpu.kv_cache import PackedKVCache
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.models.loader import open_model
from services.engine.core.models.native import NativeModel
from services.engine.core.models.precision import WeightChoice
from services.runtime.modelfiles import locate

BLOCK_SIZE = 16
CHOICES: tuple[WeightChoice, ...] = ("bfloat16", "int8", "int4")
# (sequences, tokens of each, context of each): decode, and a chunk of a prompt.
STEPS = ((1, 1, 256), (8, 1, 256), (32, 1, 256), (1, 512, 512))


class Peaks:
    """GB/s read and 10^9 products a second by type, over all threads: the best seen so far."""

    def __init__(self, directory: Path, threads: int) -> None:
        self._program = directory / "peak"
        self._threads = threads
        self.best: dict[str, float] = {}
        source = Path(__file__).with_name("peak.cpp")
        flags = ["-O2", "-std=c++20", "-march=native", "-pthread", "-w"]
        compiler = find_compiler().command
        subprocess.run([*compiler, *flags, str(source), "-o", str(self._program)], check=True)

    def measure(self) -> None:
        """Measure all of them once more."""
        command = [str(self._program), str(self._threads)]
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        for name, value in map(str.split, printed.splitlines()):
            self.best[name] = max(float(value), self.best.get(name, 0.0))


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


class Served:
    """The model with weights of one format, and the time that its steps take."""

    def __init__(self, model: str, team: Team, weights: WeightChoice) -> None:
        opened = open_model(locate(model))
        self.weights = weights
        self._config = config = opened.config
        self._model = NativeModel(opened.skeleton, opened.checkpoint, team, weights)
        parameters = sum(weight.numel() for weight in opened.skeleton.parameters())
        self._embedding = config.vocab_size * config.hidden_size
        self._body = parameters - self._embedding * (1 if config.tie_embeddings else 2)
        shape = (config.num_layers, 1024, BLOCK_SIZE, config.kv_heads, config.head_dim)
        self._cache = PackedKVCache(*shape)
        self._bytes_per_token = self._cache.bytes_per_block(*shape[:1], *shape[2:]) / BLOCK_SIZE
        self._model.bind(self._cache, max_batch_tokens=1024)
        self._batches = {step: step_batch(*step, config.vocab_size) for step in STEPS}
        self.kept = self._model.weight_bytes
        self.rounds_ms: dict[tuple[int, int, int], list[float]] = {step: [] for step in STEPS}

    def measure(self, repeats: int) -> None:
        """Take one round's medians."""
        for step, batch in self._batches.items():
            times = []
            for _ in range(repeats if step[1] == 1 else repeats // 5 + 1):
                started = time.perf_counter()
                self._model(batch, self._cache)
                times.append(time.perf_counter() - started)
            self.rounds_ms[step].append(float(np.median(times)) * 1e3)

    def floors_ms(
        self, step: tuple[int, int, int], peaks: Mapping[str, float]
    ) -> tuple[float, float]:
        """What reading the bytes takes, and what the products take."""
        sequences, tokens, context = step
        size = sum(self._model.weight_bytes.values()) + sequences * context * self._bytes_per_token
        # Attention's own products are in bf16 and few beside these while contexts are short.
        products = sequences * (tokens * self._body + self._embedding)
        peak = peaks.get("bf16" if self.weights == "bfloat16" else "int8", float("nan"))
        return size / peaks["read"] / 1e6, products / peak / 1e6


def main() -> None:
    """Print both floors and the measured time of each step."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=30, help="of a step, in each round")
    options = parser.parse_args()
    library = cpu.activate("auto")
    if library is None:
        parser.error("the native kernels are not available here")
    team = Team(library, options.threads)
    served = [Served(options.model, team, weights) for weights in CHOICES]
    with tempfile.TemporaryDirectory() as directory:
        peaks = Peaks(Path(directory), options.threads)
        for _ in range(options.rounds):
            peaks.measure()
            for each in served:
                each.measure(options.repeats)
    shown = ", ".join(f"{name} {value:,.0f}" for name, value in peaks.best.items())
    print(f"{options.threads} threads, {library.isa}: {shown} (GB/s; 10^9 products/s)\n")
    print("| weights | step | bytes | products | measured | of the floor | against bf16 |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for each in served:
        for step in STEPS:
            bytes_ms, products_ms = each.floors_ms(step, peaks.best)
            measured_ms = min(each.rounds_ms[step])
            floor = 100 * max(bytes_ms, products_ms) / measured_ms
            faster = min(served[0].rounds_ms[step]) / measured_ms
            sequences, tokens, context = step
            print(
                f"| {each.weights} | {sequences} x {tokens} of {context} | {bytes_ms:.2f} ms | "
                f"{products_ms:.2f} ms | {measured_ms:.2f} ms | {floor:.0f} % | {faster:.2f} x |"
            )


if __name__ == "__main__":
    main()
