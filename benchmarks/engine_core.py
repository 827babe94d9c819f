"""What the engine core gives by itself: output tokens per second by concurrency, and where a
step's time goes.

    python benchmarks/engine_core.py --model smollm2-135m --concurrency 1 8 32

Every sequence has a random prompt and produces exactly as many tokens as asked for. Prefill is in
the measured time; weights are loaded and one warm-up run is done before it. The host time of a
step is what is left after the model's forward pass: scheduling, building the batch, sampling,
stop conditions, deltas.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from services.engine.core import startup
from services.engine.core.engine import EngineCore
from services.engine.core.messages import ModelFacts, Sampling, SequenceRequest, Stopping
from services.engine.core.settings import CoreSettings
from services.runtime.modelfiles import locate


@dataclass(frozen=True, slots=True)
class Measurement:
    """One run. Times are medians over the run's steps in which every sequence decodes."""

    concurrency: int
    output_tokens: int
    duration_s: float
    output_tokens_per_s: float
    decode_step_ms: float
    decode_model_ms: float
    decode_host_ms: float
    prompt_tokens: int


class ModelTimer:
    """Wraps a model's forward and keeps how long the last call took, device work included."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self.last_s = 0.0

    def __call__(self, batch: Any, kv_cache: Any) -> torch.Tensor:
        """Run the model."""
        started = time.perf_counter()
        logits: torch.Tensor = self._model(batch, kv_cache)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self.last_s = time.perf_counter() - started
        return logits


def build(settings: CoreSettings) -> tuple[EngineCore, ModelFacts, ModelTimer]:
    """An engine core whose model is timed."""
    timers: list[ModelTimer] = []

    def make_runner(model: Any, *args: Any, **kwargs: Any) -> Any:
        timers.append(ModelTimer(model, kwargs["device"]))
        return startup.Runner(timers[0], *args, **kwargs)

    engine, facts = startup.build_engine(settings, make_runner=make_runner)
    return engine, facts, timers[0]


def measure(
    engine: EngineCore,
    facts: ModelFacts,
    timer: ModelTimer,
    *,
    concurrency: int,
    prompt_tokens: int,
    output_tokens: int,
    sampling: Sampling,
) -> Measurement:
    """Run `concurrency` sequences that all arrive at once, to their end."""
    rng = np.random.default_rng(concurrency)
    stopping = Stopping(max_tokens=output_tokens, ignore_eos=True)
    engine.add(
        [
            SequenceRequest(
                sequence_id=index,
                prompt_token_ids=rng.integers(0, facts.vocab_size, prompt_tokens).tolist(),
                sampling=sampling,
                stopping=stopping,
            )
            for index in range(concurrency)
        ]
    )
    step_s: list[float] = []
    model_s: list[float] = []
    produced = 0
    started = time.perf_counter()
    while engine.has_work:
        step_started = time.perf_counter()
        step = engine.step()
        took_s = time.perf_counter() - step_started
        produced += sum(len(delta.token_ids) for delta in step.deltas)
        if step.num_tokens == step.batch_size == concurrency:
            step_s.append(took_s)
            model_s.append(timer.last_s)
    duration_s = time.perf_counter() - started
    if produced != concurrency * output_tokens:
        raise RuntimeError(f"{produced} tokens came out, {concurrency * output_tokens} should have")
    host_s = [step - model for step, model in zip(step_s, model_s, strict=True)]
    if not step_s:
        raise RuntimeError("no step in which every sequence decoded one token: try another length")
    return Measurement(
        concurrency=concurrency,
        output_tokens=produced,
        duration_s=duration_s,
        output_tokens_per_s=produced / duration_s,
        decode_step_ms=statistics.median(step_s) * 1e3,
        decode_model_ms=statistics.median(model_s) * 1e3,
        decode_host_ms=statistics.median(host_s) * 1e3,
        prompt_tokens=prompt_tokens,
    )


def main() -> int:
    """Measure and print; the exit code is 0 unless something failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="name, path or hub id")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument(
        "--speculation",
        default="off",
        choices=["auto", "ngram", "off"],
        help="off by default: a step with guesses in it decodes more than one token a sequence",
    )
    parser.add_argument("--plan-ahead", default="auto", choices=["auto", "on", "off"])
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    most = max(arguments.concurrency)
    engine, facts, timer = build(
        CoreSettings(
            model_path=str(locate(arguments.model)),
            device=arguments.device,
            dtype=arguments.dtype,
            threads=arguments.threads,
            max_running_sequences=most,
            max_batch_tokens=max(512, most),
            speculation=arguments.speculation,
            plan_ahead=arguments.plan_ahead,
            kv_cache_memory_bytes=None if arguments.device.startswith("cuda") else 1 << 30,
        )
    )
    sampling = Sampling(temperature=arguments.temperature, top_p=arguments.top_p, seed=1)

    def run(concurrency: int, output_tokens: int) -> Measurement:
        return measure(
            engine,
            facts,
            timer,
            concurrency=concurrency,
            prompt_tokens=arguments.prompt_tokens,
            output_tokens=output_tokens,
            sampling=sampling,
        )

    run(min(arguments.concurrency), 4)
    print(
        f"{arguments.model} ({facts.dtype}) on {facts.device}, {torch.get_num_threads()} threads; "
        f"{arguments.prompt_tokens} prompt tokens, {arguments.output_tokens} output tokens each"
    )
    print("concurrency   output tokens/s   decode step   of it model   of it host")
    measurements = []
    for concurrency in arguments.concurrency:
        result = run(concurrency, arguments.output_tokens)
        measurements.append(result)
        print(
            f"{concurrency:11d} {result.output_tokens_per_s:17.1f} {result.decode_step_ms:10.2f} ms"
            f" {result.decode_model_ms:10.2f} ms {result.decode_host_ms:9.2f} ms"
        )
    if arguments.json is not None:
        report = {
            "benchmark": "engine_core",
            "model": arguments.model,
            "dtype": facts.dtype,
            "device": facts.device,
            "machine": platform.machine(),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "kernels": facts.kernels,
            "load_time_s": facts.load_time_s,
            "temperature": arguments.temperature,
            "top_p": arguments.top_p,
            "measurements": [asdict(result) for result in measurements],
        }
        arguments.json.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
