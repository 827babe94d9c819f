"""Every family computes with the values that a file holds, whatever the format of the file."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from services.engine.core.models.loader import open_model
from services.engine.core.weights.dequantize import DEQUANTIZERS
from tests.fakes.decoder_directories import QUANTISED, save_pickled, save_quantised, save_sharded
from tests.fakes.decoder_families import save_model, served
from tests.fakes.decoder_files import save_gguf
from tests.fakes.native_steps import Sequences, text
from tests.fakes.paged_step import libraries
from tests.support.proofs import DECODERS, HAS_NONE

KERNELS = libraries()
TOKENS = text(24)
# Rows of whole blocks of 256, which some types of GGUF have.
WIDE: dict[str, Any] = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "head_dim": 64,
    "num_hidden_layers": 2,
    "initializer_range": 0.05,
}
CHANGES: dict[str, dict[str, Any]] = {
    "phi3": {"head_dim": None},
    "mixtral": {"head_dim": None},
    "gpt2": {"head_dim": None, "n_inner": 256},
    "qwen3-moe": {"moe_intermediate_size": 256},
    "gemma2": {"query_pre_attn_scalar": 64},
    # The sixth layer is the first one without a window.
    "gemma3": {"query_pre_attn_scalar": 64, "num_hidden_layers": 6},
}
Write = Callable[[Path, str, Path], None]


def gguf_of(*kinds: str) -> Write:
    return partial(save_gguf, kinds=kinds)


# How a saved model is written, and what the file is called.
FORMS: dict[str, tuple[Write, str]] = {
    "sharded": (lambda source, case, path: save_sharded(source, path), "model"),
    "pickled": (lambda source, case, path: save_pickled(source, path), "model"),
    "GGUF Q8_0": (gguf_of("Q8_0"), "model.gguf"),
    "GGUF Q4_K": (gguf_of("Q4_K"), "model.gguf"),
    "GGUF, every type": (gguf_of(*DEQUANTIZERS), "model.gguf"),
}
for form in QUANTISED:
    FORMS[form] = (lambda source, _, path, form=form: save_quantised(source, form, path), "model")
CELLS = [(case, form) for case in DECODERS for form in FORMS if (case, form) not in HAS_NONE]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a family's model is, saved once."""
    directory = tmp_path_factory.mktemp("families")

    def save(case: str) -> Path:
        path = directory / case
        if not path.exists():
            save_model(case, path, **served(case, **WIDE | CHANGES.get(case, {})))
        return path

    return save


def error(found: Tensor, expected: Tensor) -> Tensor:
    """Of each row, beside what the values vary by."""
    return (found - expected).square().mean(-1).sqrt() / expected.std()


@pytest.mark.proves("{case}", "{form}")
@pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine")
@pytest.mark.parametrize(("case", "form"), CELLS)
def test_a_family_computes_with_what_a_file_holds(
    case: str, form: str, saved: Callable[[str], Path], tmp_path: Path, stepper: Any
) -> None:
    shutil.copytree(saved(case), tmp_path / "same values")
    write, name = FORMS[form]
    write(tmp_path / "same values", case, tmp_path / name)
    reference = AutoModelForCausalLM.from_pretrained(
        tmp_path / "same values", attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    opened = open_model(tmp_path / name, allow_pickled=True)

    on_torch = stepper(opened.load(torch.float32, "cpu"))
    torch.testing.assert_close(on_torch.step({"a": TOKENS})["a"], expected, atol=2e-3, rtol=1e-3)

    native = Sequences(KERNELS[0], opened)
    # A row that is sent to another expert for its rounding differs by more.
    assert error(native.step({0: TOKENS})[0], expected).median() < 0.06
