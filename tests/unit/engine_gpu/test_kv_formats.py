"""A model whose keys and values are kept in eight bits says nearly what it says with bfloat16."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.engine.core.batch import ForwardBatch
from services.engine.core.kernels import paged_attention
from services.engine.core.kv_cache import KVCache, kv_dtype
from services.engine.core.models.loader import load_model
from services.engine.core.settings import KVCacheFormat
from tests.fakes.small_llama import VOCAB_SIZE, save_small_llama

# "The capital of France is Paris." and how SmolLM2 goes on, then its beginning once more.
TEXT = [504, 3575, 282, 4649, 314, 7042, 30, 198, 198, 504, 2988, 314, 42, 216, 34, 32, 33, 40, 29]
TEXT += [32, 33, 29, 34, 34, 216, 33, 34, 42, 33, 34, 42, 37, 35, 30, 2, 198, 1, *TEXT[:7]]
NUM_DECODED = 5


@pytest.fixture
def interpreted_attention() -> Iterator[None]:
    paged_attention.select("cuda", exclude=("cuda",), tensors_on="cpu")
    yield
    paged_attention.select("cpu")


def log_probabilities(
    path: Path, tokens: list[int], kv_format: KVCacheFormat, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """Of what follows each token of a prompt, in two chunks, and of tokens that come one by one."""
    model, _ = load_model(path, dtype=dtype, device="cpu")
    config, block_size = model.config, 16
    shape = (config.num_layers, 8, block_size, config.kv_heads, config.head_dim)
    cache = KVCache(*shape, kv_dtype(kv_format, dtype), "cpu")
    tables = torch.tensor([[6, 1, 4, 0, 3]], dtype=torch.int32)
    found, start, prompt = [], 0, len(tokens) - NUM_DECODED
    for count in (prompt - 20, 20, *[1] * NUM_DECODED):
        positions = torch.arange(start, start + count)
        slots = tables[0].long()[positions // block_size] * block_size + positions % block_size
        own = torch.tensor(tokens[start : start + count])
        start += count
        rows = torch.arange(count)
        batch = ForwardBatch(own, positions, slots, tables, (count,), (start,), rows)
        found.append(model(batch, cache))
    return torch.cat(found).log_softmax(-1)


def divergence(expected: Tensor, found: Tensor) -> float:
    """Of Kullback and Leibler, in nats, over all positions."""
    return float((expected.exp() * (expected - found)).sum(-1).mean())


def moved(expected: Tensor, found: Tensor, tokens: list[int]) -> float:
    """By how much the log-probabilities of the tokens that follow move."""
    rows = torch.arange(len(tokens) - 1)
    return float((found - expected)[rows, torch.tensor(tokens[1:])].abs().mean())


@pytest.mark.usefixtures("interpreted_attention")
@pytest.mark.parametrize(("kv_format", "bound"), [("int8", 4e-3), ("fp8", 8e-2)])
def test_what_the_kernels_read_in_eight_bits_moves_a_random_model_little(
    tmp_path: Path, kv_format: KVCacheFormat, bound: float
) -> None:
    save_small_llama(tmp_path)
    tokens = torch.randint(VOCAB_SIZE, (50,)).tolist()
    expected = log_probabilities(tmp_path, tokens, "auto")
    found = log_probabilities(tmp_path, tokens, kv_format)
    assert 0 < divergence(expected, found) < bound


@pytest.mark.slow
def test_eight_bits_move_a_trained_model_little(demo_model_path: Path) -> None:
    expected = log_probabilities(demo_model_path, TEXT, "auto")
    for kv_format, most_divergence, most_moved in (("int8", 8e-3, 0.1), ("fp8", 4e-2, 0.2)):
        found = log_probabilities(demo_model_path, TEXT, kv_format)
        assert 0 < divergence(expected, found) < most_divergence
        assert moved(expected, found, TEXT) < most_moved
