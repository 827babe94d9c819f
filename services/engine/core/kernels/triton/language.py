"""What kernels in Triton share.

Arithmetic is done in float32, whatever is loaded and stored; the interpreter knows no other of
bfloat16 either.
"""

from __future__ import annotations

from triton import jit, knobs
from triton import language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


@jit
def dot(a, b, accumulator):  # type: ignore[no-untyped-def]
    """accumulator + a * b: [m, k], [k, n] -> [m, n] float32, by the matrix units.

    float32 is multiplied as three products of TF32, which is nearly as exact as it is. The
    interpreter does not multiply bfloat16; products of two are exact in float32, so it computes the
    same.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="tf32x3")


@jit
def round_to_integers(values):  # type: ignore[no-untyped-def]
    """float32 within +-2^22 to the nearest integers, halves to even ones, as torch.round does.

    Where 1.5 * 2^23 has been added, the last bit of a float32 is 1.
    """
    return (values + 12582912.0) - 12582912.0


@jit
def silu(values):  # type: ignore[no-untyped-def]
    """values * sigmoid(values), float32."""
    return values * sigmoid(values)


@jit
def gelu(values):  # type: ignore[no-untyped-def]
    """GELU in the form that uses tanh, float32: (1 + tanh(z)) / 2 is sigmoid(2 * z)."""
    return values * sigmoid(1.5957691216057308 * (values + 0.044715 * values * values * values))


@jit
def sigmoid(values):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-values)), float32, at least exp(-80)."""
    return 1.0 / (1.0 + tl.exp(tl.minimum(-values, 80.0)))


@jit
def rounded(values, dtype: tl.constexpr):  # type: ignore[no-untyped-def]
    """float32 to the nearest of a narrower type, halves to even ones.

    That is what a cast does, but for the interpreter's, which cuts off what bfloat16 has no room
    for.
    """
    if INTERPRETED and dtype == tl.bfloat16:
        bits = values.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = values.to(dtype)
    return result


@jit
def float8_bits(values, converts_fp8: tl.constexpr):  # type: ignore[no-untyped-def]
    """The bits, uint8, of the nearest float8_e4m3fn; what is beyond its range becomes its end.

    converts_fp8: whether the card does so itself. Cards before Ada do not, nor know the type: a
    tensor of such floats comes to kernels as one of bytes.
    """
    values = tl.minimum(tl.maximum(values, -448.0), 448.0)
    if converts_fp8:
        result = values.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        size = tl.abs(values)
        bits = size.to(tl.uint32, bitcast=True)
        sign = (values.to(tl.uint32, bitcast=True) >> 24) & 0x80
        # Three bits of the mantissa stay, and the exponent is counted from -7 on.
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # Below 2^-6, steps of 2^-9; the last one is the first normal number.
        small = round_to_integers(size * 512.0).to(tl.uint32)
        result = (sign | tl.where(size < 0.015625, small, normal)).to(tl.uint8)
    return result


@jit
def keep_rounded(there, values, scale, inside, converts_fp8: tl.constexpr):  # type: ignore[no-untyped-def]
    """Store float32 rows in the eight bits that `there` has, each divided by its scale."""
    values = tl.div_rn(values, tl.where(scale > 0, scale, 1.0))
    if there.dtype.element_ty == tl.int8:
        kept = round_to_integers(values).to(tl.int8)
    else:
        kept = float8_bits(values, converts_fp8)
    tl.store(there, kept, inside)


@jit
def gated(gate, up, inside, is_silu: tl.constexpr):  # type: ignore[no-untyped-def]
    """activation(gate) * up of what lies there, in its precision.

    The activation is rounded as if it had been stored, which models were trained with.
    """
    dtype: tl.constexpr = gate.dtype.element_ty
    values = tl.load(gate, inside, other=0.0).to(tl.float32)
    values = rounded(silu(values) if is_silu else gelu(values), dtype).to(tl.float32)
    return rounded(values * tl.load(up, inside, other=0.0).to(tl.float32), dtype)


@jit
def wait_for_earlier(is_early: tl.constexpr):  # type: ignore[no-untyped-def]
    """What a kernel does first that `begins_early`: it lets the next one begin, and waits until the
    kernels before it have ended and what they wrote is there.

    In this order, the next one's blocks come as those of the last one leave, and read their weights
    while this one runs. They wait in their turn for this one to end, which ends after the last one.
    What one reads ahead of this has to be older than all kernels in a row that begin early: several
    of them may still run.
    """
    if is_early:
        gdc_launch_dependents()
        gdc_wait()
