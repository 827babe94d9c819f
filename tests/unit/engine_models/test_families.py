"""Every decoder family computes what `transformers` computes, token for token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.core.models import load_model
from tests.fakes.decoder_families import (
    CASES,
    ORIGINAL_CONTEXT_TOKENS,
    VOCAB_SIZE,
    WINDOW,
    save_model,
)
from tests.fakes.decoder_files import IN_GGUF, save_gguf

PROMPT = torch.randint(3, VOCAB_SIZE, (3 * WINDOW,), generator=torch.Generator().manual_seed(5))
COMPLETION_TOKENS = 24


def greedy(model: Any, prompt: list[int], num_tokens: int) -> list[int]:
    generated = model.generate(
        torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
    )
    return generated[0, len(prompt) :].tolist()


@pytest.mark.proves("{case}", "safetensors", "plain torch")
@pytest.mark.parametrize("case", CASES)
def test_a_family_equals_transformers(case: str, tmp_path: Path, stepper: Any) -> None:
    reference = save_model(case, tmp_path)
    model, _ = load_model(tmp_path, dtype=torch.float32, device="cpu")
    logits = stepper(model).step({"only": PROMPT.tolist()})["only"]
    with torch.no_grad():
        expected = reference(PROMPT[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=5e-4, rtol=2e-4)
    # LongRoPE has other factors for texts within the original context, by how long they are now;
    # here they follow from how long they may become.
    first = ORIGINAL_CONTEXT_TOKENS + 1 if "longrope" in case else WINDOW - 2
    prompt = PROMPT[:first].tolist()
    assert stepper(model).greedy(prompt, COMPLETION_TOKENS) == greedy(
        reference, prompt, COMPLETION_TOKENS
    )


@pytest.mark.proves("{case}", "GGUF F32")
@pytest.mark.parametrize("case", IN_GGUF)
def test_a_family_is_the_same_from_gguf(case: str, tmp_path: Path, stepper: Any) -> None:
    reference = save_model(case, tmp_path)
    save_gguf(tmp_path, case, tmp_path / "model.gguf")
    model, _ = load_model(tmp_path / "model.gguf", dtype=torch.float32, device="cpu")
    logits = stepper(model).step({"only": PROMPT.tolist()})["only"]
    with torch.no_grad():
        expected = reference(PROMPT[None]).logits[0]
    torch.testing.assert_close(logits, expected, atol=5e-4, rtol=2e-4)


@pytest.mark.parametrize("case", [case for case in CASES if "," not in case])
def test_in_bfloat16_a_family_errs_no_more_than_transformers(
    case: str, tmp_path: Path, stepper: Any
) -> None:
    reference = save_model(case, tmp_path)
    with torch.no_grad():
        exact = reference(PROMPT[None]).logits[0].log_softmax(-1)
        theirs = reference.bfloat16()(PROMPT[None]).logits[0].float().log_softmax(-1)
    model, _ = load_model(tmp_path, dtype=torch.bfloat16, device="cpu")
    ours = stepper(model).step({"only": PROMPT.tolist()})["only"].log_softmax(-1)
    assert (ours - exact).abs().mean() <= 1.2 * (theirs - exact).abs().mean()


@pytest.mark.proves("{case}", "windows")
@pytest.mark.parametrize(
    "case", [case for case, (_, fields) in CASES.items() if fields.get("sliding_window")]
)
def test_a_window_is_the_same_however_tokens_are_spread_over_steps(
    case: str, tmp_path: Path, stepper: Any
) -> None:
    save_model(case, tmp_path)
    model, _ = load_model(tmp_path, dtype=torch.float32, device="cpu")
    tokens = PROMPT.tolist()
    at_once = stepper(model).step({"only": tokens})["only"]
    by_hand = stepper(model)
    # Beside another sequence, in chunks within, at and beyond the window, then one by one.
    chunks = [
        tokens[:3],
        tokens[3 : WINDOW + 3],
        tokens[WINDOW + 3 : -2],
        *([t] for t in tokens[-2:]),
    ]
    spread = [by_hand.step({"other": [7, 8], "only": chunk})["only"] for chunk in chunks]
    torch.testing.assert_close(torch.cat(spread), at_once, atol=2e-4, rtol=1e-4)
