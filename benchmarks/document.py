"""Writes the tables and plots of docs/benchmarks.md from the report beside it.

    python -m benchmarks.document
    python -m benchmarks.document --check

What stands between `<!-- report: begin -->` and `<!-- report: end -->` is replaced.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.figures import SERVICE_LEVEL
from benchmarks.machine import ROOT
from benchmarks.report import Report, ReportError, read_report
from benchmarks.tables import (
    between_tokens,
    by_workload,
    configurations,
    end_to_end,
    first_token,
    goodput,
    losses,
    overhead,
    resources,
    throughput,
    workloads,
)

DOCS = ROOT / "docs"
REPORT = DOCS / "benchmarks.json"
PAGE = DOCS / "benchmarks.md"
IMAGES = DOCS / "images"
BEGIN, END = "<!-- report: begin -->\n", "<!-- report: end -->"


def _load_warning(report: Report) -> str:
    """What the load of the machine before the systems were measured says about their figures."""
    cores = report["machine"]["cores"]
    loads = {each["title"]: each["load_average_before"] for each in report["systems"].values()}
    busy = [title for title, load in loads.items() if load >= cores]
    if busy:
        return (
            "**The machine was busy with other work when these were measured: "
            f"{', '.join(busy)}.** Their figures are lower than they should be, each by another "
            "factor, and are no comparison.\n\n"
        )
    # For a minute, the average also counts what ran before.
    highest = max(loads.values(), default=0.0)
    return f"The load average before the run was {highest:.1f}, on {cores} cores.\n\n"


def rendered(report: Report) -> str:
    """The generated part of the page."""
    machine = report["machine"]
    level = f"{SERVICE_LEVEL.first_token_s:g} s to the first token, then at most "
    level += f"{1000 * SERVICE_LEVEL.per_token_s:g} ms per token on average"
    return (
        f"{_load_warning(report)}{machine['processor']}, {machine['cores']} cores "
        f"({', '.join(machine['instruction_sets'])}), {machine['memory_gib']} GiB, "
        f"{machine['system']}, Python {machine['python']}; model `{report['model']}`.\n\n"
        f"### Workloads\n\n{workloads(report)}\n\n"
        f"### Output tokens per second\n\n{by_workload(report, throughput)}\n\n"
        "![Output tokens per second](images/benchmarks-throughput.svg)\n\n"
        f"{losses(report)}\n\n"
        f"### Time to first token, ms: median / 99th percentile\n\n"
        f"{by_workload(report, first_token)}\n\n"
        "![Time to first token](images/benchmarks-first-token.svg)\n\n"
        "### Inter-token latency, ms: median / 99th percentile\n\n"
        "The wait before each message that brought tokens, the first excepted.\n\n"
        f"{by_workload(report, between_tokens)}\n\n"
        f"### End to end, ms: median / 99th percentile\n\n{by_workload(report, end_to_end)}\n\n"
        f"### Goodput: requests per second that kept {level} (and their share)\n\n"
        f"{by_workload(report, goodput)}\n\n"
        f"### Memory and start\n\n{resources(report)}\n\n"
        f"### The mesh beside its own core\n\n{overhead(report)}\n\n"
        f"### Configurations\n\n{configurations(report)}\n"
    )


def page_with(text: str, part: str) -> str:
    """The page with its generated part replaced. Raises ReportError where there is no place."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ReportError(f"{PAGE.name} has no place between {BEGIN.strip()} and {END}")
    return before + begin + part + end + after


def draw(report: Report, directory: Path) -> None:
    """Writes the plots."""
    # Imported here: checking the page needs no plots.
    from benchmarks.plots import grouped_bars

    directory.mkdir(exist_ok=True)
    grouped_bars(
        report,
        lambda summary: summary["output_tokens_per_s"],
        "Output tokens per second (more is better)",
        directory / "benchmarks-throughput.svg",
    )
    grouped_bars(
        report,
        lambda summary: summary["ttft_p50_ms"],
        "Median time to first token, ms (less is better)",
        directory / "benchmarks-first-token.svg",
    )


def main() -> int:
    """Writes, or checks; the exit code is 1 where the page is not what the report says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.document", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    try:
        report = read_report(REPORT)
        old = PAGE.read_text(encoding="utf-8")
        new = page_with(old, rendered(report))
    except (OSError, ReportError) as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.check:
        if old != new:
            print(f"{PAGE.name} is not what {REPORT.name} says", file=sys.stderr)
        return int(old != new)
    PAGE.write_text(new, encoding="utf-8")
    draw(report, IMAGES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
