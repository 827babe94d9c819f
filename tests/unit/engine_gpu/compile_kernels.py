"""Compiles what the modules of kernels/triton list as COMPILED, for Ampere and Hopper, with no GPU.

    python tests/unit/engine_gpu/compile_kernels.py [MODULE ...]

prints a line of JSON for each form and card: the registers of a thread, the bytes that it spills,
shared memory, and the compiler's message where it refuses. Kernels must not be interpreted here, so
tests run this in a process of its own. What has been compiled before is read from Triton's cache.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
CARDS = (80, 90)
# Of `cuobjdump --dump-resource-usage`: what a thread has on its stack is what did not fit into
# registers, for kernels in Triton have no arrays there.
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)")

# By module, its forms: read by the processes that are forked below.
FORMS: dict[str, tuple[Any, ...]] = {}


def collect(names: list[str]) -> None:
    """Import the modules of kernels/triton (those named, or all) and note their forms.

    A name that is none of theirs is that of any other module.
    """
    package = importlib.import_module("services.engine.core.kernels.triton")
    importlib.import_module("services.engine.core.kernels")
    own = [found.name for found in pkgutil.iter_modules(package.__path__)]
    for name in names or own:
        module = importlib.import_module(f"{package.__name__}.{name}" if name in own else name)
        FORMS[name] = tuple(getattr(module, "COMPILED", ()))


def compile_form(module: str, index: int, card: int) -> dict[str, Any]:
    """What the compiler makes of one form for one card."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    form = FORMS[module][index]
    kernel = form.kernel
    if hasattr(kernel, "configs"):  # of an Autotuner, which wraps it
        kernel = kernel.fn
    report = {
        "module": module,
        "kernel": kernel.__name__,
        "constants": {name: str(value) for name, value in form.constants.items()},
        "signature": dict(form.signature),
        "card": card,
        "may_spill": form.spills,
        "error": "",
    }
    described = form.signature.keys() | form.constants.keys()
    unknown = described - set(kernel.arg_names)
    missing = set(kernel.arg_names) - described
    if unknown or missing:
        return report | {"error": f"names nothing: {unknown}; says nothing of: {missing}"}
    signature, attributes = {}, {}
    for position, name in enumerate(kernel.arg_names):
        if name in form.constants:
            signature[name] = "constexpr"
            continue
        kind, _, multiple = form.signature[name].partition(":")
        signature[name] = kind
        if kind.startswith("*") or multiple == "16":
            attributes[(position,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel, signature=signature, constexprs=dict(form.constants), attrs=attributes
    )
    started_s = time.monotonic()
    try:
        compiled = triton.compile(
            source,
            target=GPUTarget("cuda", card, 32),
            options={"num_warps": form.num_warps, "num_stages": form.num_stages},
        )
    except Exception as error:  # of the compiler, which has many kinds
        return report | {"error": f"{type(error).__name__}: {error}"}
    registers, stack, _ = _usage(compiled.asm["cubin"])
    return report | {
        "registers": registers,
        "spilled_bytes": stack,
        "shared_bytes": compiled.metadata.shared,
        "threads": 32 * form.num_warps,
        "seconds": time.monotonic() - started_s,
    }


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers and bytes of stack of a thread, and static shared memory, of machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        printed = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    matched = _USAGE.search(printed)
    assert matched, printed
    registers, stack, shared = map(int, matched.groups())
    return registers, stack, shared


def main(names: list[str]) -> None:
    assert not os.environ.get("TRITON_INTERPRET"), "kernels must not be interpreted here"
    sys.path.insert(0, str(ROOT))
    collect(names)
    work = [
        (module, index, card)
        for module, forms in FORMS.items()
        for index, form in enumerate(forms)
        for card in CARDS
        if card >= form.capability
    ]
    workers = len(os.sched_getaffinity(0))
    forked = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(workers, mp_context=forked) as pool:
        for report in pool.map(compile_form, *zip(*work, strict=True)) if work else ():
            print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
