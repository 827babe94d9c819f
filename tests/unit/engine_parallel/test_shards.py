"""What ranks compute together of a model of any family is what one computes of it alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from services.engine.core.kernels import GroupedMatrix, LowRankPart
from services.engine.core.layers import Linear, MergedLinear
from services.engine.core.models.base import Model
from services.engine.core.models.kept import KeptWeights
from services.engine.core.models.loader import load_model, open_model
from services.engine.core.parallel.layout import Layout
from services.engine.core.parallel.shard import load_shard, outline_shard
from services.engine.core.weights import gguf_checkpoint
from services.engine.core.weights.dequantize import dequantize
from tests.fakes.decoder_directories import save_quantised
from tests.fakes.decoder_families import FAMILIES, save_model, served
from tests.fakes.decoder_files import save_gguf
from tests.fakes.native_steps import text
from tests.fakes.ranks_in_threads import ShardedModel
from tests.unit.engine_models.conftest import BLOCK_SIZE, Stepper

LAYOUTS = {"2 x 1": Layout(2, 1), "1 x 2": Layout(1, 2), "2 x 2": Layout(2, 2)}
NUM_BLOCKS = 64
ROUNDING: dict[str, float] = {"atol": 1e-4, "rtol": 1e-4}


def sharded(
    path: Path, layout: Layout, cuts: tuple[int, ...] = (1,), weights: KeptWeights = "bfloat16"
) -> ShardedModel:
    """A model on ranks; `cuts` are the first layers of the stages behind the first."""
    opened = open_model(path)
    bounds = [0, *cuts[: layout.stages - 1], opened.config.num_layers]
    return ShardedModel(opened, layout, bounds, NUM_BLOCKS, BLOCK_SIZE, weights)


def steps(model: Any, adapters: dict[int, int] | None = None) -> list[Tensor]:
    """The logits of a prompt, of a chunk behind it beside another sequence, and of a decode."""
    stepper = Stepper(model, NUM_BLOCKS)
    found = []
    for tokens in (
        {"a": text(13)},
        {"a": text(9, 1), "b": text(5, 2)},
        {"a": text(1, 3), "b": text(1, 4)},
    ):
        batch = stepper.make_batch(tokens)
        if adapters is not None:
            slots = tuple(adapters[index] for index in range(len(tokens)))
            batch = dataclasses.replace(batch, adapters=slots)
        found.append(model(batch, stepper.cache))
    return found


def assert_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, **ROUNDING)


@pytest.mark.parametrize("case", FAMILIES)
def test_a_family_on_ranks_equals_the_whole(case: str, tmp_path: Path) -> None:
    save_model(case, tmp_path, **served(case))
    whole, _ = load_model(tmp_path, dtype=torch.float32, device="cpu")
    expected = steps(whole)
    for layout in LAYOUTS.values():
        assert_close(steps(sharded(tmp_path, layout)), expected)


@pytest.mark.parametrize("case", ["llama", "qwen3-moe", "gpt2", "phi3"])
@pytest.mark.parametrize("kind", ["F32", "F16", "Q4_0", "Q8_0"])
def test_a_gguf_file_on_ranks_equals_the_whole(case: str, kind: str, tmp_path: Path) -> None:
    save_model(case, tmp_path, **served(case))
    path = tmp_path / "model.gguf"
    save_gguf(tmp_path, case, path, (kind,))
    whole, _ = load_model(path, dtype=torch.float32, device="cpu")
    assert_close(steps(sharded(path, LAYOUTS["2 x 2"])), steps(whole))


def test_a_quantised_checkpoint_on_ranks_equals_the_whole(tmp_path: Path) -> None:
    save_model("llama", tmp_path / "plain", **served("llama", intermediate_size=128))
    save_quantised(tmp_path / "plain", "GPTQ", tmp_path / "gptq")
    whole, _ = load_model(tmp_path / "gptq", dtype=torch.float32, device="cpu")
    assert_close(steps(sharded(tmp_path / "gptq", LAYOUTS["2 x 2"])), steps(whole))


@pytest.mark.parametrize(
    ("case", "weights"),
    [
        ("llama", "int8"),
        ("mixtral", "int8"),
        ("llama", "int4"),
        ("mixtral", "int4"),
        ("llama", "fp8"),
        ("llama", "w8a8"),
    ],
)
def test_matrices_that_are_kept_in_few_bits_are_the_same_on_ranks(
    case: str, weights: KeptWeights, tmp_path: Path
) -> None:
    # Shares of inputs are whole groups.
    save_model(case, tmp_path, **served(case, intermediate_size=128))
    opened = open_model(tmp_path)
    whole, _ = opened.load_kept(weights, torch.float32, "cpu")
    expected = steps(whole)
    found = steps(sharded(tmp_path, LAYOUTS["2 x 2"], weights=weights))
    if weights in ("int8", "int4"):
        return assert_close(found, expected)
    # Activations are rounded by the largest of a row, of which a rank has a part: that is no worse.
    exact = steps(load_model(tmp_path, dtype=torch.float32, device="cpu")[0])
    for ours, theirs, right in zip(found, expected, exact, strict=True):
        assert (ours - right).abs().mean() < 1.3 * (theirs - right).abs().mean()
    return None


@pytest.mark.parametrize("form", ["GPTQ", "AWQ"])
def test_a_quantised_checkpoint_keeps_its_levels_on_ranks(form: str, tmp_path: Path) -> None:
    save_model("llama", tmp_path / "plain", **served("llama", intermediate_size=128))
    save_quantised(tmp_path / "plain", form, tmp_path / "few")
    whole, _ = open_model(tmp_path / "few").load_kept("auto", torch.float32, "cpu")
    ranks = sharded(tmp_path / "few", LAYOUTS["2 x 1"], weights="auto")
    assert any(isinstance(each, GroupedMatrix) for each in ranks.shards[1].model.matrices())
    assert_close(steps(ranks), steps(whole))


@pytest.mark.parametrize("case", ["llama", "mixtral"])
def test_kv_heads_of_which_there_are_fewer_than_ranks_are_on_several(
    case: str, tmp_path: Path
) -> None:
    save_model(case, tmp_path, **served(case))
    whole, _ = load_model(tmp_path, dtype=torch.float32, device="cpu")
    ranks = sharded(tmp_path, Layout(4, 1))
    assert [shard.model.config.kv_heads for shard in ranks.shards] == [1, 1, 1, 1]
    assert_close(steps(ranks), steps(whole))


def random_adapter(model: Model, seed: int) -> dict[str, tuple[LowRankPart, ...]]:
    """An adapter of all projections, that of merged ones in parts that ranks cut in two."""
    generator = torch.Generator().manual_seed(seed)
    parts = {}
    for path, module in model.named_modules():
        if not isinstance(module, Linear | MergedLinear) or not path.startswith("layers"):
            continue
        outputs, inputs = module.weight.shape
        sizes = module.sizes.values() if isinstance(module, MergedLinear) else [outputs]
        own, first = [], 0
        for size in sizes:
            down, up = (
                torch.randn(3, inputs, generator=generator),
                torch.randn(size, 3, generator=generator),
            )
            own.append(LowRankPart(down * 0.1, up * 0.1, first))
            first += size
        parts[path] = tuple(own)
    return parts


@pytest.mark.parametrize("case", ["llama", "phi3", "gpt2"])
def test_adapters_on_ranks_change_what_they_change_of_the_whole(case: str, tmp_path: Path) -> None:
    save_model(case, tmp_path, **served(case))
    whole, _ = load_model(tmp_path, dtype=torch.float32, device="cpu")
    ranks = sharded(tmp_path, LAYOUTS["2 x 2"])
    plain = steps(whole)
    for model in (whole, *(shard.model for shard in ranks.shards)):
        model.take_adapters(max_adapters=2, max_rank=3)
    for slot in (0, 1):
        adapter = random_adapter(whole, slot)
        whole.set_adapter(slot, whole.prepare_adapter(adapter))
        ranks.set_adapter(slot, adapter)
    expected = steps(whole, {0: 1, 1: -1})
    assert (expected[0] - plain[0]).abs().max() > 0.1
    assert_close(steps(ranks, {0: 1, 1: -1}), expected)
    assert_close(steps(ranks, {0: 0, 1: 1}), steps(whole, {0: 0, 1: 1}))


def test_each_rank_has_its_share_of_weights_and_cache_and_no_more(tmp_path: Path) -> None:
    # Wide enough for norms, which are on every rank, not to count.
    save_model("llama", tmp_path, **served("llama", hidden_size=128, intermediate_size=512))
    whole = sum(
        each.nbytes
        for each in load_model(tmp_path, dtype=torch.float32, device="cpu")[0].parameters()
    )
    for layout in LAYOUTS.values():
        ranks = sharded(tmp_path, layout, cuts=(2,))
        sizes = ranks.bytes_of(lambda shard: shard.model.parameters())
        assert sum(sizes) < 1.05 * whole
        assert max(sizes) < 1.15 * whole / layout.num_ranks
        caches = [cache.layers[-1].keys.untyped_storage().nbytes() for cache in ranks.caches]
        assert set(caches) == {
            2 * 4 * (NUM_BLOCKS + 1) * BLOCK_SIZE * 2 * 16 * 4 // layout.num_ranks
        }


def test_a_rank_reads_its_share_of_a_gguf_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Halves of all sizes are whole blocks.
    save_model("llama", tmp_path, **served("llama", intermediate_size=128))
    path = tmp_path / "model.gguf"
    save_gguf(tmp_path, "llama", path, ("Q8_0",))
    opened = open_model(path)
    read_bytes = 0

    def counting(raw: np.ndarray, *rest: Any) -> Tensor:
        nonlocal read_bytes
        read_bytes += raw.nbytes
        return dequantize(raw, *rest)

    monkeypatch.setattr(gguf_checkpoint, "dequantize", counting)
    place, config = Layout(2, 2).place(3), opened.config
    outline = outline_shard(config, place, range(2, 4), torch.float32)
    load_shard(outline, config, place, opened.checkpoint, torch.float32, "cpu")
    assert 0 < read_bytes < 1.1 * opened.checkpoint.num_bytes / 4
