"""Tables of a report, in Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.report import Report

Cell = Callable[[dict[str, Any]], str]


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is left and whose others are right."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_workload(report: Report, cell: Cell) -> str:
    """One row for each system, one column for each workload."""
    workloads = sorted(report["workloads"])
    rows = [
        [
            entry["title"],
            *(
                cell(entry["summaries"][name]) if name in entry["summaries"] else "–"
                for name in workloads
            ),
        ]
        for entry in report["systems"].values()
    ]
    return markdown(["", *workloads], rows)


def throughput(summary: dict[str, Any]) -> str:
    """Output tokens per second."""
    return f"{summary['output_tokens_per_s']:,.1f}"


def first_token(summary: dict[str, Any]) -> str:
    """Median and 99th percentile of the time to first token."""
    return f"{summary['ttft_p50_ms']:,.0f} / {summary['ttft_p99_ms']:,.0f}"


def between_tokens(summary: dict[str, Any]) -> str:
    """Median and 99th percentile of the time between messages."""
    return f"{summary['itl_p50_ms']:,.1f} / {summary['itl_p99_ms']:,.1f}"


def end_to_end(summary: dict[str, Any]) -> str:
    """Median and 99th percentile of the whole request."""
    return f"{summary['end_to_end_p50_ms']:,.0f} / {summary['end_to_end_p99_ms']:,.0f}"


def goodput(summary: dict[str, Any]) -> str:
    """Requests per second that kept the service level, and their share."""
    return f"{summary['goodput_requests_per_s']:,.1f} ({summary['kept_service_level']:.0%})"


def resources(report: Report) -> str:
    """Peak memory and seconds from start to first token."""
    rows = [
        [
            entry["title"],
            f"{entry['peak_memory_bytes'] / 2**20:,.0f}",
            "–"
            if entry["start_to_first_token_s"] is None
            else f"{entry['start_to_first_token_s']:.1f}",
        ]
        for entry in report["systems"].values()
    ]
    return markdown(["", "Peak memory, MiB", "Start to first token, s"], rows)


def overview(report: Report) -> str:
    """What the command prints when it is done."""
    return "\n\n".join(
        (
            "Output tokens/s\n\n" + by_workload(report, throughput),
            "Time to first token, ms, p50 / p99\n\n" + by_workload(report, first_token),
            "Inter-token latency, ms, p50 / p99\n\n" + by_workload(report, between_tokens),
            "End to end, ms, p50 / p99\n\n" + by_workload(report, end_to_end),
            "Goodput, requests/s (share)\n\n" + by_workload(report, goodput),
            resources(report),
        )
    )
