"""The emulator computes what the PTX manual says, and finds the mistakes that kernels make."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.core.kernels.cuda.build import SOURCES, Recipe, build
from services.engine.core.kernels.cuda.library import CudaError, Library
from tests.fakes.cuda import emulator
from tests.fakes.cuda.emulator import Emulator, guarded

PROBE = Path(emulator.__file__).with_name("probe.cu")
FORMATS = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8]


class ProbeArgs(ctypes.Structure):
    """`struct ProbeArgs` of probe.cu."""

    _fields_ = (
        ("a", ctypes.c_void_p),
        ("b", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("choice", ctypes.c_int32),
    )


class Card:
    """The probe on a GPU: what the emulator is to be like."""

    def __init__(self, directory: Path) -> None:
        recipe = Recipe(PROBE.parent, extra_flags=(f"-I{SOURCES}",))
        self.library = Library(build(directory, recipe))


@pytest.fixture
def probe() -> Emulator:
    return emulator.of(PROBE)


@pytest.fixture(scope="session", params=["emulator", pytest.param("card", marks=pytest.mark.gpu)])
def either(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The emulator, and, where there is a GPU, what it stands in for."""
    is_card = request.param == "card"
    return Card(tmp_path_factory.mktemp("probe")) if is_card else emulator.of(PROBE)


def run(probe: Any, name: str, a: Tensor, b: Tensor, out: Tensor, choice: int = 0) -> Tensor:
    if isinstance(probe, Card):
        if a.dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
            pytest.skip("this card has no products of eight-bit floats")
        a, b, out = a.cuda(), b.cuda(), out.cuda()
    arguments = ProbeArgs(a.data_ptr(), b.data_ptr(), out.data_ptr(), choice)
    stream = torch.cuda.current_stream().cuda_stream if isinstance(probe, Card) else 0
    probe.library.call(name, arguments, stream)
    return out.cpu()


def matrix(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return guarded(torch.randint(-128, 128, (rows, columns), dtype=torch.int8))
    return guarded(torch.randn(rows, columns).to(dtype))


@pytest.mark.parametrize("dtype", FORMATS)
def test_products_of_matrices_are_those_of_torch(either: Any, dtype: torch.dtype) -> None:
    depth = 32 // dtype.itemsize
    sums = torch.int32 if dtype == torch.int8 else torch.float32
    for _ in range(3):
        a, b = matrix(16, depth, dtype), matrix(depth, 8, dtype)
        found = run(either, "multiply", a, b, torch.empty(16, 8, dtype=sums), FORMATS.index(dtype))
        torch.testing.assert_close(found, (a.double() @ b.double()).to(sums), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", FORMATS)
def test_every_element_of_a_fragment_has_its_place(either: Any, dtype: torch.dtype) -> None:
    # One at a time is not zero, so that no two that are mistaken for each other cancel out.
    depth = 32 // dtype.itemsize
    sums = torch.int32 if dtype == torch.int8 else torch.float32
    weights = torch.arange(1, 9).float()
    for row in range(16):
        for k in range(depth):
            a, b = torch.zeros(16, depth), torch.zeros(depth, 8)
            a[row, k], b[k] = 3, weights
            out = torch.empty(16, 8, dtype=sums)
            run(either, "multiply", a.to(dtype), b.to(dtype), out, FORMATS.index(dtype))
            assert torch.equal(out.float(), a @ b), (row, k)


@pytest.mark.parametrize("by_columns", [False, True])
def test_matrices_are_loaded_as_products_want_them(either: Any, by_columns: bool) -> None:
    a, b = matrix(16, 16, torch.bfloat16), matrix(16, 8, torch.bfloat16)
    stored = guarded(b.T.contiguous()) if by_columns else b
    found = run(either, "load_matrices", a, stored, torch.empty(16, 8), int(by_columns))
    torch.testing.assert_close(found, a.float() @ b.float(), atol=1e-5, rtol=1e-5)


def test_rows_in_the_same_banks_are_counted(probe: Emulator) -> None:
    a = matrix(16, 16, torch.bfloat16)
    before = probe.bank_conflicts
    run(probe, "load_matrices", a, a, torch.empty(16, 8), choice=0)
    # Of rows of 32 bytes those that are 4 apart lie in the same banks, of 16 bytes none of eight.
    assert probe.bank_conflicts - before == 4 * 4


def test_a_matrix_is_transposed_in_registers(either: Any) -> None:
    numbers = guarded(torch.arange(64, dtype=torch.int16).view(8, 8))
    assert torch.equal(run(either, "transpose", numbers, numbers, numbers.clone()), numbers.T)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lanes_exchange_values(probe: Emulator, seed: int) -> None:
    nothing, found = torch.empty(0), torch.empty(64, 6, dtype=torch.int32)
    with probe.schedule(seed):
        run(probe, "exchange", nothing, nothing, found)
    ballot = sum(1 << lane for lane in range(0, 32, 3))
    ballot -= (ballot >> 31) << 32
    for thread, row in enumerate(found.tolist()):
        lane = thread % 32
        expected = [lane // 8 * 8 + 5, lane ^ 3, lane + 4 if lane < 28 else lane]
        expected += [lane - 1 if lane % 16 else lane, ballot, sum(range(32))]
        assert row == expected


def reverse(probe: Emulator, choice: int, seed: int = 0) -> bool:
    numbers = guarded(torch.randn(64))
    with probe.schedule(seed):
        out = run(probe, "mistake", numbers, numbers, torch.full((64,), torch.nan), choice)
    return torch.equal(out, numbers.flip(0))


@pytest.mark.parametrize("seed", range(5))
def test_a_kernel_without_a_mistake_is_right_in_every_order(probe: Emulator, seed: int) -> None:
    assert reverse(probe, 0, seed)
    assert reverse(probe, 3, seed)


@pytest.mark.parametrize("choice", [1, 2], ids=["barrier", "wait for a copy"])
def test_what_was_not_waited_for_is_not_there(probe: Emulator, choice: int) -> None:
    assert not any(reverse(probe, choice, seed) for seed in range(3))


def test_memory_that_is_used_again_too_early_is_wrong_in_some_order(probe: Emulator) -> None:
    assert not all(reverse(probe, 9, seed) for seed in range(8))


@pytest.mark.parametrize(
    ("choice", "error", "why"),
    [
        (4, "cudaErrorIllegalAddress", "outside of every allocation"),
        (5, "cudaErrorIllegalAddress", "outside of every allocation"),
        (6, "cudaErrorLaunchTimeout", "wait for others that do not come"),
        (7, "cudaErrorMisalignedAddress", "no multiple"),
        (8, "cudaErrorLaunchFailure", "at different instructions"),
    ],
)
def test_what_a_card_would_stop_at_is_an_error(
    probe: Emulator, choice: int, error: str, why: str
) -> None:
    with probe.fails(error, why):
        reverse(probe, choice)
    assert reverse(probe, 0)


def test_more_shared_memory_than_a_card_has_is_refused(probe: Emulator) -> None:
    with probe.fails("cudaErrorInvalidValue", ""):
        run(probe, "greedy", *(torch.empty(64) for _ in range(3)))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_last_block_sees_what_the_others_wrote(probe: Emulator, seed: int) -> None:
    out = torch.zeros(3, dtype=torch.int32)
    with probe.schedule(seed):
        run(probe, "last_block", out, out, out)
    assert out.tolist() == [21, 0, 21]


def test_what_a_card_writes_for_another_arrives_word_by_word(probe: Emulator) -> None:
    found = set()
    for seed in range(100):
        memory, copy, again = (torch.zeros(4, dtype=torch.int32) for _ in range(3))
        with probe.device(0):
            run(probe, "hand_over", memory, memory, memory, choice=0)
            # A kernel sees what the one before on its own card wrote, all of it.
            run(probe, "hand_over", memory, memory, again, choice=1)
        with probe.device(1):
            run(probe, "hand_over", memory, memory, copy, choice=1)
        with probe.schedule(seed):
            probe.run_devices()
        assert again.tolist() == [1, 2, 3, 4]
        found.add(tuple(copy.tolist()))
    assert len(found) > 2


def test_cards_that_wait_for_each_other_run_at_the_same_time(probe: Emulator) -> None:
    there, back = (torch.zeros(2, 4, dtype=torch.int32) for _ in range(2))
    for number, (own, other) in enumerate([(there, back), (back, there)]):
        with probe.device(number):
            run(probe, "hand_over", own, own, own[0], choice=0)
            run(probe, "hand_over", other, other, own[1], choice=1)
    probe.run_devices()
    assert there.tolist() == back.tolist() == [[1, 2, 3, 4]] * 2


def test_shared_memory_is_only_for_a_card_that_is_alone(probe: Emulator) -> None:
    with probe.device(0), pytest.raises(CudaError, match="cudaErrorInvalidConfiguration"):
        reverse(probe, 0)
    assert reverse(probe, 0)


def test_a_mistake_on_one_of_several_cards_ends_all_of_them(probe: Emulator) -> None:
    there, nowhere = torch.zeros(4, dtype=torch.int32), torch.zeros(0)
    with probe.device(0):
        run(probe, "hand_over", nowhere, nowhere, nowhere, choice=0)
    with probe.device(1):
        run(probe, "hand_over", there, there, there, choice=1)
    with probe.fails("cudaErrorIllegalAddress", "outside of every allocation"):
        probe.run_devices()
    probe.run_devices()
