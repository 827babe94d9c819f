"""Measures the engine's kernels and the engine itself on a GPU: `python -m benchmarks.gpu`.

For a machine that has a card, PyTorch and Triton, and nothing of a mesh: weights are made up on the
device. Parts run one after another in a process of their own; one that fails, crashes or hangs is
written down with what it said, and the next goes on in a fresh one. Each figure is on disk as soon
as it is there (rows.jsonl); report.json, report.md and plots are made of them at the end, or of
what there is by `--report-only`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Part:
    """What is measured together. `function` is its module and name: nothing is imported before it
    is run, so that one that does not import fails alone."""

    function: str
    budget_s: float
    what: str


# In the order in which they are run: what others are judged by and what shows faults comes first.
PARTS = {
    "ceilings": Part("gpu_ceilings.ceilings", 20, "what the card can do"),
    "check": Part("gpu_correctness.check", 150, "which kernels an engine would use here"),
    "correctness": Part("gpu_correctness.correctness", 60, "kernels against their references"),
    "decode": Part("gpu_engine.decode", 60, "the 8B shape in bf16, batches that decode"),
    "attention": Part("gpu_attention.decode_attention", 50, "attention of decodes"),
    "workload": Part("gpu_engine.workload", 100, "the 0.6B shape, beside transformers"),
    "saturation": Part("gpu_engine.saturation", 50, "the 8B shape, as many as run"),
    "projections": Part("gpu_products.projections", 50, "matrix products by format"),
    "quantised": Part("gpu_engine.quantised", 70, "the 8B shape in 8 and 4 bits"),
    "prefill": Part("gpu_engine.prefill", 25, "prompts of the 8B shape"),
    "prompts": Part("gpu_attention.prefill_attention", 25, "attention of prompts"),
    "first": Part("gpu_engine.first_tokens", 40, "a long prompt beside decodes"),
    "long": Part("gpu_engine.kv_formats", 40, "long contexts, KV cache by format"),
    "adapters": Part("gpu_adapters.adapters", 60, "the 8B shape, decodes through adapters"),
    "drafts": Part("gpu_engine.speculation", 30, "speculation on text with and without repetition"),
    "elementwise": Part("gpu_products.elementwise", 20, "norms, activations, rope"),
    "sums": Part("gpu_sums.sums", 40, "sums over ranks, beside NCCL"),
    "sampling": Part("gpu_products.sampling", 10, "choosing tokens"),
}
# A part may take this much longer than its budget, to end the case that it is at.
_GRACE_S = 90.0
# Until its process is up, which may have to compile kernels in CUDA C++ first.
_START_S = 300.0
_POLL_S = 0.1


def main(arguments: Sequence[str] | None = None) -> int:
    """Run parts, write the report; 1 where a part failed."""
    options = _parse(arguments)
    into: Path = options.into
    into.mkdir(parents=True, exist_ok=True)
    if options.child:
        _run_parts(options)
        return 0
    if not options.report_only:
        for stale in ("rows.jsonl", "parts.jsonl", "ceilings.json"):
            (into / stale).unlink(missing_ok=True)
        _run_all(options)
    from benchmarks.gpu_report import write_report

    report = write_report(into, {name: part.what for name, part in PARTS.items()})
    return int(any(part["status"] != "done" for part in report["parts"]))


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Measure the engine on a GPU."
    )
    parser.add_argument("--into", type=Path, default=Path("build/gpu"), metavar="DIR")
    parser.add_argument(
        "--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; comma-separated"
    )
    parser.add_argument("--budget-s", type=float, default=595.0, help="for all parts together")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument(
        "--tiny", action="store_true", help="shapes that a CPU computes: whether all of it runs"
    )
    parser.add_argument("--report-only", action="store_true", help="of what was measured before")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    unknown = [name for name in options.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(PARTS)}")
    return options


def _run_all(options: argparse.Namespace) -> None:
    """Have all parts run, in as many processes as it takes."""
    into: Path = options.into
    end = time.monotonic() + options.budget_s
    waiting = list(options.parts)
    while waiting:
        left = end - time.monotonic()
        if left <= 0:
            for name in waiting:
                _note(into, name, "out of time", 0.0, "")
            return
        environment = dict(os.environ)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, ["", os.getcwd(), *sys.path]))
        command = [sys.executable, "-m", "benchmarks.gpu", "--child", "--into", str(into)]
        command += ["--parts", ",".join(waiting), "--device", options.device]
        command += ["--budget-s", str(left), *(["--tiny"] if options.tiny else [])]
        with (into / "log.txt").open("a") as log:
            child = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )
        waiting = waiting[_watch(child, into, waiting) :]


def _watch(child: subprocess.Popen[str], into: Path, names: Sequence[str]) -> int:
    """Wait for a process that runs parts; return how many of them are through, however."""
    import threading

    assert child.stdout is not None
    output = child.stdout

    def echo() -> None:
        for line in output:
            print(line, end="", flush=True)

    echoing = threading.Thread(target=echo, daemon=True)
    echoing.start()
    before = len(_notes(into))
    started, seen = time.monotonic(), before
    try:
        while child.poll() is None:
            time.sleep(_POLL_S)
            done = len(_notes(into))
            if done > seen:
                started, seen = time.monotonic(), done
            index = seen - before
            if index < len(names):
                limit = PARTS[names[index]].budget_s + _GRACE_S
                limit += _START_S if index == 0 else 0.0
                if time.monotonic() - started > limit:
                    child.kill()
                    child.wait()
                    _note(into, names[index], "hangs", limit, "it was killed")
                    return index + 1
    finally:
        child.kill()
        child.wait()
        echoing.join(timeout=5)
    done = len(_notes(into)) - before
    if done < len(names) and child.returncode != _GOES_ON:
        # It ended without a word about the part that it was at.
        status = child.returncode
        said = f"the process ended with {status}" if status >= 0 else f"signal {-status}"
        _note(into, names[done], "crashes", time.monotonic() - started, f"{said}; see log.txt")
        done += 1
    return done


# The status of a process that leaves further parts to another, because a card is broken for it.
_GOES_ON = 75


def _run_parts(options: argparse.Namespace) -> None:
    """Run parts in this process, up to one after which it may not be used any more."""
    import importlib
    import logging

    import torch

    from benchmarks.gpu_bench import Bench

    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    device = torch.device(options.device)
    _activate(device, options.into, tiny=options.tiny)
    end = time.monotonic() + options.budget_s
    for name in options.parts:
        part = PARTS[name]
        started = time.monotonic()
        if started >= end:
            _note(options.into, name, "out of time", 0.0, "")
            continue
        print(f"--- {name}: {part.what}", flush=True)
        bench = Bench(
            name,
            device,
            options.into,
            tiny=options.tiny,
            end=min(end, started + part.budget_s),
        )
        module, function = part.function.split(".")
        try:
            run: Callable[[Bench], None] = getattr(
                importlib.import_module(f"benchmarks.{module}"), function
            )
            run(bench)
        except Exception:
            text = traceback.format_exc()
            print(text, flush=True)
            _note(options.into, name, "failed", time.monotonic() - started, text)
            if device.type == "cuda":
                # Memory may still be held, or the card be of no more use to this process.
                sys.stdout.flush()
                os._exit(_GOES_ON)
            continue
        _note(options.into, name, "done", time.monotonic() - started, "")


def _activate(device: Any, into: Path, *, tiny: bool) -> None:
    """Register what there is for a GPU, and write down what the figures are of."""
    import platform

    import torch

    from services.engine.core.kernels import cuda, triton

    triton.activate()
    machine = {
        "device": str(device),
        "shapes": "tiny: these figures say nothing" if tiny else "of the models",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "triton": triton.why_not() or "there",
        "time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
    }
    if device.type == "cuda":
        torch.cuda.set_device(device)
        cuda.activate(device)
        properties = torch.cuda.get_device_properties(device)
        driver = Path("/proc/driver/nvidia/version")
        machine |= {
            "card": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_bytes": str(properties.total_memory),
            "driver": driver.read_text().splitlines()[0] if driver.exists() else "",
            "cuda": str(torch.version.cuda),
        }
    machine["CUDA C++"] = cuda.why_not() or "there"
    (into / "machine.json").write_text(json.dumps(machine, indent=1))


def _note(into: Path, name: str, status: str, seconds: float, text: str) -> None:
    """Write down what came of a part."""
    noted = {"name": name, "status": status, "seconds": round(seconds, 1), "text": text}
    with (into / "parts.jsonl").open("a") as file:
        file.write(json.dumps(noted) + "\n")


def _notes(into: Path) -> list[str]:
    path = into / "parts.jsonl"
    return path.read_text().splitlines() if path.exists() else []


if __name__ == "__main__":
    raise SystemExit(main())
