"""Every decoder family runs on the native kernels, agrees with transformers, and with itself bit
for bit."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.core.kernels.cpu.kv_cache import KvFormat
from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.packing import quantize_4, quantize_8
from services.engine.core.models.precision import WeightChoice
from tests.fakes.decoder_families import (
    CASES,
    ORIGINAL_CONTEXT_TOKENS,
    SERVED,
    WINDOW,
    save_model,
    served,
)
from tests.fakes.decoder_files import save_gguf
from tests.fakes.native_steps import MIXED_STEPS, Sequences, in_company, text
from tests.fakes.paged_step import libraries

KERNELS = libraries()
pytestmark = pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine")

each_isa = pytest.mark.parametrize("kernels", KERNELS, ids=lambda each: each.isa)

# One of each: those bits are to be held to.
FAMILIES = [
    "mistral, windowed",
    "qwen2",
    "qwen3",
    "phi3, half rotated",
    "gemma2, capped hard",
    "gemma3",
    "gpt2",
    "mixtral",
    "qwen3-moe, as it comes",
]
KEPT_PRECISE = ("mlp.gate.weight", "block_sparse_moe.gate.weight", "wpe.weight")


class Saved:
    """Models of cases, each saved once, and what transformers makes of them."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._models: dict[str, Any] = {}

    def __call__(self, case: str) -> tuple[Path, Any]:
        """Where a model is, and the model."""
        path = self._directory / case
        if case not in self._models:
            self._models[case] = save_model(case, path, **served(case))
        return path, self._models[case]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("families"))


def log_probabilities(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].log_softmax(-1)


def round_weights(reference: torch.nn.Module, weights: WeightChoice) -> None:
    """Round a model's matrices as the kernels' weights are rounded; heads stay at eight bits, and
    what sends rows to experts, as positions, stays as it is."""
    for name, weight in reference.named_parameters():
        if weight.dim() < 2 or name.endswith(KEPT_PRECISE):
            continue
        is_head = "embed" in name or "lm_head" in name or "wte" in name
        quantize = quantize_8 if is_head or weights == "int8" else quantize_4
        is_transposed = ".c_" in name
        for each in weight if weight.dim() == 3 else [weight]:
            rounded = quantize(each.T if is_transposed else each).dequantize()
            each.copy_(rounded.T if is_transposed else rounded)


def check_close(found: torch.Tensor, expected: torch.Tensor, case: str) -> None:
    """Activations, keys and values are rounded by about 1/256 at every layer. Of mixtures, a row
    now and then goes to another expert for it, where two come out even: in transformers too."""
    by_row = (found - expected).square().mean(-1).sqrt() / expected.std()
    if "moe" in case or "mixtral" in case:
        assert by_row.median() < 0.04
        assert (by_row < 0.1).float().mean() > 0.9
    else:
        assert by_row.square().mean().sqrt() < 0.04


@pytest.mark.proves("{case}", "native kernels", "int8 KV cache")
@each_isa
@pytest.mark.parametrize("case", CASES)
def test_a_family_comes_close_to_transformers(kernels: Library, case: str, saved: Saved) -> None:
    path, reference = saved(case)
    tokens = text(4 * WINDOW + 5)
    expected = log_probabilities(reference, tokens)
    for kv_format in KvFormat:
        sequences = Sequences(kernels, path, "auto", kv_format)
        check_close(sequences.step({0: tokens})[0].log_softmax(-1), expected, case)


@each_isa
def test_within_its_original_context_a_model_with_longrope_has_its_short_factors(
    kernels: Library, saved: Saved
) -> None:
    path, reference = saved("phi3, longrope")
    tokens = text(ORIGINAL_CONTEXT_TOKENS)
    expected = log_probabilities(reference, tokens)
    within = Sequences(kernels, path, max_context_tokens=len(tokens))
    check_close(within.step({0: tokens})[0].log_softmax(-1), expected, "phi3")
    beyond = Sequences(kernels, path).step({0: tokens})[0].log_softmax(-1)
    assert (beyond - expected).abs().max() > 1


@pytest.mark.proves("{case}", "{weights} weights")
@each_isa
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("case", ["llama", *FAMILIES])
def test_quantised_a_family_comes_close_to_transformers_on_the_same_weights(
    kernels: Library, weights: WeightChoice, case: str, saved: Saved
) -> None:
    path, model = saved(case)
    tokens = text(4 * WINDOW + 5)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        round_weights(reference, weights)
    found = Sequences(kernels, path, weights).step({0: tokens})[0].log_softmax(-1)
    check_close(found, log_probabilities(reference, tokens), case)


@each_isa
@pytest.mark.parametrize(
    ("weights", "kv_format"), [("bfloat16", KvFormat.BF16), ("int4", KvFormat.INT8)]
)
@pytest.mark.parametrize("case", FAMILIES)
def test_chunks_and_company_change_no_bit(
    kernels: Library, weights: WeightChoice, kv_format: KvFormat, case: str, saved: Saved
) -> None:
    path, _ = saved(case)
    tokens = text(45)
    expected = Sequences(kernels, path, weights, kv_format).step({0: tokens})[0]
    decoded = Sequences(kernels, path, weights, kv_format, threads=2, seed=1)
    parts = [decoded.step({0: [token]})[0] for token in tokens]
    assert torch.equal(torch.cat(parts), expected)
    together = Sequences(kernels, path, weights, kv_format, seed=2)
    assert torch.equal(in_company(together, tokens, 11, before=5), expected)


@each_isa
@pytest.mark.parametrize("case", FAMILIES)
def test_threads_that_compute_their_own_rows_and_rows_left_out_change_no_bit(
    kernels: Library, case: str, saved: Saved
) -> None:
    path, _ = saved(case)
    shared = Sequences(kernels, path, threads=1)
    divided = Sequences(kernels, path, threads=3, seed=1)
    some = Sequences(kernels, path, threads=2, seed=2)
    for index, lengths in enumerate(MIXED_STEPS):
        step = {name: text(length, 100 * index + name) for name, length in lengths}
        expected = torch.cat(list(shared.step(step).values()))
        assert torch.equal(torch.cat(list(divided.step(step).values())), expected)
        wanted = torch.arange(index % 3, len(expected), 5)
        batch = dataclasses.replace(some.append(step), logits_rows=wanted)
        assert torch.equal(some.model(batch, some.cache), expected[wanted])


@each_isa
@pytest.mark.parametrize("case", ["mixtral", "qwen3-moe"])
def test_experts_come_from_gguf_as_from_safetensors(
    kernels: Library, case: str, saved: Saved
) -> None:
    path, _ = saved(case)
    if not (path / "model.gguf").exists():
        save_gguf(path, case, path / "model.gguf")
    tokens = text(30)
    found = Sequences(kernels, path / "model.gguf").step({0: tokens})[0]
    assert torch.equal(found, Sequences(kernels, path).step({0: tokens})[0])


@each_isa
def test_many_experts_of_whom_few_are_asked(kernels: Library, tmp_path: Path) -> None:
    """128 experts and 8 for each token, as Qwen3-MoE has them."""
    reference = save_model(
        "qwen3-moe",
        tmp_path,
        **SERVED,
        moe_intermediate_size=32,
        num_experts=128,
        num_experts_per_tok=8,
    )
    tokens = text(40)
    with torch.no_grad():
        expected = reference(torch.tensor([tokens])).logits[0]
    for threads in (1, 3):
        sequences = Sequences(kernels, tmp_path, threads=threads)
        found = torch.cat(
            [sequences.step({0: part})[0] for part in (tokens[:1], tokens[1:30], tokens[30:])]
        )
        check_close(found, expected, "qwen3-moe")
