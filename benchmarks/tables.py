"""Tables of a report, in Markdown."""

from __future__ import annotations

import json
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


def workloads(report: Report) -> str:
    """What each workload is."""
    rows = [
        [name, f"{shape['title']}; {shape['num_requests']} requests"]
        for name, shape in sorted(report["workloads"].items())
    ]
    return "\n".join(["| | |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)])


def losses(report: Report) -> str:
    """Plainly: on which workloads the mesh is behind the best peer, and by how much it leads."""
    mesh = report["systems"].get("mesh")
    peers = {
        name: entry
        for name, entry in report["systems"].items()
        if not name.startswith(("mesh", "core"))
    }
    if mesh is None or not peers:
        return "MeshServe and a peer have not been measured together."
    lines = []
    for workload in sorted(mesh["summaries"]):
        rivals = [
            (entry["summaries"][workload]["output_tokens_per_s"], entry["title"])
            for entry in peers.values()
            if workload in entry["summaries"]
        ]
        if rivals:
            best, title = max(rivals)
            ratio = mesh["summaries"][workload]["output_tokens_per_s"] / best
            verdict = "ahead of" if ratio >= 1 else "**behind**"
            lines.append(f"- {workload}: {ratio:.2f}× the best peer, {verdict} {title}")
    return "MeshServe through its gateway beside the best peer on each workload:\n\n" + "\n".join(
        lines
    )


def overhead(report: Report) -> str:
    """The paired measurement, if it was done."""
    found = report.get("mesh_overhead")
    if found is None:
        return "Not measured in this report: `python -m benchmarks.mesh_overhead`."
    low, high = found["overhead_percent_range"]
    return (
        f"{found['workload']}, both alive and taking turns: core "
        f"{found['core_tokens_per_s']:,.1f} tokens/s, through the mesh "
        f"{found['mesh_tokens_per_s']:,.1f} tokens/s, overhead "
        f"{found['overhead_percent']:.1f} % (from {low:.1f} % to {high:.1f} % over "
        f"{found['turns']} turns). Commit `{found['revision']}`."
    )


def configurations(report: Report) -> str:
    """How each system was started."""
    parts = []
    for name, entry in report["systems"].items():
        versions = ", ".join(f"{key} {value}" for key, value in entry["versions"].items())
        lines = [f"**{entry['title']}** (`{name}`): {versions}; measured {entry['measured']}"]
        if entry.get("revision") and "settings" in entry:
            lines[0] += f", commit `{entry['revision']}`"
        lines[0] += f", load average before {entry['load_average_before']}."
        if "command" in entry:
            variables = "".join(f"{key}={value} " for key, value in entry["environment"].items())
            lines.append(f"\n```console\n$ {variables}{' '.join(entry['command'])}\n```")
        else:
            lines.append(f"\n```json\n{json.dumps(entry['settings'], sort_keys=True)}\n```")
        lines += [f"\nFailed: {failure.splitlines()[0]}" for failure in entry["failures"]]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)
