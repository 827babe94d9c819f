"""What the mesh adds to its own core: both alive, one workload, in turns.

    make bench
    python -m benchmarks.mesh_overhead --workload W3 --turns 5

The machine's drift falls on both, since they take turns; the overhead is the median of the ratios
turn by turn, and how far these lie apart is printed with it. The client that reads the streams runs
on the same machine and counts as part of the mesh.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks import report as reports
from benchmarks.load import Run
from benchmarks.machine import code_revision, load_average
from benchmarks.plan import make_plan
from benchmarks.systems.base import RunningSystem
from benchmarks.systems.meshserve_systems import Core, Mesh
from benchmarks.workloads import SHAPES, Workload
from services.runtime.modelfiles import pull


@dataclass(frozen=True, slots=True)
class Overhead:
    """Output tokens per second of both, as medians, and how much longer the mesh takes."""

    workload: str
    turns: int
    core_tokens_per_s: float
    mesh_tokens_per_s: float
    overhead_percent: float
    overhead_percent_range: tuple[float, float]


def overhead(core: Sequence[Run], mesh: Sequence[Run]) -> Overhead:
    """From the runs of both, turn by turn."""
    percents = [
        100 * (through.duration_s / alone.duration_s - 1)
        for alone, through in zip(core, mesh, strict=True)
    ]
    return Overhead(
        workload=core[0].workload,
        turns=len(percents),
        core_tokens_per_s=statistics.median(run.output_tokens_per_s for run in core),
        mesh_tokens_per_s=statistics.median(run.output_tokens_per_s for run in mesh),
        overhead_percent=statistics.median(percents),
        overhead_percent_range=(min(percents), max(percents)),
    )


def take_turns(core: RunningSystem, mesh: RunningSystem, workloads: Sequence[Workload]) -> Overhead:
    """Each workload by both; who goes first changes from turn to turn."""
    runs: dict[str, list[Run]] = {"core": [], "mesh": []}
    for turn, workload in enumerate(workloads):
        order = [("core", core), ("mesh", mesh)]
        for name, system in order if turn % 2 == 0 else reversed(order):
            runs[name].append(system.run(workload))
    return overhead(runs["core"], runs["mesh"])


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mesh_overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2-135m", help="name, path or hub id")
    parser.add_argument("--workload", default="W3", choices=[shape.name for shape in SHAPES])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="put the figure into this report")
    arguments = parser.parse_args()
    pull(arguments.model)
    shape = next(shape for shape in SHAPES if shape.name == arguments.workload)
    # Other prompts than the runner's, which a report's systems may still remember.
    plan = make_plan(arguments.model, [shape], arguments.turns, arguments.seed + 1)
    load = load_average()
    with (
        Core("core", "", arguments.model).start() as core,
        Mesh("mesh", "", arguments.model).start() as mesh,
    ):
        for system in (core, mesh):
            warm_up = plan.warm_ups[0]
            system.first_token(warm_up[0])
            system.run(Workload("warm-up", len(warm_up) - 1, tuple(warm_up[1:])))
        result = take_turns(core, mesh, [workloads[0] for workloads in plan.rounds])
    low, high = result.overhead_percent_range
    print(
        f"{result.workload}: core {result.core_tokens_per_s:.1f} tokens/s, "
        f"mesh {result.mesh_tokens_per_s:.1f} tokens/s, "
        f"overhead {result.overhead_percent:.1f} % "
        f"({low:.1f} to {high:.1f} in {result.turns} turns)"
    )
    if arguments.json is not None:
        report = reports.read_report(arguments.json)
        report["mesh_overhead"] = {
            **asdict(result),
            "revision": code_revision(),
            "load_average_before": round(load, 2),
        }
        reports.write_report(report, arguments.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
