"""What was measured on a GPU, as JSON, a table in Markdown and plots, beside what is to be
reached."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Goal:
    """Something to be reached on an H100.

    Attributes:
        part, case: of the rows it is judged by: the part's name, a pattern of the case's.
        figure: of a row, what is held against `least`.
        by: a pattern of the implementation's name; the best of those that match counts.
    """

    text: str
    part: str
    case: str
    figure: Callable[[Mapping[str, Any]], float | None]
    least: float
    by: str = "MeshServe"


def _share(row: Mapping[str, Any]) -> float | None:
    share: float | None = row["share"]
    return share


def _value(row: Mapping[str, Any]) -> float | None:
    value: float | None = row["value"]
    return value


_OURS = "triton|cuda"
GOALS = (
    Goal(
        "batch-1 decode of the 8B shape at 85 % or more of the bandwidth floor",
        "decode",
        r"Llama 3.1 8B bf16, batch 1,",
        _share,
        0.85,
    ),
    Goal(
        "16,000 or more output tokens/s on the 8B shape at saturation",
        "saturation",
        r"Llama 3.1 8B bf16",
        lambda row: row["values"].get("tokens/s while all decode"),
        16000.0,
    ),
    Goal(
        "decode attention at 80 % or more of bandwidth at 8k context",
        "attention",
        r"batch 64, context 8192, bf16",
        _share,
        0.80,
        _OURS,
    ),
    Goal(
        "prefill of the 8B shape at 60 % or more of the bf16 matrix rate",
        "prefill",
        r"a prompt of 8192",
        _share,
        0.60,
    ),
    Goal(
        "at least 5 times transformers' continuous batching on the Qwen3 0.6B workload",
        "workload",
        r"256 sequences",
        _value,
        5.0,
        "MeshServe / transformers",
    ),
    Goal("INT4 at least 2.2 times bf16 at batch 1", "quantised", r"int4 / bf16", _value, 2.2),
)


def write_report(into: Path, parts: Mapping[str, str]) -> dict[str, Any]:
    """Write report.json, report.md and plots of what lies in a directory; return the report.

    parts: all that there are and what they measure: those that were not run are listed as open.
    """
    rows = _lines(into / "rows.jsonl")
    ran = _lines(into / "parts.jsonl")
    kept = into / "machine.json"
    machine: dict[str, str] = json.loads(kept.read_text()) if kept.exists() else {}
    is_judged = not machine.get("shapes", "").startswith("tiny")
    report: dict[str, Any] = {
        "format": FORMAT,
        "machine": machine,
        "parts": ran,
        "rows": rows,
        "goals": [_judge(goal, rows if is_judged else []) for goal in GOALS],
        "open": _open(parts, ran, rows),
    }
    (into / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    plots = _plots(rows, into)
    (into / "report.md").write_text(_markdown(report, plots))
    return report


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _judge(goal: Goal, rows: list[dict[str, Any]]) -> dict[str, Any]:
    figures = [
        figure
        for row in rows
        if row["part"] == goal.part
        and re.search(goal.case, row["case"])
        and re.search(goal.by, row["by"])
        and (figure := goal.figure(row)) is not None
    ]
    best = max(figures, default=None)
    state = "open" if best is None else "reached" if best >= goal.least else "missed"
    return {"goal": goal.text, "least": goal.least, "measured": best, "state": state}


def _open(
    parts: Mapping[str, str], ran: list[dict[str, Any]], rows: list[dict[str, Any]]
) -> list[str]:
    """What has no figure, and why."""
    status = {part["name"]: part["status"] for part in ran}
    found = [
        f"{what}: {status.get(name, 'not run')}"
        for name, what in parts.items()
        if status.get(name) != "done"
    ]
    found += [
        f"{row['part']}, {row['case']}, {row['by']}: {row['note']}"
        for row in rows
        if row["value"] is None
    ]
    return [*found, "more than one card: tensor and pipeline parallelism, NCCL"]


def _markdown(report: dict[str, Any], plots: list[str]) -> str:
    lines = ["# The engine on a GPU", ""]
    lines += [f"- {name}: {value}" for name, value in report["machine"].items()]
    lines += ["", "| goal | measured | at least | |", "|---|---|---|---|"]
    for goal in report["goals"]:
        measured = "-" if goal["measured"] is None else f"{goal['measured']:.4g}"
        lines.append(f"| {goal['goal']} | {measured} | {goal['least']:g} | {goal['state']} |")
    for part in report["parts"]:
        lines += ["", f"## {part['name']}", ""]
        if part["status"] != "done":
            lines += [f"{part['status']} after {part['seconds']} s", "", "```", part["text"], "```"]
        rows = [row for row in report["rows"] if row["part"] == part["name"]]
        if not rows:
            continue
        lines += ["| case | by | | of the floor | further |", "|---|---|---|---|---|"]
        lines += map(_table_row, rows)
    lines += ["", "## Open", "", *(f"- {each}" for each in report["open"])]
    lines += ["", *(f"![{name}]({name})" for name in plots)]
    return "\n".join(lines) + "\n"


def _table_row(row: Mapping[str, Any]) -> str:
    value = "-" if row["value"] is None else f"{row['value']:.5g} {row['unit']}"
    share = "" if row["share"] is None else f"{100 * row['share']:.1f} %"
    further = [f"{name}: {number:.5g}" for name, number in row["values"].items()]
    note = " ".join([*further, row["note"]]).replace("|", "\\|").replace("\n", " ")
    return f"| {row['case']} | {row['by']} | {value} | {share} | {note} |"


def _plots(rows: list[dict[str, Any]], into: Path) -> list[str]:
    """A plot for each part that has shares; none where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    written = []
    for part in dict.fromkeys(row["part"] for row in rows):
        found = [row for row in rows if row["part"] == part and row["share"]]
        if not found:
            continue
        cases = list(dict.fromkeys(row["case"] for row in found))
        names = list(dict.fromkeys(row["by"] for row in found))
        figure, axes = plt.subplots(figsize=(9, 1 + 0.22 * len(cases) * len(names)))
        height = 0.8 / len(names)
        for number, name in enumerate(names):
            own = [row for row in found if row["by"] == name]
            places = [cases.index(row["case"]) + number * height for row in own]
            axes.barh(places, [100 * row["share"] for row in own], height, label=name)
        axes.set_yticks([index + 0.4 for index in range(len(cases))], cases, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("% of what the measured ceilings of the card allow")
        axes.axvline(100, color="black", linewidth=0.6)
        axes.legend(fontsize=7)
        axes.set_title(part)
        # The same figures give the same file.
        with plt.rc_context({"svg.hashsalt": "gpu"}):
            figure.savefig(into / f"{part}.svg", bbox_inches="tight", metadata={"Date": None})
        plt.close(figure)
        written.append(f"{part}.svg")
    return written
