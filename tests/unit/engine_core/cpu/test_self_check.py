"""The checks that an instruction set passes before it is used."""

from __future__ import annotations

import pytest

from services.engine.core.kernels import paged_attention
from services.engine.core.kernels.cpu import encoder_check, library, self_check
from services.engine.core.kernels.cpu.library import Library
from tests.fakes.amx_processor import libraries_with_amx

KERNELS = libraries_with_amx()

pytestmark = [
    pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine"),
    pytest.mark.parametrize("kernels", KERNELS, ids=lambda each: each.isa),
]


def test_the_kernels_pass_their_own_checks(kernels: Library) -> None:
    assert library.self_check(kernels) == []


def test_an_encoder_whose_sequences_mix_is_noticed(
    kernels: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = encoder_check._reference

    def as_one_sequence(*arguments):
        with monkeypatch.context() as patched:
            patched.setattr(encoder_check, "_LENGTHS", (145,))
            return right(*arguments)

    monkeypatch.setattr(encoder_check, "_reference", as_one_sequence)
    assert not encoder_check.encodes_correctly(kernels)


def test_weights_that_are_not_the_packed_ones_are_noticed(
    kernels: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = self_check.rounded
    monkeypatch.setattr(self_check, "rounded", lambda weight, how: right(weight, how).flip(0))
    assert not self_check.multiplies_correctly(kernels)


def test_attention_that_sees_the_future_is_noticed(
    kernels: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = paged_attention.reference

    def last_query_for_all(queries, *others):
        return right(queries, *others)[-1:].expand_as(queries)

    monkeypatch.setattr(paged_attention, "reference", last_query_for_all)
    assert not self_check.attends_correctly(kernels)
