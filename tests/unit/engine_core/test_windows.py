"""Models whose layers have windows answer as transformers does far beyond them, whatever company
they keep, and take the memory of what they see."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.core.engine import EngineCore
from services.engine.core.kernels.cpu import library
from services.engine.core.kernels.cpu.kv_cache import KvFormat, PackedKVCache
from services.engine.core.kv_cache import KVCache
from services.engine.core.layer_groups import LayerGroups
from services.engine.core.messages import ModelFacts, Sampling, SequenceRequest, Stopping
from services.engine.core.model_config import SparseAttention
from services.engine.core.models.loader import open_model
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine
from tests.fakes.decoder_families import VOCAB_SIZE, WINDOW, save_model
from tests.fakes.native_steps import Sequences
from tests.fakes.paged_step import libraries
from tests.fakes.speculators import KnowingSpeculator
from tests.unit.engine_models.conftest import BLOCK_SIZE as STEPPER_BLOCK_SIZE
from tests.unit.engine_models.conftest import Stepper

BLOCK_SIZE = 16
CONTEXT_TOKENS = 512
# Sizes that the native kernels serve.
SERVED = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT_TOKENS,
}
# What a case takes beside them, and how many groups its layers make.
CASES: dict[str, tuple[dict[str, Any], int]] = {
    "mistral, windowed": ({"head_dim": 16}, 1),
    "phi3, windowed": ({}, 1),
    "qwen2, windowed from a layer on": ({}, 2),
    "gemma2": ({}, 2),
    "gemma3": ({}, 7),
}
COMPANY: dict[str, dict[str, Any]] = {
    "all at once": {},
    "in small chunks": {"max_batch_tokens": 23, "max_running_sequences": 23},
    "preempted": {"num_rows": 33, "max_batch_tokens": 48, "max_running_sequences": 2},
    "each step planned ahead": {"plan_ahead": "on"},
}
needs_kernels = pytest.mark.skipif(not libraries(), reason="no native kernels on this machine")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models gain nothing from threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    library.activate("off")


@pytest.fixture(scope="module", params=CASES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Any]:
    path = tmp_path_factory.mktemp("model")
    return request.param, path, save_model(request.param, path, **SERVED | CASES[request.param][0])


def build(
    path: Path, *, native: bool, num_rows: int = 256, **fields: Any
) -> tuple[EngineCore, ModelFacts]:
    """An engine whose KV cache holds so many rows of blocks."""
    config = open_model(path).config
    groups = LayerGroups.of(config)
    sizes = (groups.layers_per_block, BLOCK_SIZE, config.kv_heads, config.head_dim)
    block_bytes = PackedKVCache.bytes_per_block(*sizes, KvFormat.BF16)
    if not native:
        block_bytes = KVCache.bytes_per_block(*sizes, torch.float32)
    core, facts = build_engine(
        CoreSettings(
            model_path=str(path),
            device="cpu",
            threads=1,
            dtype="auto" if native else "float32",
            cpu_kernels="auto" if native else "off",
            block_size=BLOCK_SIZE,
            kv_cache_memory_bytes=num_rows * len(groups.windows) * block_bytes,
            **fields,
        )
    )
    assert isinstance(core, EngineCore)
    assert ("step" in facts.kernels) == native
    return core, facts


def requests() -> list[SequenceRequest]:
    """Prompts of up to forty windows, some of which begin alike, and choices of one prompt."""
    chance = random.Random(1)

    def text(length: int) -> list[int]:
        return [chance.randrange(3, VOCAB_SIZE) for _ in range(length)]

    common = text(130)
    prompts = [text(5), text(40 * WINDOW), common + text(70), common + text(9), common[:129]]
    prompts += [text(7) * 20, common[:64] + text(100)]
    prompts += [prompts[2]] * 2
    return [
        SequenceRequest(
            number,
            prompt,
            Sampling(temperature=0.0),
            Stopping(max_tokens=20 + 2 * number, ignore_eos=True),
            priority=number // 3,
        )
        for number, prompt in enumerate(prompts)
    ]


def answers(core: EngineCore, made: list[SequenceRequest], batch: int = 3) -> dict[int, list[int]]:
    """What each request is answered, where so many of them arrive every few steps."""
    found: dict[int, list[int]] = {}
    waiting = [made[begin : begin + batch] for begin in range(0, len(made), batch)]
    step = 0
    while waiting or core.has_work:
        if waiting and step % 6 == 0:
            core.add(waiting.pop(0))
        step += 1
        if not core.has_work:
            continue
        for delta in core.step().deltas:
            found.setdefault(delta.sequence_id, []).extend(delta.token_ids)
            assert delta.finish is None or not delta.finish.error
        core.check_integrity()
    assert core.load().used_blocks == 0
    return found


@pytest.fixture(scope="module")
def expected(checkpoint: tuple[str, Path, Any]) -> dict[int, list[int]]:
    """What transformers answers."""
    _, _, reference = checkpoint
    found = {}
    for request in requests():
        prompt = torch.tensor([request.prompt_token_ids])
        generated = reference.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.stopping.max_tokens,
            do_sample=False,
            eos_token_id=None,
        )
        found[request.sequence_id] = generated[0, prompt.shape[1] :].tolist()
    return found


@pytest.mark.parametrize("fields", COMPANY.values(), ids=COMPANY.keys())
def test_on_torch_answers_are_those_of_transformers(
    checkpoint: tuple[str, Path, Any], expected: dict[int, list[int]], fields: dict[str, Any]
) -> None:
    case, path, _ = checkpoint
    core, facts = build(path, native=False, **fields)
    core._scheduler._speculator = KnowingSpeculator(expected, VOCAB_SIZE)
    assert len(core._scheduler.block_tables.shape.windows) == CASES[case][1]
    assert facts.max_context_tokens == CONTEXT_TOKENS

    assert answers(core, requests()) == expected

    load = core.load()
    assert load.cache_hit_tokens > 0
    assert load.accepted_draft_tokens > 0
    assert (load.preemptions > 0) == ("num_rows" in fields)


@needs_kernels
@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_on_native_kernels_answers_are_those_of_blocks_for_all(
    checkpoint: tuple[str, Path, Any], cache: str
) -> None:
    _, path, _ = checkpoint
    made = requests()
    kv_format = KvFormat.INT8 if cache == "int8" else KvFormat.BF16
    # Each alone, token by token, in a cache that keeps all.
    alone: dict[int, list[int]] = {}
    for request in made:
        sequences = Sequences(libraries()[0], path, kv_format=kv_format)
        new, own = request.prompt_token_ids, alone.setdefault(request.sequence_id, [])
        for _ in range(request.stopping.max_tokens or 0):
            own.append(int(sequences.step({0: new})[0][-1].argmax()))
            new = own[-1:]
    for fields in COMPANY.values():
        core, _ = build(path, native=True, kv_cache_format=cache, **fields)
        assert answers(core, made) == alone
        assert core.load().cache_hit_tokens > 0


SPARSE = SparseAttention(window=40, global_tokens=20)


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def part_of_context(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[int, list[int]]]:
    """A model, and what it answers to each request alone where it sees a part of its context, in a
    cache that keeps all."""
    path = tmp_path_factory.mktemp("model")
    save_model(request.param, path, **SERVED)
    model = open_model(path, sparse_attention=SPARSE).load(torch.float32, "cpu")
    alone: dict[int, list[int]] = {}
    for each in requests():
        stepper = Stepper(model, num_blocks=CONTEXT_TOKENS // STEPPER_BLOCK_SIZE)
        new, own = list(each.prompt_token_ids), alone.setdefault(each.sequence_id, [])
        for _ in range(each.stopping.max_tokens or 0):
            own.append(int(stepper.step({"it": new})["it"][-1].argmax()))
            new = own[-1:]
    return path, alone


@pytest.mark.parametrize("fields", COMPANY.values(), ids=COMPANY.keys())
def test_a_part_of_the_context_is_seen_the_same_where_what_lies_between_is_given_back(
    part_of_context: tuple[Path, dict[int, list[int]]], fields: dict[str, Any]
) -> None:
    path, alone = part_of_context
    core, facts = build(path, native=False, sparse_attention=SPARSE, **fields)
    core._scheduler._speculator = KnowingSpeculator(alone, VOCAB_SIZE)
    assert facts.max_context_tokens == CONTEXT_TOKENS
    assert answers(core, requests()) == alone
    assert core.load().cache_hit_tokens > 0


def used_by(core: EngineCore, prompt_tokens: int, max_tokens: int) -> int:
    """The most blocks that a request takes at a time."""
    prompt = [7 + number % 50 for number in range(prompt_tokens)]
    core.add(
        [
            SequenceRequest(
                0,
                prompt,
                Sampling(temperature=0.0),
                Stopping(max_tokens=max_tokens, ignore_eos=True),
            )
        ]
    )
    most = 0
    while core.has_work:
        core.step()
        core.check_integrity()
        most = max(most, core.load().used_blocks)
    assert core.load().sampled_tokens == max_tokens
    return most


@pytest.mark.parametrize(
    "native", [False, pytest.param(True, marks=needs_kernels)], ids=["torch", "native"]
)
def test_a_context_takes_its_window_and_a_chunk_where_all_layers_have_one(
    tmp_path: Path, native: bool
) -> None:
    window, chunk, context = 48, 64, 2048
    fields = SERVED | {"head_dim": 16, "max_position_embeddings": context}
    save_model("mistral, windowed", tmp_path, **fields, sliding_window=window)
    # All of its blocks hold a tenth of the context.
    core, facts = build(
        tmp_path, native=native, num_rows=12, max_batch_tokens=chunk, max_running_sequences=1
    )
    assert facts.num_blocks == 12
    assert facts.max_context_tokens == context
    most = used_by(core, prompt_tokens=1500, max_tokens=400)
    assert most <= -(-(window + chunk) // BLOCK_SIZE) + 1


@pytest.mark.parametrize(
    "native", [False, pytest.param(True, marks=needs_kernels)], ids=["torch", "native"]
)
def test_a_context_takes_a_sixth_and_windows_where_one_layer_of_six_sees_all(
    tmp_path: Path, native: bool
) -> None:
    chunk, context = 32, 2048
    fields = SERVED | {"max_position_embeddings": context, "num_hidden_layers": 6}
    save_model("gemma3", tmp_path, **fields, sliding_window=32)
    core, facts = build(
        tmp_path, native=native, num_rows=128, max_batch_tokens=chunk, max_running_sequences=2
    )
    rows_of_windows = -(-(32 + chunk) // BLOCK_SIZE) + 1
    most = used_by(core, prompt_tokens=1900, max_tokens=100)
    assert most <= 2000 // BLOCK_SIZE + 5 * rows_of_windows
    # A block of one layer takes a sixth of what one of all six did.
    assert facts.kv_cache_memory_bytes == facts.num_blocks * _bytes_of_a_layer(native)


def _bytes_of_a_layer(native: bool) -> int:
    return 2 * BLOCK_SIZE * 2 * 16 * (2 if native else 4)


def test_a_part_of_the_context_takes_its_beginning_its_window_and_a_chunk(tmp_path: Path) -> None:
    chunk, context = 64, 2048
    save_model("llama", tmp_path, **SERVED | {"max_position_embeddings": context})
    limits = {"max_batch_tokens": chunk, "max_running_sequences": 1}
    core, facts = build(tmp_path, native=False, num_rows=12, sparse_attention=SPARSE, **limits)
    assert facts.max_context_tokens == context
    most = used_by(core, prompt_tokens=1500, max_tokens=400)
    beginning = -(-SPARSE.global_tokens // BLOCK_SIZE)
    assert most <= beginning + -(-(SPARSE.window + chunk) // BLOCK_SIZE) + 1
