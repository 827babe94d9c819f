"""Through its adapters a model of every family computes what PEFT computes, in batches in which
every sequence goes through another one or none."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.models import load_model
from services.engine.core.models.loader import open_model
from services.engine.core.models.native import NativeModel
from services.engine.core.models.precision import WeightChoice
from tests.fakes.adapters import ALL_LINEAR, logits_of
from tests.fakes.native_steps import Sequences, text
from tests.fakes.paged_step import libraries
from tests.unit.engine_models.conftest import Stepper

KERNELS = libraries()
native = pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine")
each_isa = pytest.mark.parametrize("kernels", KERNELS, ids=lambda each: each.isa)

ATTENTION = {
    "gpt2": ["attn.c_attn"],
    "phi3, half rotated": ["qkv_proj"],
}
FEED_FORWARD = {
    "gpt2": ["c_fc"],
    "phi3, half rotated": ["gate_up_proj", "down_proj"],
}
LAYER_1 = {"gpt2": "h.1.mlp.c_fc"}
FAMILIES = [
    "llama",
    "mistral, windowed",
    "qwen2",
    "qwen3",
    "gemma2, capped hard",
    "gemma3",
    "phi3, half rotated",
    "gpt2",
]
ORDER = ("attention", None, "everything", "feed_forward", "everything", None, "attention")
SLOTS = {"everything": 0, "attention": 1, "feed_forward": 3}
TOKENS = text(30)
COMPLETION_TOKENS = 16


def configs(case: str) -> dict[str, dict[str, Any]]:
    """Three adapters of different ranks, scales and targets."""
    return {
        "everything": {"r": 8, "lora_alpha": 16, **ALL_LINEAR},
        "attention": {
            "r": 20,
            "lora_alpha": 24,
            "use_rslora": True,
            "target_modules": ATTENTION.get(case, ["q_proj", "v_proj"]),
        },
        "feed_forward": {
            "r": 3,
            "target_modules": FEED_FORWARD.get(case, ["up_proj", "down_proj"]),
            # More than two tiles of the kernels, in one layer.
            "rank_pattern": {LAYER_1.get(case, r"layers\.1\.mlp\.down_proj"): 33},
            "alpha_pattern": {"c_fc" if case == "gpt2" else "down_proj": 4},
        },
    }


def together(
    model: Any, sequences: Any, order: tuple[str | None, ...], length: int
) -> list[Tensor]:
    """The logits of the same tokens through these adapters, in two chunks of one batch each."""
    parts = []
    for tokens in (TOKENS[:length], TOKENS[length:]):
        make = sequences.append if hasattr(sequences, "append") else sequences.make_batch
        batch = make(dict.fromkeys(range(len(order)), tokens))
        slots = tuple(-1 if name is None else SLOTS[name] for name in order)
        batch = dataclasses.replace(batch, adapters=slots)
        parts.append(model(batch, sequences.cache).clone().split(batch.query_lengths))
    return [torch.cat(own) for own in zip(*parts, strict=True)]


@pytest.mark.parametrize("case", FAMILIES)
def test_on_torch_logits_and_greedy_tokens_are_those_of_peft(
    case: str, make_adapted: Callable[..., Any]
) -> None:
    adapted, path, read = make_adapted(case, **configs(case))
    model, _ = load_model(path, dtype=torch.float32, device="cpu")
    model.take_adapters(max_adapters=4, max_rank=64)
    for name, parts in read.items():
        model.set_adapter(SLOTS[name], model.prepare_adapter(parts))
    found = together(model, Stepper(model), ORDER, 17)
    for name, logits in zip(ORDER, found, strict=True):
        torch.testing.assert_close(logits, logits_of(adapted, TOKENS, name), atol=5e-4, rtol=2e-4)
    base = logits_of(adapted, TOKENS, None)
    for name in SLOTS:
        assert (logits_of(adapted, TOKENS, name) - base).abs().max() > 0.1
    stepper, said = Stepper(model), list(TOKENS[:6])
    new = said
    for _ in range(COMPLETION_TOKENS):
        batch = dataclasses.replace(stepper.make_batch({"only": new}), adapters=(0,))
        new = [int(model(batch, stepper.cache)[-1].argmax())]
        said = said + new
    adapted.set_adapter("everything")
    expected = adapted.generate(
        input_ids=torch.tensor([TOKENS[:6]]),
        max_new_tokens=COMPLETION_TOKENS,
        do_sample=False,
        eos_token_id=None,
    )
    assert said == expected[0].tolist()


@pytest.mark.parametrize("case", FAMILIES)
def test_in_bfloat16_torch_errs_no_more_than_peft(
    case: str, make_adapted: Callable[..., Any]
) -> None:
    adapted, path, read = make_adapted(case, everything=configs(case)["everything"])
    exact = logits_of(adapted, TOKENS, "everything").log_softmax(-1)
    theirs = logits_of(adapted.bfloat16(), TOKENS, "everything").float().log_softmax(-1)
    model, _ = load_model(path, dtype=torch.bfloat16, device="cpu")
    model.take_adapters(max_adapters=1, max_rank=64)
    model.set_adapter(0, model.prepare_adapter(read["everything"]))
    ours = together(model, Stepper(model), ("everything",), 17)[0].log_softmax(-1)
    assert (ours - exact).abs().mean() <= 1.3 * (theirs - exact).abs().mean()


class AdaptedSequences(Sequences):
    """Steps on the native kernels through loaded adapters."""

    def __init__(
        self, kernels: Library, path: Path, read: dict[str, Any], weights: WeightChoice, **how: Any
    ) -> None:
        super().__init__(kernels, path, weights, **how)
        opened = open_model(path)
        self.model = NativeModel(
            opened.skeleton,
            opened.checkpoint,
            Team(kernels, how.get("threads", 1)),
            weights,
            max_adapters=4,
            max_adapter_rank=64,
        )
        self.model.bind(self.cache, max_batch_tokens=2_048)
        for name, parts in read.items():
            self.model.set_adapter(SLOTS[name], self.model.prepare_adapter(parts))

    def alone(self, name: str | None, tokens: list[int], number: int) -> Tensor:
        """The logits of a sequence by itself, token by token."""
        parts = []
        for token in tokens:
            batch = self.append({number: [token]})
            if name is not None:
                batch = dataclasses.replace(batch, adapters=(SLOTS[name],))
            parts.append(self.model(batch, self.cache).clone())
        return torch.cat(parts)


@native
@each_isa
@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("case", FAMILIES)
def test_native_steps_come_close_to_peft_and_company_changes_no_bit(
    kernels: Library, weights: WeightChoice, case: str, make_adapted: Callable[..., Any]
) -> None:
    adapted, path, read = make_adapted(case, **configs(case))
    sequences = AdaptedSequences(kernels, path, read, weights, threads=1)
    found = together(sequences.model, sequences, ORDER, 17)
    # What rounding weights does to the model by itself bounds what it does through an adapter.
    allowed = 2 * _distance(found[1], logits_of(adapted, TOKENS, None)) + 0.01
    for number, (name, logits) in enumerate(zip(ORDER, found, strict=True)):
        assert _distance(logits, logits_of(adapted, TOKENS, name)) < allowed
        if number < 4:
            assert torch.equal(sequences.alone(name, TOKENS, 100 + number), logits)


def _distance(found: Tensor, expected: Tensor) -> float:
    found, expected = found.log_softmax(-1), expected.log_softmax(-1)
    return float((found - expected).square().mean().sqrt() / expected.std())


@native
@pytest.mark.parametrize("case", ["llama", "gpt2", "gemma3"])
def test_threads_that_compute_their_own_rows_and_rows_left_out_change_no_bit(
    case: str, make_adapted: Callable[..., Any]
) -> None:
    _, path, read = make_adapted(case, **configs(case))
    shared = AdaptedSequences(KERNELS[0], path, read, "bfloat16", threads=1)
    divided = AdaptedSequences(KERNELS[0], path, read, "bfloat16", threads=3, seed=1)
    some = AdaptedSequences(KERNELS[0], path, read, "bfloat16", threads=2, seed=2)
    slots = (1, -1, 0, 3, 0)
    for index, lengths in enumerate([(60, 1, 40, 23, 1), (1, 1, 1, 1, 1), (2, 30, 1, 1, 19)]):
        step = {name: text(length, 10 * index + name) for name, length in enumerate(lengths)}
        batches = [
            dataclasses.replace(each.append(step), adapters=slots)
            for each in (shared, divided, some)
        ]
        expected = shared.model(batches[0], shared.cache).clone()
        assert torch.equal(divided.model(batches[1], divided.cache), expected)
        wanted = torch.arange(index % 3, len(expected), 5)
        batch = dataclasses.replace(batches[2], logits_rows=wanted)
        assert torch.equal(some.model(batch, some.cache), expected[wanted])
