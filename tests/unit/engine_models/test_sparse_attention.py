"""A model whose tokens see a window and the beginning of their sequence, and nothing between."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.core.layers import PagedAttention
from services.engine.core.model_config import ModelConfig, SparseAttention
from services.engine.core.models import Model
from services.engine.core.models.loader import open_model
from tests.unit.engine_models.conftest import BLOCK_SIZE

TOKENS = torch.randint(3, 60, (50,), generator=torch.manual_seed(0)).tolist()
CHUNKS = (30, 13, 1, 1, 1, 1, 1, 1, 1)


@pytest.fixture
def model(make_checkpoint: Any) -> Any:
    def load(sparse_attention: SparseAttention | None) -> Model:
        directory, _ = make_checkpoint(num_hidden_layers=1)
        opened = open_model(directory, sparse_attention=sparse_attention)
        return opened.load(torch.float32, "cpu")

    return load


def last_logits(drive: Any, tokens: list[int]) -> Tensor:
    start, logits = 0, torch.empty(0)
    for count in CHUNKS:
        logits = drive.step({"only": tokens[start : start + count]})["only"][-1]
        start += count
    assert start == len(tokens)
    return logits


def test_what_lies_between_changes_nothing(model: Any, stepper: Any) -> None:
    sparse = model(SparseAttention(window=8, global_tokens=3))
    expected = last_logits(stepper(sparse), TOKENS)
    for position, matters in ((0, True), (2, True), (3, False), (41, False), (42, True)):
        other = list(TOKENS)
        other[position] = 60
        found = last_logits(stepper(sparse), other)
        assert torch.equal(found, expected) is not matters, position


def test_what_lies_between_may_be_given_away(model: Any, stepper: Any) -> None:
    drive = stepper(model(SparseAttention(window=8, global_tokens=3)))
    plain = last_logits(stepper(drive.model), TOKENS)
    start = 0
    for count in CHUNKS:
        unseen = range(-(-3 // BLOCK_SIZE), max(0, start - 8 + 1) // BLOCK_SIZE)
        for row in unseen:
            for layer in drive.cache.layers:
                layer.keys[drive.tables["only"][row]] = torch.nan
                layer.values[drive.tables["only"][row]] = torch.nan
        found = drive.step({"only": TOKENS[start : start + count]})["only"][-1]
        start += count
    assert len(unseen) == 9
    torch.testing.assert_close(found, plain)


def test_a_window_as_long_as_the_context_hides_nothing(model: Any, stepper: Any) -> None:
    full = last_logits(stepper(model(None)), TOKENS)
    for sparse_attention in (SparseAttention(50), SparseAttention(20, 30)):
        found = last_logits(stepper(model(sparse_attention)), TOKENS)
        torch.testing.assert_close(found, full, atol=1e-5, rtol=1e-5)


def test_layers_with_a_window_keep_it(make_checkpoint: Any) -> None:
    directory, _ = make_checkpoint()
    config: ModelConfig = open_model(directory).config
    sparse = replace(config, windows=(5, None), sparse_attention=SparseAttention(7, 2))
    layers = [PagedAttention(sparse, index) for index in range(2)]
    assert [(each.window, each.global_tokens) for each in layers] == [(5, 0), (7, 2)]


def test_a_window_holds_a_token() -> None:
    for window, global_tokens in ((0, 1), (1, -1)):
        with pytest.raises(ValueError, match="shows a token nothing"):
            SparseAttention(window, global_tokens)
