"""Runs implementations of ops beside their references, in processes of their own.

A kernel that reads where it must not takes its whole process down with it, and one that hangs never
comes back: either is a result like any other.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import IO, TypeAlias

import torch

from services.engine.core.kernels.registry import OPS
from services.engine.core.processors import available_processors

# What begins like this may be otherwise at the next start.
UNCHECKED = "could not be checked: "
# Importing torch and waking the card, and one implementation with all that it has compiled first.
START_LIMIT_S = 300.0
LIMIT_S = 180.0
_MOST_WORKERS = 8

# An implementation, by its op and its name.
Name: TypeAlias = tuple[str, str]


def run_checks(
    names: Sequence[Name],
    device: str,
    device_type: str,
    *,
    modules: Sequence[str] = (),
    start_limit_s: float = START_LIMIT_S,
    limit_s: float = LIMIT_S,
) -> dict[Name, str]:
    """The problem of each implementation, "" for those without, found in processes of their own.

    modules: further ones to be imported there, which register implementations. Several processes
    share the work where there are processors for them: most of it is compiling.
    """
    workers = max(1, min(_MOST_WORKERS, available_processors() // 2, len(names)))
    check = partial(
        _check_some,
        device=device,
        device_type=device_type,
        modules=modules,
        limits=(start_limit_s, limit_s),
    )
    with ThreadPoolExecutor(workers) as pool:
        found = pool.map(check, [names[first::workers] for first in range(workers)])
        return {name: problem for problems in found for name, problem in problems.items()}


def _check_some(
    names: Sequence[Name],
    *,
    device: str,
    device_type: str,
    modules: Sequence[str],
    limits: tuple[float, float],
) -> dict[Name, str]:
    """Check implementations one after another, in a new process after each that takes its own with
    it."""
    problems: dict[Name, str] = {}
    waiting = list(names)
    while waiting:
        before = len(problems)
        with _Child(device, device_type, modules, waiting) as child:
            problems.update(child.results(*limits))
        waiting = [name for name in names if name not in problems]
        if len(problems) == before:
            # It never got as far as a kernel, and would not the next time.
            problems |= dict.fromkeys(waiting, f"{UNCHECKED}{child.last_words}")
            break
    return problems


class _Child:
    """A process that checks implementations one after another, and may not survive it."""

    def __init__(
        self, device: str, device_type: str, modules: Sequence[str], names: Sequence[Name]
    ) -> None:
        self.last_words = ""
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._errors: list[str] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, device, device_type, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        readers = (
            (self._process.stdout, self._lines.put, lambda: self._lines.put(None)),
            (self._process.stderr, self._errors.append, lambda: None),
        )
        self._readers = [
            threading.Thread(target=_pump, args=reader, daemon=True) for reader in readers
        ]
        for thread in self._readers:
            thread.start()
        try:
            self._process.stdin.write(json.dumps(list(names)))
            self._process.stdin.close()
        except BrokenPipeError:
            pass  # it has died already, and its last words say of what

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        for thread in self._readers:
            thread.join()

    def results(self, start_limit_s: float, limit_s: float) -> Iterator[tuple[Name, str]]:
        """What it finds, up to where it dies or hangs, which is a result too."""
        running: Name | None = None
        while True:
            limit = start_limit_s if running is None else limit_s
            try:
                line = self._lines.get(timeout=limit)
            except queue.Empty:
                self.last_words = f"it does not end within {limit:g} s"
                break
            if line is None:
                self.last_words = self._how_it_ended()
                break
            op, name, problem = json.loads(line)
            if problem is None:
                running = op, name
            else:
                running = None
                yield (op, name), problem
        if running is not None:
            yield running, self.last_words

    def _how_it_ended(self) -> str:
        status = self._process.wait()
        self._readers[1].join()
        if status < 0:
            return f"it dies of {signal.Signals(-status).name}"
        last = next((line for line in reversed(self._errors) if line.strip()), "")
        return f"it ends its process with {status}: {last.strip()}"


def _pump(stream: IO[str], put: Callable[[str], object], end: Callable[[], object]) -> None:
    for line in stream:
        put(line)
    end()


def check_one(name: Name, device: torch.device, device_type: str) -> str:
    """What is wrong with an implementation, "" for nothing. It may take this process with it."""
    from services.engine.core.kernels.examples import EXAMPLES, SMALL, Maker, difference

    op = OPS[name[0]]
    run = next(each.run for each in op.implementations[device_type] if each.name == name[1])
    if op.name not in EXAMPLES:
        return ""
    makes = EXAMPLES[op.name]
    pairs = zip(makes(Maker(device, SMALL)), makes(Maker(device, SMALL)), strict=True)
    for example, again in pairs:
        expected = example.outcome(op.reference)
        poison(device)
        found = again.outcome(run)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        problem = difference(found, expected)
        if problem is not None:
            return f"{example.what}: {problem}"
    return ""


def poison(device: torch.device) -> None:
    """Leave NaNs where results are to be written: what is not written then shows."""
    held = [
        torch.full((size,), float("nan"), device=device)
        for size in (1 << 7, 1 << 12, 1 << 17, 1 << 22)
        for _ in range(4)
    ]
    del held


def _check_all(device_name: str, device_type: str, modules: Sequence[str]) -> None:
    from services.engine.core.kernels import cuda, installed, triton

    # Whatever the kernels print must not be taken for a result.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    device = torch.device(device_name)
    importlib.import_module("services.engine.core.kernels.examples")
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels are launched on the current one
    if device_type == "cuda":
        installed.activate()
        triton.activate()
        cuda.activate(device)
    for module in modules:
        importlib.import_module(module)
    with torch.inference_mode():
        for op, name in json.load(sys.stdin):
            print(json.dumps([op, name, None]), file=results, flush=True)
            try:
                problem = check_one((op, name), device, device_type)
            except torch.OutOfMemoryError as error:
                problem = f"{UNCHECKED}{error}"
            except Exception as error:
                problem = f"it raises {type(error).__name__}: {str(error)[:500]}"
            print(json.dumps([op, name, problem]), file=results, flush=True)
            if problem and device.type == "cuda":
                return  # after some faults, nothing works any more in this process


if __name__ == "__main__":
    _check_all(sys.argv[1], sys.argv[2], sys.argv[3:])
