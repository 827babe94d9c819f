"""Models on the native kernels agree with transformers, and with themselves bit for bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels.cpu.kv_cache import KvFormat
from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.packing import quantize_4, quantize_8
from services.engine.core.kernels.cpu.sampling import sample_with
from services.engine.core.kv_cache import KVCache
from services.engine.core.models.loader import open_model
from services.engine.core.models.precision import WeightChoice
from services.engine.core.sampler import SamplingBatch
from services.tokenizer.model_tokenizer import load_model_tokenizer
from tests.fakes.native_steps import MIXED_STEPS, Sequences, in_company, text
from tests.fakes.paged_step import libraries

KERNELS = libraries()
pytestmark = pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine")

each_isa = pytest.mark.parametrize("kernels", KERNELS, ids=lambda each: each.isa)

SERVED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    # Small enough for differences to stay small from layer to layer.
    "initializer_range": 0.1,
}
SHAPES: dict[str, dict[str, Any]] = {
    "grouped query": {},
    "one head each": {"num_key_value_heads": 4},
    "tied, biased": {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "wide heads, llama3 rope": {
        "head_dim": 48,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
}


def round_weights(reference: torch.nn.Module, weights: WeightChoice) -> None:
    """Round a model's matrices as the kernels' weights are rounded; heads stay at eight bits."""
    if weights not in ("int8", "int4"):
        return
    for name, weight in reference.named_parameters():
        if weight.dim() == 2:
            is_head = "embed" in name or "lm_head" in name
            quantize = quantize_8 if is_head or weights == "int8" else quantize_4
            weight.copy_(quantize(weight).dequantize())


@each_isa
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("weights", ["auto", "bfloat16", "int8", "int4"])
def test_small_checkpoints_come_close_to_transformers(
    kernels: Library, changes: dict[str, Any], weights: WeightChoice, make_checkpoint: Any
) -> None:
    path, reference = make_checkpoint(**SERVED | changes)
    tokens = text(60)
    with torch.no_grad():
        round_weights(reference, weights)
        expected = reference(torch.tensor([tokens])).logits[0]
    scale = expected.std()
    for kv_format in KvFormat:
        found = Sequences(kernels, path, weights, kv_format).step({0: tokens})[0]
        error = (found - expected).square().mean().sqrt() / scale
        # Activations, keys and values are rounded by about 1/256 at every layer.
        assert error < 0.04


@each_isa
@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("kv_format", list(KvFormat), ids=lambda each: each.name)
def test_chunks_and_company_change_no_bit(
    kernels: Library, weights: WeightChoice, kv_format: KvFormat, make_checkpoint: Any
) -> None:
    path, _ = make_checkpoint(**SERVED, tie_word_embeddings=True)
    tokens = text(60)
    expected = Sequences(kernels, path, weights, kv_format).step({0: tokens})[0]
    decoded = Sequences(kernels, path, weights, kv_format, threads=2, seed=1)
    parts = [decoded.step({0: [token]})[0] for token in tokens]
    assert torch.equal(torch.cat(parts), expected)
    together = Sequences(kernels, path, weights, kv_format, seed=2)
    assert torch.equal(in_company(together, tokens, 31, before=9), expected)


@each_isa
@pytest.mark.parametrize("weights", ["bfloat16", "int4"])
@pytest.mark.parametrize("threads", [2, 3])
def test_threads_that_compute_their_own_rows_change_no_bit(
    kernels: Library, weights: WeightChoice, threads: int, make_checkpoint: Any
) -> None:
    path, _ = make_checkpoint(**SERVED, max_position_embeddings=128)
    shared = Sequences(kernels, path, weights, threads=1)
    divided = Sequences(kernels, path, weights, threads=threads, seed=1)
    for index, lengths in enumerate(MIXED_STEPS):
        step = {name: text(length, 100 * index + name) for name, length in lengths}
        expected, found = shared.step(step), divided.step(step)
        assert all(torch.equal(found[name], expected[name]) for name in step)


@each_isa
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_whose_logits_nobody_wants_change_no_bit_of_the_others(
    kernels: Library, threads: int, make_checkpoint: Any
) -> None:
    path, _ = make_checkpoint(**SERVED, max_position_embeddings=128)
    everything = Sequences(kernels, path, threads=1)
    some = Sequences(kernels, path, threads=threads, seed=1)
    for index, lengths in enumerate(MIXED_STEPS):
        step = {name: text(length, 100 * index + name) for name, length in lengths}
        expected = torch.cat(list(everything.step(step).values()))
        wanted = torch.arange(index % 3, len(expected), 5)
        batch = dataclasses.replace(some.append(step), logits_rows=wanted)
        assert torch.equal(some.model(batch, some.cache), expected[wanted])


@each_isa
@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_chooses_its_tokens_as_the_sampler_does(
    kernels: Library, threads: int, make_checkpoint: Any
) -> None:
    path, _ = make_checkpoint(**SERVED)
    apart = Sequences(kernels, path)
    together = Sequences(kernels, path, threads=threads, seed=1)
    for index, rows in enumerate((1, 2, 30, 7)):
        step = {name: text(1, 100 * index + name) for name in range(rows)}
        generator = np.random.default_rng(index)
        drawn = SamplingBatch(
            temperature=generator.choice([0.0, 0.7, 1.5], rows).astype(np.float32),
            top_k=generator.choice([0, 5], rows),
            top_p=generator.choice([1.0, 0.8], rows).astype(np.float32),
            min_p=generator.choice([0.0, 0.1], rows).astype(np.float32),
            uniforms=generator.random(rows),
            logprobs=generator.choice([-1, 0, 3], rows),
        )
        logits = torch.cat(list(apart.step(step).values()))
        batch = together.append(step)
        for sampling in (drawn, SamplingBatch.greedy(rows)):
            expected = sample_with(kernels, logits.clone(), sampling)
            # Computing a step twice writes the same values to the same slots.
            assert together.model.sample(batch, together.cache, sampling) == expected


@each_isa
def test_a_row_without_logits_to_choose_from_fails_alone(
    kernels: Library, make_checkpoint: Any
) -> None:
    path, _ = make_checkpoint(**SERVED)
    sequences = Sequences(kernels, path, threads=2)
    sequences.step({0: text(20), 1: text(20, 1)})
    poisoned = sequences.append({0: [5], 1: [6], 2: [7]})
    broken = poisoned.block_tables.clone()
    broken[1] = broken[1].max() + 1  # stale: NaN
    batch = dataclasses.replace(poisoned, block_tables=broken)
    tokens = sequences.model.sample(batch, sequences.cache, SamplingBatch.greedy(3))
    assert [error is not None for error in tokens.errors] == [False, True, False]


def test_the_demo_model_loses_less_than_a_percent_of_perplexity(demo_model_path: Path) -> None:
    licence = Path("LICENSE").read_text(encoding="utf-8")
    ids = list(load_model_tokenizer(demo_model_path).encode(licence).token_ids[:384])
    opened = open_model(demo_model_path)
    reference = opened.load(torch.float32, "cpu")
    cache = KVCache(
        opened.config.num_layers, 24, 16, opened.config.kv_heads, 64, torch.float32, "cpu"
    )
    count = torch.arange(len(ids))
    batch = ForwardBatch(
        torch.tensor(ids),
        count,
        count,
        torch.arange(24, dtype=torch.int32).view(1, -1),
        (len(ids),),
        (len(ids),),
        count,
    )
    exact = cross_entropy(reference(batch, cache)[:-1], torch.tensor(ids[1:]))
    choices: tuple[WeightChoice, ...] = ("auto", "bfloat16", "int8")
    for weights in choices:
        logits = Sequences(KERNELS[0], demo_model_path, weights, threads=2).step({0: ids})[0]
        loss = cross_entropy(logits[:-1], torch.tensor(ids[1:]))
        assert (loss - exact).exp() < 1.01
