"""Bits go where they gain most for each byte, and no budget is broken."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.engine.core.models.loader import open_model
from services.engine.core.quantization.layers import LayeredModel, Unit
from services.engine.core.quantization.sensitivity import (
    Budget,
    allocate,
    foretold_ratio,
    measure_divergences,
)
from tests.fakes.decoder_families import CASES, make_model
from tests.fakes.small_llama import save_small_llama

WINDOWS = torch.randint(0, 97, (3, 48), generator=torch.Generator().manual_seed(0))


def unit(name: str, outputs: int = 64, inputs: int = 64) -> Unit:
    return Unit(f"layers.0.{name}", (outputs, inputs), ())


@pytest.mark.parametrize(
    ("text", "budget"), [("0.6x", Budget(size=0.6)), ("1.02ppl", Budget(perplexity=1.02))]
)
def test_budgets_are_read(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize("text", ["", "0.6", "x", "0x", "-1x", "nanx", "infppl", "1.0ppl", "2 MB"])
def test_what_is_no_budget_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        Budget.parse(text)


def test_the_most_sensitive_get_more_first() -> None:
    units = [unit("a"), unit("b"), unit("c")]
    divergences = {
        ("layers.0.a", 4): 0.5,
        ("layers.0.a", 8): 0.01,
        ("layers.0.b", 4): 0.001,
        ("layers.0.b", 8): 0.0001,
        ("layers.0.c", 4): 0.02,
        ("layers.0.c", 8): 0.001,
    }
    chosen = allocate(units, divergences, Budget(perplexity=1.04), 0, 1)
    assert chosen == {"layers.0.a": 8, "layers.0.b": 4, "layers.0.c": 4}
    assert math.isclose(foretold_ratio(chosen, divergences), math.exp(0.01 + 0.001 + 0.02))


@given(
    losses=st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8),
    size=st.floats(0.4, 1.1),
)
def test_a_budget_of_size_is_kept_and_used(losses: list[tuple[float, float]], size: float) -> None:
    units = [unit(str(index)) for index in range(len(losses))]
    divergences = {
        (each.path, bits): loss
        for each, pair in zip(units, losses, strict=True)
        for bits, loss in zip((4, 8), sorted(pair, reverse=True), strict=True)
    }
    whole = sum(each.kept_bytes(16) for each in units)
    chosen = allocate(units, divergences, Budget(size=size), 0, whole)
    spent = sum(each.kept_bytes(chosen[each.path]) for each in units)
    assert spent <= size * whole
    # Nothing that is left in 4 bits would have had room for 8.
    if any(bits == 4 for bits in chosen.values()):
        assert spent + units[0].kept_bytes(8) - units[0].kept_bytes(4) > size * whole


DENSE = [case for case in CASES if not case.startswith(("mixtral", "qwen3-moe"))]


@pytest.mark.parametrize("case", DENSE)
def test_layer_by_layer_gives_what_the_whole_model_gives(case: str, tmp_path: Path) -> None:
    reference = make_model(case)
    reference.save_pretrained(tmp_path)
    model = LayeredModel(open_model(tmp_path), WINDOWS)
    hidden = model.embed()
    for index in range(model.num_layers):
        hidden = model.run(model.layer(index), hidden)
    with torch.no_grad():
        expected = reference(WINDOWS).logits.log_softmax(-1)
    found = torch.stack(list(model.log_probabilities(hidden)))
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=2e-3)


def test_rounding_to_fewer_bits_moves_answers_further(tmp_path: Path) -> None:
    save_small_llama(tmp_path)
    model = LayeredModel(open_model(tmp_path), WINDOWS)
    found = measure_divergences(model, lambda *_: None)
    assert found.keys() == {
        (unit.path, bits) for index in range(2) for unit in model.units(index) for bits in (4, 8)
    }
    assert all(found[path, 8] < 0.1 * found[path, 4] for path, _ in found)
