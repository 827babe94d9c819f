"""Processor time that each service of the mesh takes, around a core of a given speed.

    python -m benchmarks.mesh_cost --step-ms 9 --concurrency 1 8 32
    python -m benchmarks.mesh_cost --per request --prompt-tokens 32 32 --output-tokens 16 16

The core is a paced one (paced_core.py), which leaves the processors to what is measured; time is
counted per process, so other work on the machine moves the figures little. Each stream starts its
next request when its last one has ended. The client is counted as well: on one machine it takes
from the core as the services do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

import meshserve
from benchmarks import paced_core
from benchmarks.local_mesh import free_ports
from benchmarks.prompts import english_prompts

SERVICES = {
    "tokenizer": "services.tokenizer",
    "engine": "benchmarks.paced_engine",  # its front; the core is a process below it
    "safety": "services.safety",
    "gateway": "services.gateway",
}
START_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Request:
    """One request to send."""

    prompt: list[int]
    output_tokens: int


@dataclass(slots=True)
class Arrivals:
    """When the text of the answers came, in seconds."""

    first_s: list[float]
    gaps_s: list[float]


@dataclass(frozen=True, slots=True)
class Lengths:
    """From which ranges the lengths of requests are drawn evenly, both ends included."""

    prompt_tokens: tuple[int, int]
    output_tokens: tuple[int, int]


def make_requests(model: str, count: int, lengths: Lengths, seed: int) -> list[Request]:
    """Requests that a seed stands for."""
    draw = random.Random(seed)
    prompts = english_prompts(model, count, lengths.prompt_tokens[1])
    return [
        Request(
            prompt[: draw.randint(*lengths.prompt_tokens)], draw.randint(*lengths.output_tokens)
        )
        for prompt in prompts
    ]


async def send_all(target: str, requests: list[Request], concurrency: int) -> Arrivals:
    """Streams the requests, so many at a time."""
    arrivals = Arrivals([], [])
    waiting = iter(requests)
    async with meshserve.AsyncClient(target, timeout=600) as client:

        async def worker() -> None:
            for request in waiting:
                started = last = time.perf_counter()
                async with client.stream_generate(
                    request.prompt,
                    max_tokens=request.output_tokens,
                    temperature=0,
                    ignore_eos=True,
                    cache=False,
                ) as stream:
                    async for _ in stream:
                        now = time.perf_counter()
                        (arrivals.first_s if last == started else arrivals.gaps_s).append(
                            now - last
                        )
                        last = now
                    answer = await stream.collect()
                if answer.usage.completion_tokens != request.output_tokens:
                    raise RuntimeError(f"{answer.usage.completion_tokens} tokens came out")

        await asyncio.gather(*(worker() for _ in range(concurrency)))
    return arrivals


@contextmanager
def paced_mesh(model: str, step_ms: float) -> Iterator[tuple[str, dict[str, psutil.Process]]]:
    """A mesh whose engine runs a paced core: its address, and the processes by name."""
    ports = dict(zip(SERVICES, free_ports(len(SERVICES)), strict=True))
    settings: dict[str, Any] = {
        name: {"listen": f"127.0.0.1:{port}", "metrics_listen": None}
        for name, port in ports.items()
    }
    settings["gateway"]["http_listen"] = None
    settings |= {"models": {"bench": {"source": model}}, "cache": {"enabled": False}}
    environment = {
        **os.environ,
        paced_core.STEP_MS_VARIABLE: str(step_ms),
        paced_core.MODEL_VARIABLE: model,
    }
    started: dict[str, subprocess.Popen[bytes]] = {}
    with tempfile.TemporaryDirectory(prefix="meshserve-bench-") as directory:
        config = Path(directory) / "meshserve.json"  # JSON is YAML
        config.write_text(json.dumps(settings))
        log = Path(directory) / "services.log"
        try:
            with log.open("wb") as output:
                for name, module in SERVICES.items():
                    started[name] = subprocess.Popen(
                        [sys.executable, "-m", module, "--config", str(config)],
                        stderr=output,
                        env=environment,
                    )
            target = f"127.0.0.1:{ports['gateway']}"
            if not asyncio.run(_becomes_ready(target)):
                raise RuntimeError(f"the mesh did not start:\n{log.read_text()}")
            processes = {name: psutil.Process(each.pid) for name, each in started.items()}
            yield target, {"client": psutil.Process(), **processes}
        finally:
            for process in reversed(started.values()):
                process.send_signal(signal.SIGINT)
            for process in started.values():
                process.wait()


async def _becomes_ready(target: str) -> bool:
    give_up_at = time.monotonic() + START_TIMEOUT_S
    async with meshserve.AsyncClient(target) as client:
        while time.monotonic() < give_up_at:
            try:
                if all(model.ready for model in await client.models()):
                    return True
            except meshserve.MeshServeError:
                pass
            await asyncio.sleep(0.1)
    return False


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _print_row(cells: Iterable[object], decimals: int) -> None:
    print(
        "".join(
            f"{cell:10.{decimals}f}" if isinstance(cell, float) else f"{cell:>10}" for cell in cells
        ),
        flush=True,
    )


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mesh_cost", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="name, path or hub id")
    parser.add_argument("--step-ms", type=float, default=9.0, help="how long a step takes")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, help="default: four for each stream")
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(64, 256))
    parser.add_argument("--output-tokens", type=int, nargs=2, default=(64, 128))
    parser.add_argument("--per", choices=["token", "request"], default="token")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    lengths = Lengths(tuple(arguments.prompt_tokens), tuple(arguments.output_tokens))
    with paced_mesh(arguments.model, arguments.step_ms) as (target, processes):
        names = sorted(processes)
        print(
            f"microseconds of processor time per {arguments.per}, milliseconds between tokens; "
            f"steps of {arguments.step_ms:g} ms"
        )
        columns = ("tokens/s", "TTFT p50", "TTFT p99", "gap p50", "gap p99")
        _print_row(("streams", *names, "sum", *columns), 1)
        asyncio.run(send_all(target, make_requests(arguments.model, 8, lengths, 0), 8))
        for concurrency in arguments.concurrency:
            count = arguments.requests or 4 * concurrency
            requests = make_requests(arguments.model, count, lengths, arguments.seed)
            tokens = sum(request.output_tokens for request in requests)
            before = {name: _cpu_s(processes[name]) for name in names}
            started = time.perf_counter()
            arrivals = asyncio.run(send_all(target, requests, concurrency))
            elapsed_s = time.perf_counter() - started
            units = count if arguments.per == "request" else tokens
            cost = [1e6 * (_cpu_s(processes[name]) - before[name]) / units for name in names]
            times = (
                1000 * percentile
                for values in (arrivals.first_s, arrivals.gaps_s)
                for percentile in _median_and_tail(values)
            )
            _print_row((concurrency, *cost, sum(cost), tokens / elapsed_s, *times), 1)
    return 0


def _median_and_tail(values: list[float]) -> tuple[float, float]:
    percentiles = statistics.quantiles(values, n=100)
    return percentiles[49], percentiles[98]


if __name__ == "__main__":
    sys.exit(main())
