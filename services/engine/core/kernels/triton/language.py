"""What kernels in Triton share.

Arithmetic is done in float32, whatever is loaded and stored; the interpreter knows no other of
bfloat16 either.
"""

from __future__ import annotations

from triton import jit, knobs
from triton import language as tl

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@jit
def dot(a, b, accumulator):  # type: ignore[no-untyped-def]
    """accumulator + a * b: [m, k], [k, n] -> [m, n] float32, by the matrix units.

    The interpreter does not multiply bfloat16; products of two are exact in float32, so it computes
    the same.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator)
