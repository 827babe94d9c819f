"""Whether every implementation computes what its reference does, at the shapes of real models."""

from __future__ import annotations

import time

import torch

from benchmarks.gpu_bench import Bench, Row, implementations
from services.engine.core.kernels.checking_apart import poison
from services.engine.core.kernels.device_check import check_device
from services.engine.core.kernels.examples import (
    EXAMPLES,
    LLAMA_8B,
    SMALL,
    TINY,
    Example,
    Maker,
    difference,
)
from services.engine.core.kernels.registry import OPS, REFERENCE


def check(bench: Bench) -> None:
    """Run the check that an engine runs at its first start on a card, and say what it refuses."""
    if bench.tiny:
        # What it would run here is interpreted, which the next part does.
        bench.add(Row(bench.part, "kernels used", "engine", 0.0, "of 0"))
        return
    started = time.monotonic()
    problems = check_device(bench.device).problems
    refused = [f"{name} of {op}: {problem}" for (op, name), problem in problems.items() if problem]
    bench.add(
        Row(
            bench.part,
            "kernels used",
            "engine",
            float(len(problems) - len(refused)),
            f"of {len(problems)}",
            note="; ".join(refused),
            values={"s": time.monotonic() - started},
        )
    )


def correctness(bench: Bench) -> None:
    """Hold each implementation to its reference, small shapes first, outputs poisoned."""
    names = {name: found for name in sorted(OPS) if (found := implementations(OPS[name]))}
    for name, found in names.items():
        for by in found:
            if by == REFERENCE:
                continue
            if name not in EXAMPLES:
                bench.add(Row(bench.part, name, by, None, "", note="there are no examples of it"))
                continue
            problems, count = [], 0
            for sizes in (TINY,) if bench.tiny else (SMALL, LLAMA_8B):
                makes = EXAMPLES[name]
                ours, theirs = makes(Maker(bench.device, sizes)), makes(Maker(bench.device, sizes))
                for example, again in zip(ours, theirs, strict=True):
                    if bench.left_s <= 0:
                        break
                    count += 1
                    problem = _problem(bench, name, by, example, again)
                    if problem:
                        problems.append(f"{example.what}: {problem}")
                    del example, again
            bench.add(
                Row(
                    bench.part,
                    name,
                    by,
                    float(count - len(problems)),
                    f"of {count} right",
                    note="; ".join(problems[:3]),
                    values={"wrong": float(len(problems))},
                )
            )


def _problem(bench: Bench, name: str, by: str, example: Example, again: Example) -> str | None:
    op = OPS[name]
    try:
        expected = example.outcome(op.reference)
        poison(bench.device)
        found = again.outcome(implementations(op)[by])
        if bench.device.type == "cuda":
            torch.cuda.synchronize()
        return difference(found, expected)
    except Exception as error:
        if isinstance(error, torch.AcceleratorError):
            note = f"{example.what}: {error}"
            bench.add(Row(bench.part, name, by, None, "", note=note))
            raise
        return f"{type(error).__name__}: {str(error)[:200]}"
