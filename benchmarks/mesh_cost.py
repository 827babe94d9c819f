"""Processor time that each service of the mesh takes for a token, around a core of a given speed.

    python -m benchmarks.mesh_cost --step-ms 9 --concurrency 1 8 32

The core is a paced one (paced_core.py), which leaves the processors to what is measured; time is
counted per process, so other work on the machine moves the figures little. Prompts have 64 to 256
tokens and answers 64 to 128, each stream starts its next request when its last one has ended. The
client is counted as well: on one machine it takes from the core as the services do.
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
from collections.abc import Iterator
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
PROMPT_TOKENS = (64, 256)
OUTPUT_TOKENS = (64, 128)


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


def make_requests(model: str, count: int, seed: int) -> list[Request]:
    """Requests whose lengths are drawn evenly from the ranges above."""
    draw = random.Random(seed)
    prompts = english_prompts(model, count, PROMPT_TOKENS[1])
    return [
        Request(prompt[: draw.randint(*PROMPT_TOKENS)], draw.randint(*OUTPUT_TOKENS))
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
    return times.user + times.system


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mesh_cost", description=__doc__)
    parser.add_argument("--model", default="smollm2-135m", help="name, path or hub id")
    parser.add_argument("--step-ms", type=float, default=9.0, help="how long a step takes")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, help="default: four for each stream")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with paced_mesh(arguments.model, arguments.step_ms) as (target, processes):
        names = sorted(processes)
        print(f"microseconds of processor time per token; steps of {arguments.step_ms:g} ms")
        print(f"{'streams':>8}" + "".join(f"{name:>14}" for name in (*names, "sum")), end="")
        print(f"{'tokens/s':>10}{'TTFT p50':>10}{'gap p50':>10}{'gap p99':>10}")
        warm_up = make_requests(arguments.model, 8, 0)
        asyncio.run(send_all(target, warm_up, 8))
        for concurrency in arguments.concurrency:
            count = arguments.requests or 4 * concurrency
            requests = make_requests(arguments.model, count, arguments.seed)
            tokens = sum(request.output_tokens for request in requests)
            before = {name: _cpu_s(processes[name]) for name in names}
            started = time.perf_counter()
            arrivals = asyncio.run(send_all(target, requests, concurrency))
            elapsed_s = time.perf_counter() - started
            cost = [1e6 * (_cpu_s(processes[name]) - before[name]) / tokens for name in names]
            print(
                f"{concurrency:8d}" + "".join(f"{each:14.1f}" for each in (*cost, sum(cost))),
                end="",
            )
            gaps = statistics.quantiles(arrivals.gaps_s, n=100)
            print(
                f"{tokens / elapsed_s:10.0f}{1000 * statistics.median(arrivals.first_s):10.1f}"
                f"{1000 * gaps[49]:10.1f}{1000 * gaps[98]:10.1f}"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
