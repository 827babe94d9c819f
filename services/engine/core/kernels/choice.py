"""Which implementation computes a product, where several can: what was measured, or a rule.

How a kernel that streams weights compares with one that multiplies tiles depends on the card, the
shape and the number of rows. `tune` measures it once, when a model has been loaded, within a time
that is set; what was not measured goes by how many rows there are.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from services.engine.core.kernels.matrices import GroupedMatrix, Matrix, ScaledMatrix
from services.engine.core.kernels.quantized_rows import quantize_rows
from services.engine.core.kernels.registry import OPS, REFERENCE

logger = logging.getLogger(__name__)

# The name of implementations that stream weights.
STREAMING = "cuda"
ROWS = (1, 2, 4, 8, 16, 32, 64)
MAX_ROWS = ROWS[-1]
# Without a measurement: rows up to which weights are streamed.
_STREAMED = {"linear": 32, "grouped_linear": 16, "scaled_linear": 32}
# What is rotated through, so that a product finds no weights of its own in the L2 cache (50 MB on
# an H100), and the times it is done.
_ROTATED_BYTES = 256 << 20
_REPEATS = 5

Signature: TypeAlias = tuple[str, torch.dtype, int, int, int]
"""An op, what its activations are, and of its weight: outputs, inputs and bits of an element."""

Measure: TypeAlias = Callable[[Callable[[], Any]], float]
"""The seconds that a function takes on a device, the median of some."""

_measured: dict[tuple[Signature, int], str] = {}


@dataclass(frozen=True, slots=True)
class Choice:
    """The implementation that was fastest for a product, and the seconds of all."""

    signature: Signature
    rows: int
    seconds: dict[str, float]

    @property
    def fastest(self) -> str:
        """Its name."""
        return min(self.seconds, key=self.seconds.__getitem__)

    def __str__(self) -> str:
        op, _, outputs, inputs, bits = self.signature
        times = ", ".join(f"{name} {1e6 * each:.1f} us" for name, each in self.seconds.items())
        return f"{op} {outputs}x{inputs} of {bits} bits, {self.rows} rows: {self.fastest} ({times})"


def streams(op: str, hidden: Tensor, weight: Matrix) -> bool:
    """Whether the implementation that streams weights is to compute a product."""
    rows = hidden.shape[0]
    if rows > MAX_ROWS:
        return False
    chosen = _measured.get((signature(op, hidden.dtype, weight), bucket(rows)))
    return rows <= _STREAMED[op] if chosen is None else chosen == STREAMING


def signature(op: str, dtype: torch.dtype, weight: Matrix) -> Signature:
    """What products share that take the same time with the same number of rows."""
    outputs, inputs = weight.shape[-2:]
    bits = weight.bits if isinstance(weight, GroupedMatrix) else 8 * _stored(weight).element_size()
    return op, dtype, outputs, inputs, bits


def bucket(rows: int) -> int:
    """The number of rows that stands for this one."""
    return next(each for each in ROWS if rows <= each)


def go_by(choices: Iterable[Choice]) -> None:
    """Go by these measurements alone."""
    forget()
    _measured.update({(each.signature, each.rows): each.fastest for each in choices})


def forget() -> None:
    """Go by the rule again."""
    _measured.clear()


def tune(
    matrices: Iterable[Matrix],
    dtype: torch.dtype,
    *,
    limit_s: float = 20.0,
    measure: Measure | None = None,
) -> list[Choice]:
    """Measure the products of a model's matrices, on the device they are on, and go by that.

    For each number of rows of ROWS, from the fewest on, the implementation that streams weights is
    measured against the next best, over all matrices of the same shape in turn. What the time does
    not suffice for goes by the rule. Not while a graph is captured. Returns what was chosen, and
    logs it.

    dtype: of activations.
    """
    started_s = time.monotonic()
    clock = measure or _on_a_device
    alike: dict[Signature, list[Matrix]] = {}
    for matrix in matrices:
        op, elements = _product_of(matrix, dtype)
        if _implementations(op) is not None:
            alike.setdefault(signature(op, elements, matrix), []).append(matrix)
    choices, left = [], 0
    for rows in ROWS:
        for each, group in alike.items():
            if time.monotonic() - started_s > limit_s:
                left += 1
                continue
            choices.append(_compare(each, rows, _rotated(group), dtype, clock))
            logger.info("measured %s", choices[-1])
    took_s = time.monotonic() - started_s
    if left:
        logger.warning("%d products were not measured in %.1f s", left, took_s)
    elif choices:
        logger.info("measured %d products in %.1f s", len(choices), took_s)
    return choices


def _compare(
    each: Signature, rows: int, matrices: Sequence[Matrix], dtype: torch.dtype, measure: Measure
) -> Choice:
    device = _stored(matrices[0]).device
    hidden = torch.randn(rows, each[3], device=device).to(dtype)
    found, seconds = _implementations(each[0]), {}
    assert found is not None
    for name, run in found.items():
        _measured[each, rows] = name  # or else one would hand on to the other
        product = _product(run, hidden, each[1])
        seconds[name] = measure(partial(_for_all, product, matrices)) / len(matrices)
    choice = Choice(each, rows, seconds)
    _measured[each, rows] = choice.fastest
    return choice


def _implementations(op: str) -> dict[str, Callable[..., Any]] | None:
    """That which streams weights on a GPU, and the next best; None where there is no such one."""
    known = OPS[op].implementations.get("cuda", [])
    allowed = [each for each in known if each.name not in OPS[op].excluded]
    usable = {each.name: each.run for each in allowed if each.unavailable() is None}
    if (streaming := usable.pop(STREAMING, None)) is None:
        return None
    following = list(usable.items())[-1:] or [(REFERENCE, OPS[op].reference)]
    return {STREAMING: streaming, **dict(following)}


def _product(
    run: Callable[..., Any], hidden: Tensor, elements: torch.dtype
) -> Callable[[Matrix], Any]:
    """The product of activations with a matrix, by an implementation of its op."""
    if elements == hidden.dtype:
        return lambda matrix: run(hidden, matrix, None)
    rounded, scales = quantize_rows(hidden, elements)
    return lambda matrix: run(rounded, scales, matrix, None, hidden.dtype)


def _for_all(product: Callable[[Matrix], Any], matrices: Sequence[Matrix]) -> None:
    for matrix in matrices:
        product(matrix)


def _product_of(matrix: Matrix, dtype: torch.dtype) -> tuple[str, torch.dtype]:
    """The op of a matrix, and what it takes activations in."""
    if isinstance(matrix, ScaledMatrix):
        return "scaled_linear", matrix.elements.dtype
    return ("linear" if isinstance(matrix, Tensor) else "grouped_linear"), dtype


def _rotated(matrices: Sequence[Matrix]) -> Sequence[Matrix]:
    """As many of them as no cache holds, or all of them more than once."""
    times = -(-_ROTATED_BYTES // _stored(matrices[0]).nbytes)
    return (list(matrices) * -(-times // len(matrices)))[:times]


def _stored(matrix: Matrix) -> Tensor:
    if isinstance(matrix, Tensor):
        return matrix
    return matrix.levels if isinstance(matrix, GroupedMatrix) else matrix.elements


def _on_a_device(run: Callable[[], Any]) -> float:
    """Replays of a graph: what launching costs the host is not part of it."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times_s: list[float] = []
    for _ in range(_REPEATS + 1):
        start, end = (
            torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            for _ in range(2)
        )
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times_s.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times_s[1:])
