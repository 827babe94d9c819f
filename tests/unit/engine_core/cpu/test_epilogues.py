"""What becomes of a native matrix's sums: activation functions, gates and caps, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from services.engine.core.kernels.cpu.encoder_program import (
    ACTIVATION_FUNCTIONS,
    EncoderBuffer,
    EncoderInput,
    EncoderProgram,
    EncoderProgramBuilder,
)
from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.packing import pack_bf16
from services.engine.core.kernels.cpu.program import Epilogue
from services.engine.core.kernels.cpu.team import Team
from tests.fakes.amx_processor import libraries_with_amx
from tests.fakes.native_linear import Matrix, random_grouped, run, sums

KERNELS = libraries_with_amx()
pytestmark = pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine")

each_isa = pytest.mark.parametrize("kernels", KERNELS, ids=lambda each: each.isa)
each_format = pytest.mark.parametrize("weight_format", ["bf16", "q8", "q8 with minima", "q4"])
ROUNDING = 2.0**-24
CAP = 30.0
# Blocks that are not whole, rows that take tiles and rows that do not.
SIZES = [(1, 32), (2, 64), (6, 96), (7, 160), (19, 64), (40, 320)]


def gelu(values: Tensor) -> Tensor:
    return functional.gelu(values, approximate="tanh")


def spread(outputs: int, most: float) -> Tensor:
    """Biases from where a function is 0 or bends to where it is flat or straight."""
    return torch.linspace(-most, most, outputs)[torch.randperm(outputs)]


def tolerated(sum_bound: Tensor, found_of: Tensor, sums: Tensor) -> Tensor:
    """How far off a function of slope 1.2 at most may be, of sums that are off by as much."""
    rounding = 100 * ROUNDING * (sums.abs().clamp(max=30) + 1)
    return 1.2 * sum_bound + rounding * found_of.abs() + 1e-6 * ROUNDING


@each_isa
@each_format
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("epilogue", [Epilogue.GATED_SILU, Epilogue.GATED_GELU])
def test_gates_open_by_their_function(
    kernels: Library, weight_format: str, size: tuple[int, int], epilogue: Epilogue
) -> None:
    num_rows, outputs = size
    function = functional.silu if epilogue is Epilogue.GATED_SILU else gelu
    rows, matrix = random_grouped(num_rows, 64), Matrix.random(weight_format, outputs, 64, seed=1)
    bias = spread(outputs, 150)

    found = run(kernels, rows, matrix.pack(bias=bias, gated=True), epilogue=epilogue)

    each, bound = sums(kernels, weight_format, rows.dequantize(), matrix, bias.double())
    gates, values = each.split(outputs // 2, dim=1)
    gate_bound, value_bound = bound.split(outputs // 2, dim=1)
    opened = function(gates)
    worst = tolerated(gate_bound, opened, gates) * values.abs() + opened.abs() * value_bound
    worst += 4 * ROUNDING * (opened * values).abs() + 1e-30
    assert ((found - opened * values).abs() <= worst).all()


@each_isa
@each_format
@pytest.mark.parametrize("size", [*SIZES, (3, 7), (13, 97)])
@pytest.mark.parametrize(
    ("epilogue", "function", "most"),
    [
        (Epilogue.GELU, gelu, 20.0),
        (Epilogue.CAPPED, lambda values: torch.tanh(values / CAP) * CAP, 200.0),
    ],
    ids=["gelu", "capped"],
)
def test_functions_of_sums(
    kernels: Library,
    weight_format: str,
    size: tuple[int, int],
    epilogue: Epilogue,
    function: Callable[[Tensor], Tensor],
    most: float,
) -> None:
    num_rows, outputs = size
    rows, matrix = random_grouped(num_rows, 64), Matrix.random(weight_format, outputs, 64, seed=2)
    bias = spread(outputs, most)

    found = run(kernels, rows, matrix.pack(bias=bias), epilogue=epilogue, cap=CAP)

    each, bound = sums(kernels, weight_format, rows.dequantize(), matrix, bias.double())
    # Near 0, tanh is the difference of two numbers that are nearly 1.
    near_zero = 8 * ROUNDING * CAP if epilogue is Epilogue.CAPPED else 0.0
    expected = function(each)
    assert ((found - expected).abs() <= tolerated(bound, expected, each) + near_zero).all()
    if epilogue is Epilogue.CAPPED:
        assert (found.abs() <= CAP).all()


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "linear": lambda values: values,
    "gelu": functional.gelu,
    "gelu_new": gelu,
    "gelu_pytorch_tanh": gelu,
    "gelu_fast": gelu,
    "relu": functional.relu,
    "silu": functional.silu,
    "tanh": torch.tanh,
}
WIDTH = 64


def activated(kernels: Library, rows: Tensor, function: str, *, gated: bool) -> Tensor:
    """What an encoder makes of rows of bf16 values, [rows, WIDTH]; gated: [rows, WIDTH / 2]."""
    width = WIDTH // 2 if gated else WIDTH
    back = torch.zeros(WIDTH, width)
    back[:width] = torch.eye(width)
    builder = EncoderProgramBuilder(
        pack_bf16, lambda table, kind: table, hidden_size=WIDTH, heads=1
    )
    builder.embed(rows)
    builder.convert()
    builder.linear(torch.eye(WIDTH), EncoderBuffer.INNER)
    builder.activate(EncoderBuffer.INNER, function, gated=gated)
    builder.linear(back, EncoderBuffer.HIDDEN)
    count = len(rows)
    starts = torch.tensor([0, count], dtype=torch.int32)
    ids, zeros = torch.arange(count, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    hidden = torch.full((count, WIDTH), float("nan"))
    EncoderProgram(builder, Team(kernels, 2)).run(
        EncoderInput(
            num_tokens=count,
            num_sequences=1,
            starts=starts.data_ptr(),
            token_ids=ids.data_ptr(),
            positions=zeros.data_ptr(),
            types=zeros.data_ptr(),
            hidden=hidden.data_ptr(),
        )
    )
    return hidden[:, :width]


def test_every_activation_function_is_known() -> None:
    assert FUNCTIONS.keys() == ACTIVATION_FUNCTIONS.keys()


@each_isa
@pytest.mark.parametrize("gated", [False, True], ids=["", "gated"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_encoder_activates_rows(kernels: Library, function: str, gated: bool) -> None:
    wide = torch.linspace(-14, 14, 69 * WIDTH).view(69, WIDTH)[:, torch.randperm(WIDTH)]
    far = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 80.0, -80.0, 1e4, -1e4]).repeat(WIDTH // 8)
    rows = torch.cat((wide, far[None])).bfloat16().float()

    found = activated(kernels, rows, function, gated=gated).double()

    exact = rows.double()
    expected = FUNCTIONS[function](exact)
    if gated:
        gates, values = exact.chunk(2, dim=1)
        expected = FUNCTIONS[function](gates) * values
    # Some sets round what the next matrix is multiplied with to bf16.
    rounding = 2.0**-8 if kernels.isa in ("amx", "avx512bf16") else 2.0**-19
    size = rows[:, WIDTH // 2 :].abs() if gated else torch.ones(())
    worst = rounding * expected.abs() + 4e-6 * size.clamp(max=20) + 1e-6 * expected.abs()
    assert ((found - expected).abs() <= worst).all()


@each_isa
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_a_number_spoils_its_own_row(
    kernels: Library, function: str, poison: float
) -> None:
    rows = torch.linspace(-3, 3, 5 * WIDTH).view(5, WIDTH).bfloat16().float()
    clean = activated(kernels, rows, function, gated=False)
    rows[2, 7] = poison
    found = activated(kernels, rows, function, gated=False)
    others = torch.tensor([0, 1, 3, 4])
    assert torch.equal(found[others], clean[others])
    assert found[2].isnan().all()
