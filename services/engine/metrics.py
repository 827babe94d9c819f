"""What an engine's cores say of themselves, as Prometheus metrics, labelled with their models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from services.engine.core.messages import Encoded, GpuUse, Load, Step
from services.engine.core_client import CoreClient
from services.engine.hosted_model import State
from services.engine.hosting import Hosting
from services.runtime.telemetry import Metrics
from services.runtime.telemetry.metrics import Reading

_LOAD_FIELDS = {
    "meshserve_engine_running_sequences": "running_sequences",
    "meshserve_engine_waiting_sequences": "waiting_sequences",
    "meshserve_engine_kv_blocks_used": "used_blocks",
    "meshserve_engine_kv_blocks": "num_blocks",
}
_GPU_MEASURES: dict[str, Callable[[GpuUse], float | None]] = {
    "meshserve_engine_gpu_memory_used_bytes": lambda use: use.memory_used_bytes,
    "meshserve_engine_gpu_memory_bytes": lambda use: use.memory_bytes,
    "meshserve_engine_gpu_utilization": lambda use: use.utilization,
}


def read_models(metrics: Metrics, models: Hosting) -> None:
    """Has metrics read, when they are scraped, where the models are and what their cores do."""

    def read_states() -> Iterator[Reading]:
        for model in models.models:
            now = State.SLEEPING if model.state is State.WAKING else model.state
            for state in State:
                if state is not State.WAKING:
                    yield (model.name, state.value), float(now is state)

    metrics.read("meshserve_engine_model_state", read_states)
    is_alone = len(models.models) == 1
    for model in models.models:
        read_core(metrics, model.name, model.client)
        metrics.processes["core" if is_alone else f"core {model.name}"] = partial(
            getattr, model.client, "core_pid"
        )


def read_core(metrics: Metrics, model: str, client: CoreClient) -> None:
    """Has metrics read, when they are scraped, what changes between steps as well, and with no step
    at all when the last sequence is aborted or the core is gone."""

    def load_reader(field: str) -> Callable[[], Iterator[Reading]]:
        def read() -> Iterator[Reading]:
            yield (model,), float(getattr(client.load, field))

        return read

    def gpu_reader(measure: Callable[[GpuUse], float | None]) -> Callable[[], Iterator[Reading]]:
        def read() -> Iterator[Reading]:
            facts, use = client.facts, client.gpu_use
            if facts is not None and use is not None and (value := measure(use)) is not None:
                yield (model, facts.device), value

        return read

    def read_info() -> Iterator[Reading]:
        facts = client.facts
        if facts is not None and client.is_ready:
            yield (model, facts.architecture, facts.dtype, facts.device), 1.0

    for name, field in _LOAD_FIELDS.items():
        metrics.read(name, load_reader(field))
    for name, measure in _GPU_MEASURES.items():
        metrics.read(name, gpu_reader(measure))
    metrics.read("meshserve_engine_info", read_info)


class StepMetrics:
    """Counts what each step brought."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self._steps = metrics.counter("meshserve_engine_steps").labels(model)
        self._generated_tokens = metrics.counter("meshserve_engine_generated_tokens").labels(model)
        self._durations = metrics.histogram("meshserve_engine_step_duration_seconds").labels(model)
        self._batch_sequences = metrics.histogram("meshserve_engine_batch_sequences").labels(model)
        self._batch_tokens = metrics.histogram("meshserve_engine_batch_tokens").labels(model)
        # What the core has counted since its own start, by the field of its load.
        self._growing = [
            (field, metrics.counter(f"meshserve_engine_{field}").labels(model))
            for field in (
                "prompt_tokens",
                "preemptions",
                "cache_queried_tokens",
                "cache_hit_tokens",
                "drafted_tokens",
                "accepted_draft_tokens",
                "failed_sequences",
                "compiled_constraints",
                "found_constraints",
                "masks",
            )
        ]
        # The same, in microseconds.
        self._times = [
            (field, metrics.counter(f"meshserve_engine_{name}_seconds").labels(model))
            for field, name in (
                ("constraint_compile_us", "constraint_compile"),
                ("mask_us", "mask"),
            )
        ]
        self._seen = Load()

    def observe(self, step: Step | Encoded) -> None:
        """Take in one step, or one batch of an encoder."""
        load, seen = step.load, self._seen
        self._steps.inc()
        self._durations.observe(load.last_step_us / 1e6)
        self._batch_sequences.observe(step.batch_size)
        self._batch_tokens.observe(step.num_tokens)
        if isinstance(step, Step):
            self._generated_tokens.inc(sum(len(delta.token_ids) for delta in step.deltas))
        for field, counter in self._growing:
            if growth := _growth(seen, load, field):
                counter.inc(growth)
        for field, counter in self._times:
            if growth_us := _growth(seen, load, field):
                counter.inc(growth_us / 1e6)
        self._seen = load


def _growth(before: Load, now: Load, field: str) -> int:
    old, new = getattr(before, field), getattr(now, field)
    # A core that was started again counts from nothing.
    return int(new - old if new >= old else new)
