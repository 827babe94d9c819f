"""Measures MeshServe and its peers on the six workloads, one system at a time, in turns.

    python -m benchmarks --systems core mesh --workloads W1 W3
    python -m benchmarks --systems all --rounds 3 --json report.json
    python -m benchmarks --systems core mesh --json report.json --merge

Every system answers the same prompts with the same number of greedy tokens. `--merge` measures some
systems anew and keeps what the file says of the others, if it comes from this machine.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks import report as reports
from benchmarks.machine import load_average
from benchmarks.plan import make_plan
from benchmarks.runner import SystemRuns, measure
from benchmarks.systems.registry import GROUPS, make_systems
from benchmarks.tables import overview
from benchmarks.workloads import SHAPES
from services.runtime.modelfiles import pull


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2-135m", help="name, path or hub id")
    parser.add_argument(
        "--systems",
        nargs="+",
        default=["ours"],
        metavar="NAME",
        help=f"names, or groups: {', '.join(GROUPS)}; an unknown one lists all",
    )
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--workloads", nargs="+", default=names, choices=names)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the report to this file")
    parser.add_argument("--merge", action="store_true", help="keep what the file has of the others")
    return parser.parse_args(arguments)


def main() -> int:
    """Measures and prints; the exit code is 1 where a system failed or could not be measured."""
    arguments = parse()
    pull(arguments.model)
    shapes = [shape for shape in SHAPES if shape.name in arguments.workloads]
    try:
        systems = make_systems(arguments.systems, arguments.model)
        report = reports.new_report(shapes, arguments.model, arguments.seed)
        if arguments.merge:
            old = reports.read_report(arguments.json)
            reports.check_comparable(old, report)
            report = {**old, "workloads": {**old["workloads"], **report["workloads"]}}
    except (ValueError, reports.ReportError) as error:
        print(error, file=sys.stderr)
        return 1
    load = load_average()
    print(f"load average before: {load:.2f}", flush=True)
    plan = make_plan(arguments.model, shapes, arguments.rounds, arguments.seed)

    def keep(results: dict[str, SystemRuns]) -> None:
        done = [each for each in systems if results[each.name] != SystemRuns()]
        reports.add_systems(report, done, results, load)
        if arguments.json is not None:
            reports.write_report(report, arguments.json)

    results = measure(systems, plan, lambda line: print(line, flush=True), keep)
    print(overview(report))
    return 1 if any(result.failures for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
