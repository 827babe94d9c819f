"""The same sequences through `transformers`' own continuous batching, in the same process."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_bench import Bench
from benchmarks.gpu_synthetic import tiny

_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class TransformersRun:
    """How long it took, from the first sequence to the last token, and which version it was."""

    seconds: float
    version: str


def run_transformers(
    bench: Bench, config: dict[str, Any], prompts: Sequence[list[int]], outputs: Sequence[int]
) -> TransformersRun:
    """Generate exactly `outputs[i]` tokens after each prompt.

    Its manager is given what it chooses by itself, and warmed up before time is taken. Raises
    RuntimeError where a sequence fails or nothing comes any more.
    """
    import transformers
    from transformers import AutoConfig

    fields = {name: value for name, value in config.items() if name != "architectures"}
    shape = AutoConfig.for_model(**(tiny(fields) if bench.tiny else fields))
    with torch.device(bench.device):
        make: Any = transformers.AutoModelForCausalLM
        model = make.from_config(shape, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    configure: Any = transformers.GenerationConfig
    generation = configure(
        do_sample=True,
        temperature=0.6,
        top_k=0,
        max_new_tokens=max(outputs),
        eos_token_id=-1,
        pad_token_id=0,
    )
    try:
        with model.continuous_batching_context_manager(
            generation_config=generation, block=True, timeout=5
        ) as manager:
            # Its first sequence pays for what is done once.
            manager.add_request(list(prompts[0]), request_id="warm-up", max_new_tokens=4)
            _wait(bench, manager, {"warm-up": 4})
            if bench.device.type == "cuda":
                torch.cuda.synchronize()
            started = time.perf_counter()
            wanted = {}
            for index, (tokens, output) in enumerate(zip(prompts, outputs, strict=True)):
                manager.add_request(list(tokens), request_id=str(index), max_new_tokens=output)
                wanted[str(index)] = output
            _wait(bench, manager, wanted)
            return TransformersRun(time.perf_counter() - started, transformers.__version__)
    finally:
        del model
        gc.collect()
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def _wait(bench: Bench, manager: Any, wanted: dict[str, int]) -> None:
    missing = dict(wanted)
    while missing:
        result = manager.get_result(timeout=_POLL_S)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("its generation thread has ended")
            if bench.left_s < -60:
                raise RuntimeError(f"{len(missing)} sequences had not ended when time was up")
            continue
        if result.error is not None:
            raise RuntimeError(f"a sequence failed: {result.error}")
        if result.is_finished():
            expected = missing.pop(result.request_id)
            if len(result.generated_tokens) != expected:
                raise RuntimeError(f"{len(result.generated_tokens)} tokens instead of {expected}")
