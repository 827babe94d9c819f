"""Encoders on the native kernels agree with plain torch, and with themselves bit for bit."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor

from services.engine.core.encoding.batch import make_batch
from services.engine.core.encoding.loader import open_encoder
from services.engine.core.encoding.native import NativeEncoder, WeightChoice
from services.engine.core.kernels.cpu.library import Library
from services.engine.core.kernels.cpu.program import UnsupportedModelError
from services.engine.core.kernels.cpu.team import Team
from tests.fakes.paged_step import libraries
from tests.fakes.small_encoders import (
    MODELS,
    SECOND_TEXTS,
    VOCAB_SIZE,
    SavedEncoders,
    batch_of_all,
    sequences,
)

KERNELS = libraries()
pytestmark = pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine")

each_isa = pytest.mark.parametrize("kernels", KERNELS, ids=lambda each: each.isa)
NATIVE = [name for name in MODELS if not name.startswith("deberta")]


def native(
    path: Path, kernels: Library, threads: int = 1, weights: WeightChoice = "auto"
) -> NativeEncoder:
    opened = open_encoder(path)
    return NativeEncoder(opened.skeleton, opened.checkpoint, Team(kernels, threads), weights)


def least_cosine(found: Tensor, expected: Tensor) -> float:
    return torch.cosine_similarity(found, expected, dim=-1).min().item()


@each_isa
@pytest.mark.parametrize("name", NATIVE)
def test_every_token_has_the_vector_of_the_reference(
    saved: SavedEncoders, kernels: Library, name: str
) -> None:
    _, path = saved.save(name)
    expected = open_encoder(path).load(torch.float32, "cpu")(batch_of_all())
    assert least_cosine(native(path, kernels)(batch_of_all()), expected) > 0.9999


@each_isa
@pytest.mark.parametrize(("weights", "cosine"), [("int8", 0.999), ("int4", 0.9)])
def test_rounded_weights_stay_near(
    saved: SavedEncoders, kernels: Library, weights: WeightChoice, cosine: float
) -> None:
    _, path = saved.save("bert")
    expected = open_encoder(path).load(torch.float32, "cpu")(batch_of_all())
    assert least_cosine(native(path, kernels, weights=weights)(batch_of_all()), expected) > cosine


@each_isa
@pytest.mark.parametrize("name", ["bert", "modernbert"])
@pytest.mark.parametrize("threads", [1, 3])
def test_a_sequence_has_the_same_bits_in_any_company(
    saved: SavedEncoders, kernels: Library, name: str, threads: int
) -> None:
    """Alone, where all threads share its rows and heads, as among many, where one thread has it."""
    _, path = saved.save(name)
    alone, crowd = native(path, kernels), native(path, kernels, threads)
    rng = random.Random(0)
    others = [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 80))] for _ in range(40)]
    for _ in range(3):
        mixed = sequences() + others
        order = list(range(len(mixed)))
        rng.shuffle(order)
        batch = make_batch([mixed[index] for index in order])
        vectors = dict(zip(order, crowd(batch).split(batch.lengths), strict=True))
        for index, token_ids in enumerate(sequences()):
            assert torch.equal(vectors[index], alone(make_batch([token_ids])))


@each_isa
def test_a_token_sees_as_far_as_its_window(saved: SavedEncoders, kernels: Library) -> None:
    """Where a sequence is as long as the window, a little longer, or much."""
    _, path = saved.save("modernbert")
    reference = open_encoder(path).load(torch.float32, "cpu")
    token_ids = sequences()[4]
    for length in (1, 8, 9, 16, 17, 25, 70):
        batch = make_batch([token_ids[:length]])
        assert least_cosine(native(path, kernels)(batch), reference(batch)) > 0.9999


@each_isa
def test_a_broken_input_breaks_no_other(saved: SavedEncoders, kernels: Library) -> None:
    """A token whose embedding is NaN makes NaN of its own sequence alone."""
    _, path = saved.save("bert")
    opened = open_encoder(path)
    read = opened.checkpoint.read

    def poisoned(name: str) -> Tensor:
        tensor = read(name).clone()
        if name == "embeddings.word.weight":
            tensor[2] = float("nan")
        return tensor

    opened.checkpoint.read = poisoned  # type: ignore[method-assign]
    encoder = NativeEncoder(opened.skeleton, opened.checkpoint, Team(kernels, 1), "auto")
    clean = native(path, kernels)
    batch = make_batch([*sequences(), [2, 5, 6]], [*SECOND_TEXTS, None])
    found = encoder(batch).split(batch.lengths)
    assert found[-1].isnan().all()
    expected = clean(batch_of_all())
    assert torch.equal(torch.cat(found[:-1]), expected)


@each_isa
def test_what_has_no_program_says_so(saved: SavedEncoders, kernels: Library) -> None:
    _, path = saved.save("deberta")
    with pytest.raises(UnsupportedModelError, match="DebertaV2"):
        native(path, kernels)
