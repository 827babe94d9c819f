"""What the core says of itself becomes metrics, over restarts and with a GPU or without."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from services.engine.core.gpu import gpu_use
from services.engine.core.messages import GpuUse, Load, Step
from services.engine.metrics import StepMetrics, read_core
from services.runtime.telemetry import Metrics

MODEL = {"model": "m"}
CUDA = {**MODEL, "device": "cuda:0"}


def step(**load: int) -> Step:
    return Step(number=1, batch_size=3, num_tokens=40, ended_ns=0, deltas=[], load=Load(**load))


def value(metrics: Metrics, name: str, labels: dict[str, str]) -> float | None:
    found: float | None = metrics.registry.get_sample_value(f"meshserve_engine_{name}", labels)
    return found


def client(**known: Any) -> Any:
    facts = SimpleNamespace(architecture="llama", dtype="bfloat16", device="cuda:0")
    return SimpleNamespace(
        **{"load": Load(), "facts": facts, "gpu_use": None, "is_ready": True, **known}
    )


def test_counts_go_on_when_a_core_that_was_started_again_counts_from_nothing() -> None:
    metrics = Metrics("engine")
    counts = StepMetrics(metrics, "m")
    for preemptions in (2, 5, 1, 1, 4):
        counts.observe(step(preemptions=preemptions))
    assert value(metrics, "preemptions_total", MODEL) == 5 + 4
    assert value(metrics, "batch_sequences_sum", MODEL) == 5 * 3
    assert value(metrics, "batch_tokens_sum", MODEL) == 5 * 40


def test_what_rules_for_outputs_cost_is_counted() -> None:
    metrics = Metrics("engine")
    counts = StepMetrics(metrics, "m")
    counts.observe(step(compiled_constraints=1, constraint_compile_us=500_000))
    counts.observe(
        step(compiled_constraints=2, constraint_compile_us=750_000, masks=30, mask_us=1_500)
    )
    assert value(metrics, "compiled_constraints_total", MODEL) == 2
    assert value(metrics, "constraint_compile_seconds_total", MODEL) == 0.75
    assert value(metrics, "masks_total", MODEL) == 30
    assert value(metrics, "mask_seconds_total", MODEL) == 0.0015


def test_a_load_is_that_of_the_moment_in_which_it_is_asked_for() -> None:
    metrics = Metrics("engine")
    core = client(load=Load(waiting_sequences=7))
    read_core(metrics, "m", core)
    assert value(metrics, "waiting_sequences", MODEL) == 7
    core.load = Load()
    assert value(metrics, "waiting_sequences", MODEL) == 0


def test_a_gpu_is_told_of_where_the_core_has_one() -> None:
    metrics = Metrics("engine")
    read_core(metrics, "m", client(gpu_use=GpuUse(60, 80, 0.5)))
    assert value(metrics, "gpu_memory_used_bytes", CUDA) == 60
    assert value(metrics, "gpu_memory_bytes", CUDA) == 80
    assert value(metrics, "gpu_utilization", CUDA) == 0.5


def test_what_a_driver_does_not_tell_is_absent_and_not_nothing() -> None:
    metrics = Metrics("engine")
    core = client(gpu_use=GpuUse(60, 80, None))
    read_core(metrics, "m", core)
    assert value(metrics, "gpu_utilization", CUDA) is None
    core.gpu_use = None
    assert value(metrics, "gpu_memory_bytes", CUDA) is None


def test_a_cpu_is_no_gpu() -> None:
    assert gpu_use("cpu") is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_a_real_gpu_tells_of_itself() -> None:
    use = gpu_use("cuda:0")
    assert use is not None
    assert 0 < use.memory_used_bytes < use.memory_bytes
    assert use.utilization is None or 0 <= use.utilization <= 1
