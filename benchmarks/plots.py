"""Plots of a report, as SVG."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt

from benchmarks.report import Report

OURS = ("#0b5394", "#6fa8dc", "#3d85c6", "#9fc5e8")
OTHERS = ("#b45f06", "#e69138", "#f6b26b", "#7f6000", "#bf9000", "#999999")


def grouped_bars(
    report: Report, value: Callable[[dict[str, Any]], float], title: str, path: Path
) -> None:
    """One group of bars for each workload, one bar for each system, on a logarithmic scale."""
    workloads = sorted(report["workloads"])
    entries = list(report["systems"].items())
    colours = _colours([name for name, _ in entries])
    width = 0.8 / max(1, len(entries))
    figure, axes = plt.subplots(figsize=(10, 4))
    for index, (name, entry) in enumerate(entries):
        places, heights = [], []
        for number, workload in enumerate(workloads):
            if workload in entry["summaries"]:
                places.append(number + (index - (len(entries) - 1) / 2) * width)
                heights.append(value(entry["summaries"][workload]))
        axes.bar(places, heights, width, label=entry["title"], color=colours[name])
    axes.set_yscale("log")
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_title(title)
    axes.grid(axis="y", which="both", alpha=0.25)
    axes.set_axisbelow(True)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.08), ncol=4, frameon=False)
    # The same report gives the same file, so that a plot changes when a figure does.
    with plt.rc_context({"svg.hashsalt": "benchmarks"}):
        figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _colours(names: list[str]) -> dict[str, str]:
    """Ours in blues, the others in warm tones."""
    ours, others = iter(OURS * len(names)), iter(OTHERS * len(names))
    return {name: next(ours if name.startswith(("core", "mesh")) else others) for name in names}
