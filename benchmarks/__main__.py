"""Output tokens per second of the engine core alone and through the whole mesh, side by side.

    make bench
    python -m benchmarks --concurrency 1 8 32 --json report.json

All requests of a run arrive at once; prompts are real English text, equal for core and mesh; every
one gets exactly as many tokens as asked for. Core and mesh take turns, so that the machine's drift
falls on both; medians are printed, and the overhead is the median of the ratios turn by turn. The
client that reads the streams runs on the same machine and is counted as part of the mesh.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import meshserve
from benchmarks.core_process import CoreProcess
from benchmarks.local_mesh import LocalMesh
from benchmarks.prompts import english_prompts
from services.runtime.modelfiles import locate, pull

KV_CACHE_BYTES = 1 << 30


@dataclass(frozen=True, slots=True)
class MeshRun:
    """One run through the mesh."""

    duration_s: float
    first_token_s: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Row:
    """Medians at one concurrency."""

    concurrency: int
    core_tokens_per_s: float
    mesh_tokens_per_s: float
    overhead_percent: float
    first_token_ms: float


async def run_mesh(target: str, prompts: list[list[int]], output_tokens: int) -> MeshRun:
    """Streams all prompts at once."""
    async with meshserve.AsyncClient(target, timeout=600) as client:
        await client.models()
        started = time.perf_counter()

        async def one(prompt: list[int]) -> float:
            first_s = 0.0
            async with client.stream_generate(
                prompt, max_tokens=output_tokens, temperature=0, ignore_eos=True, cache=False
            ) as stream:
                async for _ in stream:
                    first_s = first_s or time.perf_counter() - started
                answer = await stream.collect()
            if answer.usage.completion_tokens != output_tokens:
                raise RuntimeError(f"{answer.usage.completion_tokens} tokens came out")
            return first_s

        firsts = await asyncio.gather(*(one(prompt) for prompt in prompts))
        return MeshRun(time.perf_counter() - started, tuple(firsts))


def measure(
    core: CoreProcess, mesh: LocalMesh, prompts: list[list[int]], output_tokens: int, turns: int
) -> Row:
    """Core and mesh in turn."""
    tokens = len(prompts) * output_tokens
    core_s: list[float] = []
    mesh_runs: list[MeshRun] = []
    for _ in range(turns):
        core_s.append(core.run(prompts, output_tokens))
        mesh_runs.append(asyncio.run(run_mesh(mesh.target, prompts, output_tokens)))
    ratios = [run.duration_s / alone for run, alone in zip(mesh_runs, core_s, strict=True)]
    return Row(
        concurrency=len(prompts),
        core_tokens_per_s=statistics.median(tokens / each for each in core_s),
        mesh_tokens_per_s=statistics.median(tokens / run.duration_s for run in mesh_runs),
        overhead_percent=100 * (statistics.median(ratios) - 1),
        first_token_ms=1000
        * statistics.median(first for run in mesh_runs for first in run.first_token_s),
    )


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="name, path or hub id")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    pull(arguments.model)
    most = max(arguments.concurrency)
    engine: dict[str, Any] = {
        "max_running_sequences": most,
        "max_batch_tokens": max(512, most),
        "kv_cache_bytes": KV_CACHE_BYTES,
    }
    core_settings = {
        "model_path": str(locate(arguments.model)),
        "dtype": arguments.dtype,
        "max_running_sequences": engine["max_running_sequences"],
        "max_batch_tokens": engine["max_batch_tokens"],
        "kv_cache_memory_bytes": KV_CACHE_BYTES,
    }
    mesh_settings = {
        "models": {"bench": {"source": arguments.model, "dtype": arguments.dtype}},
        "engine": engine,
    }
    rows = []
    with CoreProcess(core_settings) as core, LocalMesh(mesh_settings) as mesh:
        print(
            f"{arguments.model}, {core.description}, {os.cpu_count()} cores; "
            f"{arguments.prompt_tokens} prompt tokens, {arguments.output_tokens} output tokens, "
            f"{arguments.turns} turns; the mesh was ready after {mesh.start_s:.1f} s"
        )
        print("concurrency   core tokens/s   mesh tokens/s   overhead   first token")
        warm_up = english_prompts(arguments.model, 1, 16)
        core.run(warm_up, 4)
        asyncio.run(run_mesh(mesh.target, warm_up, 4))
        for concurrency in arguments.concurrency:
            prompts = english_prompts(arguments.model, concurrency, arguments.prompt_tokens)
            row = measure(core, mesh, prompts, arguments.output_tokens, arguments.turns)
            rows.append(row)
            print(
                f"{row.concurrency:11d} {row.core_tokens_per_s:15.1f} {row.mesh_tokens_per_s:15.1f}"
                f" {row.overhead_percent:9.1f}% {row.first_token_ms:10.0f} ms"
            )
    if arguments.json is not None:
        report = {
            "model": arguments.model,
            "engine": core.description,
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "prompt_tokens": arguments.prompt_tokens,
            "output_tokens": arguments.output_tokens,
            "mesh_start_s": mesh.start_s,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
