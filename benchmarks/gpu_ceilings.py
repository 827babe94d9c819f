"""What the card can do: how fast memory is copied and read, and how fast matrices multiply."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.gpu_bench import Bench, Row


def ceilings(bench: Bench) -> None:
    """Measure the rates that all other figures are judged by."""
    length = 1 << 20 if bench.tiny else 1 << 30
    size = 128 if bench.tiny else 8192
    found: dict[str, float] = {}
    source = torch.ones(length, dtype=torch.uint8, device=bench.device)
    # Of a copy, bytes read and written both count.
    measured: tuple[tuple[str, str, float, str, Callable[[], Callable[[], Tensor]]], ...] = (
        ("copy", f"copy of {length >> 20} MiB", 2.0 * length, "GB/s", lambda: _copy(source)),
        ("read", f"sum of {length >> 20} MiB", 1.0 * length, "GB/s", lambda: _read(source)),
        *(
            (kind, f"{kind} product, {size} cubed", 2.0 * size**3, "TFLOP/s", make)
            for kind, make in (
                ("bf16", lambda: _bf16(size, bench.device)),
                ("fp8", lambda: _fp8(size, bench.device)),
                ("int8", lambda: _int8(size, bench.device)),
            )
        ),
    )
    for name, case, done, unit, make in measured:
        try:
            seconds = bench.seconds(make())
        except RuntimeError as error:
            # Eight-bit floats need Ada or Hopper.
            note = f"{type(error).__name__}: {error}"
            bench.add(Row(bench.part, case, "torch", None, unit, note=note))
            continue
        found[name] = done / seconds
        scale = 1e9 if unit == "GB/s" else 1e12
        bench.add(Row(bench.part, case, "torch", found[name] / scale, unit, seconds))
        bench.keep_ceilings(found)


def _copy(source: Tensor) -> Callable[[], Tensor]:
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _read(source: Tensor) -> Callable[[], Tensor]:
    words = source.view(torch.int32)
    return lambda: torch.sum(words, dtype=torch.int32)


def _bf16(size: int, device: torch.device) -> Callable[[], Tensor]:
    left, right = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    return lambda: left @ right


def _fp8(size: int, device: torch.device) -> Callable[[], Tensor]:
    one = torch.ones((), device=device)
    rows, columns = (
        torch.randn(size, size, device=device).to(torch.float8_e4m3fn) for _ in range(2)
    )
    return lambda: torch._scaled_mm(
        rows, columns.T, scale_a=one, scale_b=one, out_dtype=torch.bfloat16
    )


def _int8(size: int, device: torch.device) -> Callable[[], Tensor]:
    rows, columns = (
        torch.randint(-9, 9, (size, size), dtype=torch.int8, device=device) for _ in range(2)
    )
    return lambda: torch._int_mm(rows, columns.T)
