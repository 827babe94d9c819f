"""`auto` means bfloat16 only where the hardware multiplies it."""

from __future__ import annotations

import pytest
import torch

from services.engine.core.models import resolve_dtype


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": True}, torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": False}, torch.bfloat16),
        ({"avx2": True, "avx512_f": True}, torch.float32),
        ({}, torch.float32),
    ],
)
def test_auto_follows_the_instruction_set(
    capabilities: dict[str, bool], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert resolve_dtype("auto", "cpu") == expected
    assert resolve_dtype("auto", "cuda:0") == torch.bfloat16


def test_a_named_dtype_is_taken_at_its_word() -> None:
    assert resolve_dtype("float16", "cpu") == torch.float16
    with pytest.raises(ValueError, match="'int8' is not one of auto, float32"):
        resolve_dtype("int8", "cpu")
