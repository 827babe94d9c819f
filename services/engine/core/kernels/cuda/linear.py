"""Matrix products of few rows in CUDA C++ (src/linear.h): steps that decode.

They serve up to 64 rows whose inputs are a multiple of 16 bytes of weights, of 128 where these are
in groups; which of them they compute, and which the next best does, is what `choice` says.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor

from services.engine.core.kernels import choice
from services.engine.core.kernels.cuda import library
from services.engine.core.kernels.cuda.library import FORMATS, beneath, call, is_aligned, why_not
from services.engine.core.kernels.gated_linear import gated_linear, gated_scaled_linear
from services.engine.core.kernels.linear import grouped_linear, linear, scaled_linear
from services.engine.core.kernels.matrices import (
    GROUP_SIZES,
    GroupedMatrix,
    Matrix,
    ScaledMatrix,
)
from services.engine.core.kernels.quantized_rows import quantize_rows

# `enum class Activation` of src/linear.h.
ACTIVATIONS = {"": 0, "silu": 1, "gelu_tanh": 2}
# Inputs of a warp's step where weights are in groups, whose scales it fetches at once.
_GROUPED_STEP = 128
_COUNTERS = 1024  # tiles that are split are fewer than multiprocessors, of at most 4 warps each


class LinearArgs(ctypes.Structure):
    """`struct LinearArgs`, field by field."""

    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("minima", ctypes.c_void_p),
        ("row_scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("partials", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("hidden_stride", ctypes.c_int64),
        ("weight_stride", ctypes.c_int64),
        ("rows", ctypes.c_int32),
        ("outputs", ctypes.c_int32),
        ("inputs", ctypes.c_int32),
        ("group_shift", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("multiprocessors", ctypes.c_int32),
        ("multiprocessor_bytes", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("element", ctypes.c_int32),
        ("output_format", ctypes.c_int32),
        ("bits", ctypes.c_int32),
    )


class LinearNeeds(ctypes.Structure):
    """`struct LinearNeeds`, field by field."""

    _fields_ = (
        ("block_bytes", ctypes.c_int32),
        ("block_outputs", ctypes.c_int32),
        ("steps", ctypes.c_int32),
        ("partials", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class Card:
    """What a device has: multiprocessors, and bytes of shared memory of each."""

    multiprocessors: int
    multiprocessor_bytes: int

    @property
    def block_bytes(self) -> int:
        """Bytes of shared memory that a block may have: all of it but what is kept for each."""
        return self.multiprocessor_bytes - 1024


@cache
def _card(device: torch.device) -> Card:
    if device.type != "cuda":  # the emulator's
        return Card(132, 228 << 10)
    properties = torch.cuda.get_device_properties(device)
    return Card(properties.multi_processor_count, properties.shared_memory_per_multiprocessor)


@linear.implementation("cuda", name="cuda", unavailable=why_not)
def linear_cuda(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden * weight^T + bias: see the op."""
    if not choice.streams("linear", hidden, weight) or not serves(hidden, weight):
        product: Tensor = beneath(linear)(hidden, weight, bias)
        return product
    return launch(hidden, weight, bias, hidden.dtype)


@grouped_linear.implementation("cuda", name="cuda", unavailable=why_not)
def grouped_linear_cuda(hidden: Tensor, weight: GroupedMatrix, bias: Tensor | None) -> Tensor:
    """hidden * weight^T + bias, with weights in groups: see the op."""
    if not choice.streams("grouped_linear", hidden, weight) or not serves(hidden, weight):
        product: Tensor = beneath(grouped_linear)(hidden, weight, bias)
        return product
    return launch(hidden, weight, bias, hidden.dtype)


@scaled_linear.implementation("cuda", name="cuda", unavailable=why_not)
def scaled_linear_cuda(
    elements: Tensor,
    scales: Tensor,
    weight: ScaledMatrix,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """hidden * weight^T + bias, both of eight bits: see the op."""
    if not _streams_scaled(elements, scales, weight, bias, dtype):
        product: Tensor = beneath(scaled_linear)(elements, scales, weight, bias, dtype)
        return product
    return launch(elements, weight, bias, dtype, row_scales=scales)


@gated_scaled_linear.implementation("cuda", name="cuda", unavailable=why_not)
def gated_scaled_linear_cuda(
    elements: Tensor,
    scales: Tensor,
    weight: ScaledMatrix,
    bias: Tensor | None,
    dtype: torch.dtype,
    activation: str,
) -> tuple[Tensor, Tensor]:
    """The gate is the end of the product. The scale of a row hangs on all of it, so that rounding
    is a launch of its own."""
    if not _streams_scaled(elements, scales, weight, bias, dtype):
        below = beneath(gated_scaled_linear)
        rounded: tuple[Tensor, Tensor] = below(elements, scales, weight, bias, dtype, activation)
        return rounded
    gated = launch(elements, weight, bias, dtype, row_scales=scales, activation=activation)
    return quantize_rows(gated, elements.dtype)


def _streams_scaled(
    elements: Tensor,
    scales: Tensor,
    weight: ScaledMatrix,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> bool:
    return (
        choice.streams("scaled_linear", elements, weight)
        and serves(elements, weight)
        and dtype in (torch.bfloat16, torch.float16)
        and scales.dtype == torch.float32
        and (bias is None or bias.dtype == dtype)
    )


@gated_linear.implementation("cuda", name="cuda", unavailable=why_not)
def gated_linear_cuda(
    hidden: Tensor, weight: Tensor | GroupedMatrix, bias: Tensor | None, activation: str
) -> Tensor:
    """activation(gate) * up of a projection's halves: see the op."""
    op = "linear" if isinstance(weight, Tensor) else "grouped_linear"
    if not choice.streams(op, hidden, weight) or not serves(hidden, weight):
        gated: Tensor = beneath(gated_linear)(hidden, weight, bias, activation)
        return gated
    return launch(hidden, weight, bias, hidden.dtype, activation=activation)


def serves(hidden: Tensor, weight: Matrix) -> bool:
    """Whether the kernel multiplies these: by their types, their sizes and where they lie."""
    if hidden.dim() != 2 or not 0 < hidden.shape[0] <= choice.MAX_ROWS:
        return False
    stored = _stored(weight)
    if stored.dim() != 2 or not is_aligned(hidden, stored):
        return False
    if isinstance(weight, GroupedMatrix):
        parts = (weight.scales,) if weight.minima is None else (weight.scales, weight.minima)
        served = (
            hidden.dtype in (torch.bfloat16, torch.float16)
            and weight.group_size in GROUP_SIZES
            and weight.shape[1] % _GROUPED_STEP == 0
            and all(part.dtype == torch.float16 and part.is_contiguous() for part in parts)
        )
    else:
        served = stored.dtype == hidden.dtype and hidden.dtype in FORMATS
        if hidden.dtype == torch.float8_e4m3fn and hidden.is_cuda:
            served = torch.cuda.get_device_capability(hidden.device) >= (8, 9)
    return served and _needs(hidden, weight, 1).block_bytes <= _card(hidden.device).block_bytes


def launch(
    hidden: Tensor,
    weight: Matrix,
    bias: Tensor | None,
    dtype: torch.dtype,
    *,
    row_scales: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "",
) -> Tensor:
    """Compute a product that `serves` allows.

    activation: of ACTIVATIONS; where there is one, the first half of the outputs, activated, is
    multiplied by the second. residual: contiguous, of the shape and type of what is returned, and
    added to it.
    """
    stored = _stored(weight)
    rows, (outputs, inputs) = hidden.shape[0], weight.shape
    columns = outputs // 2 if activation else outputs
    output = torch.empty((rows, columns), dtype=dtype, device=hidden.device)
    grouped = weight if isinstance(weight, GroupedMatrix) else None
    scales = None if isinstance(weight, Tensor) else weight.scales
    arrived = _counters(hidden.device)
    card = _card(hidden.device)
    splits, needs = _splits(hidden, weight, card) if arrived is not None else (1, None)
    partials = None
    if splits > 1:
        assert needs is not None
        partials = torch.empty(needs.partials, dtype=torch.float32, device=hidden.device)
    call(
        "linear",
        LinearArgs(
            hidden.data_ptr(),
            stored.data_ptr(),
            _address(scales),
            _address(None if grouped is None else grouped.minima),
            _address(row_scales),
            _address(bias),
            _address(residual),
            output.data_ptr(),
            _address(partials),
            _address(arrived),
            hidden.stride(0) * hidden.element_size(),
            stored.stride(0) * stored.element_size(),
            rows,
            outputs,
            inputs,
            0 if grouped is None else grouped.group_size.bit_length() - 1,
            splits,
            card.multiprocessors,
            card.multiprocessor_bytes,
            ACTIVATIONS[activation],
            FORMATS[hidden.dtype],
            FORMATS[dtype],
            0 if grouped is None else grouped.bits,
        ),
        hidden,
    )
    return output


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _stored(weight: Matrix) -> Tensor:
    if isinstance(weight, Tensor):
        return weight
    return weight.levels if isinstance(weight, GroupedMatrix) else weight.elements


def _needs(hidden: Tensor, weight: Matrix, splits: int) -> LinearNeeds:
    grouped = weight if isinstance(weight, GroupedMatrix) else None
    return _needs_of(
        FORMATS[hidden.dtype],
        0 if grouped is None else grouped.bits,
        0 if grouped is None else grouped.group_size.bit_length() - 1,
        hidden.shape[0],
        *weight.shape,
        splits,
    )


@lru_cache(maxsize=1 << 12)
def _needs_of(
    element: int, bits: int, group_shift: int, rows: int, outputs: int, inputs: int, splits: int
) -> LinearNeeds:
    needs = LinearNeeds()
    arguments = LinearArgs(
        element=element,
        bits=bits,
        group_shift=group_shift,
        rows=rows,
        outputs=outputs,
        inputs=inputs,
        splits=splits,
    )
    active = library.active()
    assert active is not None
    active.call("linear_needs", arguments, ctypes.addressof(needs))
    return needs


def _splits(hidden: Tensor, weight: Matrix, card: Card) -> tuple[int, LinearNeeds]:
    """Over how many blocks a tile's inputs are split: there is to be one a multiprocessor, as far
    as each has two steps."""
    whole = _needs(hidden, weight, 1)
    tiles = -(-weight.shape[0] // whole.block_outputs)
    splits = max(min(card.multiprocessors // tiles, whole.steps // 2), 1)
    return splits, whole if splits == 1 else _needs(hidden, weight, splits)


_arrived: dict[torch.device, Tensor] = {}


def _counters(device: torch.device) -> Tensor | None:
    """Zeros that a kernel leaves as zeros, of all products of a device: these run one after
    another. None while a graph is captured before there have been any."""
    found = _arrived.get(device)
    if found is None and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        found = _arrived[device] = torch.zeros(_COUNTERS, dtype=torch.int32, device=device)
    return found
