"""The report: everything measured as JSON, summaries included; two of one machine can be merged."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.figures import SERVICE_LEVEL, summarize
from benchmarks.load import Run
from benchmarks.machine import code_revision, describe_machine
from benchmarks.prompts import text_digest
from benchmarks.runner import SystemRuns
from benchmarks.systems.base import System
from benchmarks.workloads import Shape

FORMAT = 1
Report = dict[str, Any]


class ReportError(Exception):
    """A report cannot be read, or does not fit the other one."""


def new_report(shapes: Sequence[Shape], model: str, seed: int) -> Report:
    """A report without systems."""
    return {
        "format": FORMAT,
        "model": model,
        "machine": describe_machine(),
        "service_level": asdict(SERVICE_LEVEL),
        "text": text_digest(),
        "seed": seed,
        "workloads": {shape.name: asdict(shape) for shape in shapes},
        "systems": {},
    }


def system_entry(system: System, runs: SystemRuns, load_before: float) -> dict[str, Any]:
    """What a report keeps of one system. Raw times are seconds after the run's first request."""
    return {
        **system.describe(),
        "revision": code_revision(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_average_before": round(load_before, 2),
        "start_to_first_token_s": _median(runs.start_to_first_token_s),
        "peak_memory_bytes": int(max(runs.peak_memory_bytes, default=0)),
        "failures": runs.failures,
        "summaries": {name: asdict(summarize(done)) for name, done in runs.runs.items()},
        "raw": {
            "start_to_first_token_s": runs.start_to_first_token_s,
            "peak_memory_bytes": runs.peak_memory_bytes,
            "runs": {name: [_raw(run) for run in done] for name, done in runs.runs.items()},
        },
    }


def add_systems(
    report: Report, systems: Sequence[System], results: Mapping[str, SystemRuns], load: float
) -> None:
    """Puts systems into a report, in place of what it said of them before."""
    for system in systems:
        report["systems"][system.name] = system_entry(system, results[system.name], load)


def read_report(path: Path) -> Report:
    """Reads a report. Raises ReportError where the file is none."""
    try:
        report: Report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: {error}") from error
    if not isinstance(report, dict) or report.get("format") != FORMAT:
        raise ReportError(f"{path} is no benchmark report of format {FORMAT}")
    return report


def check_comparable(old: Report, new: Report) -> None:
    """Raises ReportError unless figures of the two may stand in one table."""
    for key in ("machine", "model", "text", "seed", "service_level"):
        if old[key] != new[key]:
            raise ReportError(
                f"the reports differ in their {key.replace('_', ' ')} and cannot be merged: "
                f"{old[key]} and {new[key]}"
            )
    for name, shape in new["workloads"].items():
        # Through JSON, where a tuple is a list.
        known = old["workloads"].get(name)
        if known is not None and known != json.loads(json.dumps(shape)):
            raise ReportError(f"the reports differ in workload {name} and cannot be merged")


def write_report(report: Report, path: Path) -> None:
    """Writes a report whole or not at all, without spaces, for most of it is lists of numbers."""
    draft = path.with_name(path.name + ".part")
    draft.write_text(json.dumps(report, separators=(",", ":")) + "\n", encoding="utf-8")
    draft.replace(path)


def _raw(run: Run) -> dict[str, Any]:
    zero_s = min(trace.sent_s for trace in run.traces)
    return {
        "duration_s": round(run.duration_s, 6),
        # By column, which takes a third of the room.
        "sent_s": [round(trace.sent_s - zero_s, 4) for trace in run.traces],
        "first_token_s": [round(trace.first_token_s, 4) for trace in run.traces],
        "end_to_end_s": [round(trace.end_to_end_s, 4) for trace in run.traces],
        "longest_gap_s": [round(max(trace.gaps_s, default=0.0), 4) for trace in run.traces],
        "output_tokens": [trace.output_tokens for trace in run.traces],
        "messages": [len(trace.message_s) for trace in run.traces],
    }


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
