"""Measures systems in turns: one alive at a time, every workload, several rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from benchmarks.load import BenchmarkError, Run
from benchmarks.memory import PeakMemory
from benchmarks.plan import Plan
from benchmarks.systems.base import System
from benchmarks.workloads import Request, Workload


@dataclass(slots=True)
class SystemRuns:
    """All that was measured of one system."""

    runs: dict[str, list[Run]] = field(default_factory=dict)  # by workload, in order of rounds
    start_to_first_token_s: list[float] = field(default_factory=list)  # by round
    peak_memory_bytes: list[int] = field(default_factory=list)  # by round
    failures: list[str] = field(default_factory=list)


def measure(
    systems: Sequence[System],
    plan: Plan,
    say: Callable[[str], None],
    keep: Callable[[dict[str, SystemRuns]], None] = lambda _: None,
) -> dict[str, SystemRuns]:
    """Runs everything. A system that fails keeps what it has done and is left out afterwards.

    `keep` is given all results after each system's turn, so that an interrupted run loses only one.
    """
    results = {system.name: SystemRuns() for system in systems}
    for number, (workloads, warm_up) in enumerate(zip(plan.rounds, plan.warm_ups, strict=True)):
        for system in systems:
            result = results[system.name]
            if result.failures:
                continue
            say(f"round {number + 1} of {len(plan.rounds)}: {system.title}")
            try:
                _measure_once(system, workloads, warm_up, result, say)
            except BenchmarkError as error:
                result.failures.append(str(error))
                say(f"  failed: {error}")
            keep(results)
    return results


def _measure_once(
    system: System,
    workloads: Sequence[Workload],
    warm_up: Sequence[Request],
    result: SystemRuns,
    say: Callable[[str], None],
) -> None:
    started_s = time.perf_counter()
    with system.start() as running:
        running.first_token(warm_up[0])
        took_s = time.perf_counter() - started_s
        with PeakMemory(running.pid) as memory:
            running.run(Workload("warm-up", len(warm_up) - 1, tuple(warm_up[1:])))
            for workload in workloads:
                run = running.run(workload)
                result.runs.setdefault(workload.name, []).append(run)
                say(f"  {workload.name}: {run.output_tokens_per_s:8.1f} tokens/s")
        result.start_to_first_token_s.append(took_s)
        result.peak_memory_bytes.append(memory.peak_bytes)
