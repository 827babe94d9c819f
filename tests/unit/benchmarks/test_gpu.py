"""The measurements of a GPU run from end to end where there is none, in shapes that a CPU computes:
what they say is only worth something on a card."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu_bench import Bench
from benchmarks.gpu_report import GOALS, write_report
from benchmarks.gpu_synthetic import LLAMA_31_8B
from benchmarks.gpu_workloads import engine, request
from benchmarks.gpu_workloads import run as run_sequences

ROOT = Path(__file__).parents[3]


def run(into: Path, *arguments: str, **environment: str) -> tuple[int, dict[str, Any]]:
    """The exit status and the report of a run in tiny shapes on the CPU."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny"]
    found = subprocess.run(
        [*command, "--into", into, *arguments],
        cwd=ROOT,
        env=os.environ | {"MESHSERVE_CACHE": str(into / "cache")} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (into / "report.json").exists(), found.stderr
    return found.returncode, json.loads((into / "report.json").read_text())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_runs_and_says_what_it_measured(tmp_path: Path) -> None:
    status, report = run(tmp_path, TRITON_INTERPRET="1")
    assert {part["name"]: part["status"] for part in report["parts"]} == dict.fromkeys(
        gpu.PARTS, "done"
    ), [part["text"] for part in report["parts"]]
    assert status == 0
    measured = {row["part"] for row in report["rows"] if row["value"] is not None}
    # Sums over ranks want two cards.
    assert measured == set(gpu.PARTS) - {"sums"}
    (sums,) = [row for row in report["rows"] if row["part"] == "sums"]
    assert sums["note"] == "there are 0 GPUs, and it takes two"
    wrong = [
        row for row in report["rows"] if row["part"] == "correctness" and row["values"].get("wrong")
    ]
    assert not wrong
    # What is to be reached is looked for among what is measured, though never in these shapes.
    assert [goal["goal"] for goal in report["goals"]] == [goal.text for goal in GOALS]
    assert {goal["state"] for goal in report["goals"]} == {"open"}
    table = (tmp_path / "report.md").read_text()
    assert "MeshServe / transformers" in table
    assert "more than one card" in table
    assert (tmp_path / "attention.svg").exists()


BROKEN = """
import os, signal
from benchmarks.gpu_bench import Row

def fails(bench):
    bench.add(Row(bench.part, "before it fails", "me", 1.0, "GB/s"))
    raise ValueError("a planted fault")

def crashes(bench):
    os.kill(os.getpid(), signal.SIGKILL)

def sound(bench):
    bench.add(Row(bench.part, "after the others", "me", 2.0, "GB/s", seconds=2.0, floor_s=1.0))
"""


def test_parts_that_fail_or_crash_are_written_down_and_the_next_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A package of this name that comes first, with parts of its own.
    package = tmp_path / "planted" / "benchmarks"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"__path__.append({str(ROOT / 'benchmarks')!r})\n")
    (package / "planted.py").write_text(BROKEN)
    source = (ROOT / "benchmarks" / "gpu.py").read_text()
    start, end = source.index("PARTS = {"), source.index("}\n", source.index("PARTS = {"))
    parts = "".join(
        f'"{name}": Part("planted.{name}", 9, "planted"),' for name in ("fails", "crashes", "sound")
    )
    (package / "gpu.py").write_text(source[:start] + "PARTS = {" + parts + source[end:])
    into = tmp_path / "into"
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--tiny", "--into", into],
        cwd=package.parent,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(package.parent), str(ROOT)))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 1, found.stderr
    report = json.loads((into / "report.json").read_text())
    states = {part["name"]: (part["status"], part["text"]) for part in report["parts"]}
    assert states["fails"][0] == "failed"
    assert "a planted fault" in states["fails"][1]
    assert states["crashes"][0] == "crashes"
    assert "signal 9" in states["crashes"][1]
    assert states["sound"] == ("done", "")
    assert [row["case"] for row in report["rows"]] == ["before it fails", "after the others"]
    assert report["rows"][1]["share"] == 0.5
    assert {"planted: failed", "planted: crashes"} <= set(report["open"])


def test_goals_are_judged_by_the_best_figure_of_their_rows(tmp_path: Path) -> None:
    def row(part: str, case: str, by: str, value: float | None, **more: Any) -> str:
        blank: dict[str, Any] = {"unit": "x", "note": "", "values": {}, "share": None}
        return json.dumps(
            blank | {"part": part, "case": case, "by": by, "value": value, "seconds": 1.0} | more
        )

    decode, eight = "Llama 3.1 8B bf16, batch 1, context 512", "batch 64, context 8192, bf16 KV"
    rows = [
        row("decode", decode, "MeshServe", 150.0, share=0.91),
        row("decode", decode.replace("batch 1", "batch 8"), "MeshServe", 900.0, share=0.99),
        row("attention", eight, "triton", 1.0, share=0.7),
        row("attention", eight, "cuda", 1.0, share=0.75),
        row("attention", eight, "torch SDPA, contiguous", 1.0, share=0.95),
        row("quantised", "int4 / bf16, batch 1", "MeshServe", None, note="no such kernel"),
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows))
    report = write_report(tmp_path, {"decode": "decodes", "workload": "a workload"})
    judged = {goal["goal"]: (goal["state"], goal["measured"]) for goal in report["goals"]}
    assert judged[GOALS[0].text] == ("reached", 0.91)
    assert judged[GOALS[2].text] == ("missed", 0.75)
    assert [state for state, _ in judged.values()].count("open") == 4
    assert "a workload: not run" in report["open"]
    assert "quantised, int4 / bf16, batch 1, MeshServe: no such kernel" in report["open"]


def test_nothing_of_a_mesh_is_needed() -> None:
    """A bare GPU machine has none of what services are made of."""
    parts = sorted({part.function.split(".")[0] for part in gpu.PARTS.values()})
    script = "import sys\n"
    for name in ("grpc", "google.protobuf", "opentelemetry", "redis", "yaml", "fastapi", "rich"):
        script += f"sys.modules[{name!r}] = None\n"
    script += "".join(f"import benchmarks.{part}\n" for part in [*parts, "gpu", "gpu_report"])
    script += "from services.engine.core.kernels import cuda, triton\ntriton.activate()\n"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr


def test_an_engine_is_gone_before_the_next_one_needs_its_memory(tmp_path: Path) -> None:
    bench = Bench("any", torch.device("cpu"), tmp_path, tiny=True, end=time.monotonic() + 60)
    with engine(bench, LLAMA_31_8B, max_running_sequences=2) as loaded:
        timeline = run_sequences(bench, loaded.core, [request(0, [5, 6, 7], 4)])
        core = weakref.ref(loaded.core._runner)
    assert timeline.num_tokens == 4
    # Whoever still has what it was measured by does not keep it.
    assert loaded.vocab_size == 300
    assert core() is None
