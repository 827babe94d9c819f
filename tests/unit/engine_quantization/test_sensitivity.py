"""Bits go where they gain most for each byte, and no budget is broken."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from services.engine.core.models.loader import open_model
from services.engine.core.quantization.allocation import (
    Budget,
    after,
    foretold_loss,
    steps_up,
    within_size,
)
from services.engine.core.quantization.grid import round_to_nearest
from services.engine.core.quantization.layers import LayeredModel, Unit, weights_of
from services.engine.core.quantization.meeting import MOST_TRIALS, meet_perplexity
from services.engine.core.quantization.sensitivity import Sensitivity
from tests.fakes.decoder_families import CASES, make_model
from tests.fakes.small_llama import save_small_llama

WINDOWS = torch.randint(0, 97, (3, 48), generator=torch.Generator().manual_seed(0))


def unit(name: str, outputs: int = 64, inputs: int = 64) -> Unit:
    return Unit(f"layers.0.{name}", (outputs, inputs), ((),))


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
    steps = steps_up(units, divergences)
    assert [(step.path[-1], step.bits) for step in steps[:2]] == [("a", 8), ("c", 8)]
    assert set(after(units, steps).values()) == {16}
    chosen = after(units, steps[:1])
    assert chosen == {"layers.0.a": 8, "layers.0.b": 4, "layers.0.c": 4}
    assert math.isclose(foretold_loss(chosen, divergences), 0.01 + 0.001 + 0.02)


LOSSES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=8)


def units_losing(
    losses: list[tuple[float, float]],
) -> tuple[list[Unit], dict[tuple[str, int], float]]:
    units = [unit(str(index)) for index in range(len(losses))]
    return units, {
        (each.path, bits): loss
        for each, pair in zip(units, losses, strict=True)
        for bits, loss in zip((4, 8), sorted(pair, reverse=True), strict=True)
    }


@given(losses=LOSSES, size=st.floats(0.4, 1.1))
def test_a_budget_of_size_is_kept_and_used(losses: list[tuple[float, float]], size: float) -> None:
    units, divergences = units_losing(losses)
    whole = sum(each.kept_bytes(16) for each in units)
    least = sum(each.kept_bytes(4) for each in units)
    chosen = within_size(units, divergences, int(size * whole) - least)
    spent = sum(each.kept_bytes(chosen[each.path]) for each in units)
    assert spent <= size * whole
    # Nothing that is left in 4 bits would have had room for 8.
    if any(bits == 4 for bits in chosen.values()):
        assert spent + units[0].kept_bytes(8) - units[0].kept_bytes(4) > size * whole


@given(losses=LOSSES, ratio=st.floats(1.0001, 3), off=st.floats(-1, 5))
def test_a_budget_of_perplexity_is_kept_however_wrong_single_layers_are(
    losses: list[tuple[float, float]], ratio: float, off: float
) -> None:
    units, divergences = units_losing(losses)
    measured: dict[tuple[int, ...], float] = {}

    def measure(bits: dict[str, int]) -> float:
        # Together they cost another power of what they foretell, as long as any is rounded.
        key = tuple(bits.values())
        measured[key] = math.exp(foretold_loss(bits, divergences) * math.exp(off) + 1e-4)
        return measured[key]

    chosen, trials = meet_perplexity(units, divergences, ratio, measure)
    assert len(trials) <= MOST_TRIALS
    key = tuple(chosen.values())
    assert set(key) == {16} or measured[key] <= ratio
    # What was smaller and measured did not keep it.
    size = sum(each.kept_bytes(chosen[each.path]) for each in units)
    assert all(trial.perplexity_ratio > ratio for trial in trials if trial.bytes < size)


def test_no_more_bits_are_given_than_a_budget_of_perplexity_takes() -> None:
    units, divergences = units_losing([(0.02, 0.001)] * 8)

    def measure(bits: dict[str, int]) -> float:
        return math.exp(3 * foretold_loss(bits, divergences))

    chosen, trials = meet_perplexity(units, divergences, 1.1, measure)
    # Three times what was foretold: 0.0953 / 3 is one unit in 4 bits and seven in 8.
    assert sorted(chosen.values()) == [4] + [8] * 7
    assert len(trials) < MOST_TRIALS


def test_no_budget_of_perplexity_can_be_missed() -> None:
    units, divergences = units_losing([(0.02, 0.001)] * 3)
    chosen, _ = meet_perplexity(units, divergences, 1.0001, lambda bits: 2.0)
    assert set(chosen.values()) == {16}


@pytest.mark.parametrize("case", CASES)
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


def measured_divergences(directory: Path, bits: int) -> dict[tuple[str, int], float]:
    model = LayeredModel(open_model(directory), WINDOWS)
    sensitivity = Sensitivity(model)
    for index in range(model.num_layers):
        layer, units = model.layer(index), model.units(index)
        before = {name: each.clone() for name, each in layer.named_parameters()}
        rounded = {
            unit.path: [round_to_nearest(weight, bits) for weight in weights_of(layer, unit)]
            for unit in units
        }
        sensitivity.see(layer, rounded, units)
        for name, parameter in layer.named_parameters():
            assert torch.equal(parameter, before[name])
    return sensitivity.divergences()


def test_rounding_to_fewer_bits_moves_answers_further(tmp_path: Path) -> None:
    save_small_llama(tmp_path)
    found = measured_divergences(tmp_path, bits=4)
    units = LayeredModel(open_model(tmp_path), WINDOWS).units(1)
    assert {(unit.path, bits) for unit in units for bits in (4, 8)} < found.keys()
    assert all(found[path, 8] < 0.1 * found[path, 4] for path, _ in found)


def test_experts_are_measured_together(whole_groups: None, tmp_path: Path) -> None:
    make_model("mixtral").save_pretrained(tmp_path)
    found = measured_divergences(tmp_path, bits=4)
    for name in ("gate_up", "down"):
        path = f"layers.0.feed_forward.experts.{name}"
        assert found[path, 8] < 0.1 * found[path, 4]
