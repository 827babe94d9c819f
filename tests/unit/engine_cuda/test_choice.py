"""What computes a product is what was faster where it was measured, and goes by rows elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from services.engine.core.kernels import choice
from services.engine.core.kernels.choice import streams, tune
from services.engine.core.kernels.linear import linear
from services.engine.core.kernels.matrices import ScaledMatrix
from tests.fakes.cuda.emulator import Emulator

HIDDEN, WEIGHT = torch.randn(64, 128).bfloat16(), torch.randn(32, 128).bfloat16()


@pytest.fixture(autouse=True)
def nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choice, "_ROTATED_BYTES", 4 * WEIGHT.nbytes)
    yield
    choice.forget()


def measured(seconds: list[float]) -> Callable[[Callable[[], Any]], float]:
    """A clock by which runs take these times in turn; each is run."""
    turns = iter(seconds)

    def measure(run: Callable[[], Any]) -> float:
        run()
        return next(turns)

    return measure


def is_streamed(rows: int) -> bool:
    return streams("linear", HIDDEN[:rows], WEIGHT)


def test_without_a_measurement_few_rows_are_streamed() -> None:
    assert [is_streamed(rows) for rows in (1, 32, 33, 64)] == [True, True, False, False]
    assert not streams("linear", torch.randn(65, 128).bfloat16(), WEIGHT)


def test_each_number_of_rows_goes_to_what_was_faster_for_it(emulated: Emulator) -> None:
    times = [1.0, 2.0, 2.0, 1.0] + [1.0, 2.0] * 4 + [1.0, 3.0]
    choices = tune([WEIGHT, WEIGHT], torch.bfloat16, measure=measured(times))
    assert [each.fastest == "cuda" for each in choices] == [True, False] + [True] * 5
    assert [is_streamed(rows) for rows in (1, 2, 3, 33, 64)] == [True, False, True, True, True]
    # Of another shape nothing is known.
    assert not streams("linear", HIDDEN, WEIGHT[:16])


def test_matrices_of_eight_bits_are_measured_with_activations_of_eight(emulated: Emulator) -> None:
    weight = ScaledMatrix.rounded(WEIGHT.float(), torch.int8)
    choices = tune([weight], torch.bfloat16, measure=measured([2.0, 1.0] * len(choice.ROWS)))
    assert {each.signature[:2] for each in choices} == {("scaled_linear", torch.int8)}
    assert not streams("scaled_linear", HIDDEN[:1].to(torch.int8), weight)


def test_it_ends_when_its_time_is_over_and_says_so(
    emulated: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    assert tune([WEIGHT], torch.bfloat16, limit_s=-1) == []
    assert "7 products were not measured" in caplog.text
    assert is_streamed(32)


def test_what_was_measured_is_logged(emulated: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tune([WEIGHT], torch.bfloat16, measure=measured([4e-6, 8e-6] * len(choice.ROWS)))
    assert "linear 32x128 of 16 bits, 1 rows: cuda (cuda 1.0 us, reference 2.0 us)" in caplog.text


def test_what_was_refused_is_not_run(emulated: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "excluded", frozenset({"cuda"}))
    assert tune([WEIGHT], torch.bfloat16, measure=measured([])) == []
