"""Every type of GGUF is read as its own package reads it, and computed in few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from services.engine.core.models import load_model
from services.engine.core.models.loader import open_model
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine
from services.engine.core.weights.dequantize import DEQUANTIZERS, FLOATS, dequantize
from services.engine.core.weights.grouped import GROUPED, read_grouped
from services.runtime.modelfiles import ModelFileError
from services.runtime.modelfiles.precision import KEPT_IN_4, KEPT_IN_8, ROUNDED
from tests.fakes.gguf_files import TYPES, random_blocks, write_gguf
from tests.fakes.native_steps import Sequences
from tests.fakes.paged_step import libraries

KERNELS = libraries()
TOKENS = [1, 5, 90, 33, 7, 7, 61, 12]
# Types of 256 elements a block need rows of as many.
WIDE = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "initializer_range": 0.1,
}
WITH_SCALES_ROUNDED = ("Q4_K", "Q5_K", "IQ4_XS")


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of the logits, against their spread: 0.05 for activations of 8 bits in random models as
    small, 0.3 and more once weights have been rounded to 4."""
    return float((found - expected).square().mean().sqrt() / expected.std())


@pytest.mark.parametrize("kind", DEQUANTIZERS)
def test_dequantisation_equals_the_reference_package(kind: str) -> None:
    storage = TYPES[kind]
    random = np.random.default_rng(7)
    raw = random.integers(0, 256, (300, storage.block_bytes), np.uint8)
    with np.errstate(all="ignore"):
        reference = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
    found = dequantize(raw.reshape(-1), storage, reference.shape).numpy()
    # Random scales are infinite or no number now and then: in both alike.
    np.testing.assert_array_equal(found, reference)
    assert np.isfinite(reference).mean() > 0.5


def test_dequantisation_in_chunks_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = np.random.default_rng(1).integers(0, 60, 100 * 20, dtype=np.uint8)
    whole = dequantize(raw, TYPES["Q4_1"], (50, 64))
    monkeypatch.setattr("services.engine.core.weights.dequantize._CHUNK_ELEMENTS", 96)
    assert torch.equal(dequantize(raw, TYPES["Q4_1"], (50, 64)), whole)


@pytest.mark.parametrize("kind", GROUPED)
def test_groups_of_32_keep_their_values(kind: str) -> None:
    storage = TYPES[kind]
    if kind in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
        values = np.random.default_rng(3).normal(0, 0.1, (20, 64)).astype(np.float32)
        raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind]).view(np.uint8)
    else:
        raw = random_blocks(storage, 40)
    shape = (20, raw.size // 20 // storage.block_bytes * storage.block_elements)
    exact = dequantize(raw.reshape(-1), storage, shape)
    weight = read_grouped(raw.reshape(-1), storage, shape)
    if kind not in WITH_SCALES_ROUNDED:
        assert torch.equal(weight.dequantize(), exact)
        return
    # A product of a half and a few bits, rounded to a half: one part in 2048 of either summand.
    groups = weight.levels.view(20, -1, 32).float()
    largest = (groups * weight.scales.float().unsqueeze(-1)).abs().amax(-1, keepdim=True)
    if weight.minima is not None:
        largest += weight.minima.float().abs().unsqueeze(-1)
    off = (weight.dequantize() - exact).view(20, -1, 32).abs()
    assert (off <= largest * 2**-11).all()
    assert off.max() > 0


@pytest.mark.parametrize("kind", [kind for kind in DEQUANTIZERS if kind not in FLOATS])
def test_a_model_of_any_type_computes_with_the_values_of_its_file(
    kind: str, make_checkpoint: Any, stepper: Any, tmp_path: Path
) -> None:
    _, reference = make_checkpoint(**WIDE)
    path = tmp_path / "model.gguf"
    write_gguf(reference, path, kind)
    model = load_model(path, dtype=torch.float32, device="cpu")[0]
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    found = stepper(model).step({"a": TOKENS})["a"]
    torch.testing.assert_close(found, expected, atol=3e-4, rtol=3e-4)
    if KERNELS:
        native = Sequences(KERNELS[0], path).step({0: TOKENS})[0]
        assert error(native, expected) < 0.1


def mixed(name: str) -> str:
    """As in the mixes named Q4_K_M: values and some others are wider than the rest."""
    if "attn_v" in name or "ffn_down" in name:
        return "Q6_K"
    return "Q8_0" if name.startswith(("token_embd", "output")) else "Q4_K"


@pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine")
def test_a_mix_of_types_is_computed_in_few_bits(make_checkpoint: Any, tmp_path: Path) -> None:
    _, reference = make_checkpoint(**WIDE)
    path = tmp_path / "model.gguf"
    write_gguf(reference, path, mixed)
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    sequences = Sequences(KERNELS[0], path)
    found = sequences.step({0: TOKENS})[0]
    assert error(found, expected) < 0.1
    # Queries and keys of 4 bits join their values in 8; nothing falls back to 16.
    assert set(sequences.model.weight_bytes) == {"q4", "q8"}


@pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine")
def test_scales_that_are_no_numbers_are_refused_by_tensor(
    make_checkpoint: Any, tmp_path: Path
) -> None:
    _, reference = make_checkpoint(**WIDE)
    path = tmp_path / "model.gguf"
    write_gguf(reference, path, "Q8_0")
    opened = open_model(path)
    offset = opened.checkpoint._file.tensors["blk.1.attn_q.weight"].offset  # type: ignore[attr-defined]
    content = bytearray(path.read_bytes())
    content[offset : offset + 2] = b"\x00\x7e"  # not a number
    path.write_bytes(content)
    with pytest.raises(
        ModelFileError, match=rf"'blk.1.attn_q.weight': has scales .* \(at byte {offset}\)"
    ):
        build_engine(CoreSettings(model_path=str(path), kv_cache_memory_bytes=1 << 20))


def test_a_split_model_is_read_as_one(make_checkpoint: Any, stepper: Any, tmp_path: Path) -> None:
    directory, reference = make_checkpoint(**WIDE)
    write_gguf(reference, tmp_path / "model.gguf", tensors_each=5)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert [part.name for part in parts[:2]] == [
        "model-00001-of-00005.gguf",
        "model-00002-of-00005.gguf",
    ]
    expected = stepper(load_model(directory, dtype=torch.float32, device="cpu")[0])
    found = stepper(load_model(parts[0], dtype=torch.float32, device="cpu")[0])
    torch.testing.assert_close(
        found.step({"a": TOKENS})["a"], expected.step({"a": TOKENS})["a"], atol=1e-5, rtol=1e-5
    )


def test_parts_that_are_missing_or_others_are_refused_by_name(
    make_checkpoint: Any, tmp_path: Path
) -> None:
    _, reference = make_checkpoint(**WIDE)
    write_gguf(reference, tmp_path / "model.gguf", tensors_each=5)
    parts = sorted(tmp_path.glob("*.gguf"))
    with pytest.raises(ModelFileError, match=r"is part 2 of 5; give the first, model-00001-of"):
        open_model(parts[1])
    alone = tmp_path / "alone.gguf"
    alone.write_bytes(parts[0].read_bytes())
    with pytest.raises(ModelFileError, match=r"one of 5 parts, which are named like NAME-00001-of"):
        open_model(alone)
    third = parts[2].read_bytes()
    parts[2].write_bytes(parts[3].read_bytes())
    with pytest.raises(ModelFileError, match=r"00003-of-00005.gguf: .*it is part 4 of 5, not 3"):
        open_model(parts[0])
    parts[2].write_bytes(third)
    parts[4].unlink()
    with pytest.raises(ModelFileError, match=r"00005-of-00005\.gguf: no such file"):
        open_model(parts[0])


def test_what_is_said_of_types_is_what_becomes_of_them() -> None:
    kept = set(KEPT_IN_4) | set(KEPT_IN_8)
    assert kept == set(GROUPED)
    assert kept | set(ROUNDED) | set(FLOATS) == set(DEQUANTIZERS)
    for kind in kept:
        storage = TYPES[kind]
        blocks = np.zeros(storage.block_bytes, np.uint8)
        bits = read_grouped(blocks, storage, (1, storage.block_elements)).bits
        assert bits == (4 if kind in KEPT_IN_4 else 8)


@pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine")
def test_an_engine_says_what_it_rounds(
    make_checkpoint: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, reference = make_checkpoint(**WIDE)
    path = tmp_path / "model.gguf"
    write_gguf(reference, path, mixed)
    with caplog.at_level("INFO"):
        _, facts = build_engine(CoreSettings(model_path=str(path), kv_cache_memory_bytes=1 << 20))
    said = "; rounded to 8 bits: 4 of Q6_K"
    assert said in facts.kernels["step"]
    assert said in caplog.text


@pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine")
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_of_a_quantised_model_takes_eight_bits(
    tied: bool, make_checkpoint: Any, tmp_path: Path
) -> None:
    _, reference = make_checkpoint(**WIDE, tie_word_embeddings=tied)
    path = tmp_path / "model.gguf"
    write_gguf(
        reference, path, lambda name: "F16" if name.startswith(("token", "output")) else "Q4_0"
    )
    sequences = Sequences(KERNELS[0], path)
    assert sequences.model.rounded == {"F16": 1}
    # Embeddings that are only looked up stay as they are.
    assert ("bf16" in sequences.model.weight_bytes) == (not tied)
    with torch.no_grad():
        expected = reference(torch.tensor([TOKENS])).logits[0]
    assert error(sequences.step({0: TOKENS})[0], expected) < 0.1
