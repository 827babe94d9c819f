"""What a model is said to take before it is loaded is what it takes once it is."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from services.engine.core.encoding.loader import open_encoder
from services.engine.core.encoding.native import NativeEncoder
from services.engine.core.kernels.cpu.kv_cache import KvFormat, PackedKVCache
from services.engine.core.kernels.cpu.program import UnsupportedModelError
from services.engine.core.kernels.cpu.team import Team
from services.engine.core.kv_cache import KVCache
from services.engine.core.models.footprint import (
    Footprint,
    decoder_footprint,
    encoder_footprint,
    kv_cache_bytes,
)
from services.engine.core.models.loader import open_model
from services.engine.core.models.native import NativeModel
from services.engine.core.models.precision import WeightChoice
from tests.fakes.decoder_families import CASES as FAMILIES
from tests.fakes.decoder_families import save_model
from tests.fakes.gguf_files import write_gguf
from tests.fakes.paged_step import libraries
from tests.fakes.quantised_checkpoints import quantise_checkpoint
from tests.fakes.small_encoders import MODELS, save_small_encoder
from tests.unit.engine_models.test_quantised_checkpoints import CASES as QUANTISED
from tests.unit.engine_models.test_quantised_checkpoints import WIDE

KERNELS = libraries()
WEIGHTS: tuple[WeightChoice, ...] = get_args(WeightChoice)
needs_kernels = pytest.mark.skipif(not KERNELS, reason="no native kernels on this machine")


def foretold(path: Path, weights: WeightChoice, reason: str | None = None) -> Footprint:
    return decoder_footprint(
        open_model(path), weights, why_not_native=reason, torch_dtype=torch.float32
    )


def taken(path: Path, weights: WeightChoice) -> dict[str, int]:
    opened = open_model(path)
    model = NativeModel(opened.skeleton, opened.checkpoint, Team(KERNELS[0], 1), weights)
    return model.weight_bytes


@needs_kernels
@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q5_1", "Q6_K", "IQ4_XS"])
def test_gguf_files_take_what_is_foretold(kind: str, make_checkpoint: Any, tmp_path: Path) -> None:
    _, reference = make_checkpoint(**WIDE | {"intermediate_size": 512})
    write_gguf(reference, tmp_path / "model.gguf", kind)
    for weights in WEIGHTS:
        found = foretold(tmp_path / "model.gguf", weights)
        assert found.native
        assert found.weight_bytes == taken(tmp_path / "model.gguf", weights)


@needs_kernels
@pytest.mark.parametrize(("quantise", "config", "_"), QUANTISED.values(), ids=QUANTISED.keys())
def test_quantised_checkpoints_take_what_is_foretold(
    quantise: Any, config: dict[str, Any], _: Any, make_checkpoint: Any
) -> None:
    directory, reference = make_checkpoint(**WIDE)
    quantise_checkpoint(directory, reference, quantise, config)
    for weights in ("auto", "int4"):
        assert foretold(directory, weights).weight_bytes == taken(directory, weights)


@needs_kernels
@pytest.mark.parametrize("case", FAMILIES)
def test_every_family_takes_what_is_foretold_or_says_why_it_runs_on_torch(
    case: str, tmp_path: Path
) -> None:
    model = save_model(case, tmp_path)
    found = foretold(tmp_path, "auto")
    if found.native:
        assert found.weight_bytes == taken(tmp_path, "auto")
        return
    stored = sum(each.numel() for each in model.parameters())
    assert found.weight_bytes == {"float32": 4 * stored}
    with pytest.raises(UnsupportedModelError, match=re.escape(found.reason or "")):
        taken(tmp_path, "auto")


@needs_kernels
@pytest.mark.parametrize("name", MODELS)
def test_encoders_take_what_is_foretold(name: str, tmp_path: Path) -> None:
    save_small_encoder(name, tmp_path)
    for weights in WEIGHTS:
        opened = open_encoder(tmp_path)
        found = encoder_footprint(
            open_encoder(tmp_path), weights, why_not_native=None, torch_dtype=torch.float32
        )
        load = partial(
            NativeEncoder, opened.skeleton, opened.checkpoint, Team(KERNELS[0], 1), weights
        )
        if found.native:
            assert found.weight_bytes == load().weight_bytes
            continue
        with pytest.raises(UnsupportedModelError, match=re.escape(found.reason or "")):
            load()


def test_the_kv_cache_takes_whole_blocks_of_each_sequence(make_checkpoint: Any) -> None:
    directory, _ = make_checkpoint(**WIDE)
    config = open_model(directory).config
    sizes = (config.num_layers, 16, config.kv_heads, config.head_dim)
    native = foretold(directory, "auto")
    on_torch = foretold(directory, "auto", reason="the dtype is float32")
    assert on_torch.reason == "the dtype is float32"
    packed = PackedKVCache.bytes_per_block(*sizes, KvFormat.INT8)
    plain = KVCache.bytes_per_block(*sizes, torch.float32)
    assert kv_cache_bytes(config, on_torch, sequences=1, tokens=16) == plain
    assert kv_cache_bytes(config, on_torch, sequences=3, tokens=17) == 6 * plain
    if native.native:
        found = kv_cache_bytes(config, native, sequences=1, tokens=1, kv_format="int8")
        assert found == packed
    for kv_format, dtype in (("int8", torch.int8), ("fp8", torch.float8_e4m3fn)):
        found = kv_cache_bytes(config, on_torch, sequences=1, tokens=16, kv_format=kv_format)
        assert found == KVCache.bytes_per_block(*sizes, dtype)


def test_layers_with_a_window_take_their_window_of_the_kv_cache(tmp_path: Path) -> None:
    context, window = 4096, 64
    save_model("gemma3", tmp_path, max_position_embeddings=context, sliding_window=window)
    config = open_model(tmp_path).config
    footprint = foretold(tmp_path, "auto", reason="the dtype is float32")
    layer = KVCache.bytes_per_block(1, 16, config.kv_heads, config.head_dim, torch.float32)
    found = kv_cache_bytes(config, footprint, sequences=2, tokens=context)
    # One of seven layers sees all; the others keep their window and what a step computes.
    rows_of_a_window = (window - 1 + 513 + 14) // 16 + 1
    assert found == 2 * layer * (context // 16 + 6 * rows_of_a_window)
    # What is shorter than a window takes the same in all layers.
    assert kv_cache_bytes(config, footprint, sequences=1, tokens=40) == 3 * 7 * layer
