"""What a preempted sequence has computed is kept beside the cache, and not computed again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from services.engine.core.engine import EngineCore
from services.engine.core.errors import StartupError
from services.engine.core.kv_cache import KVCache
from services.engine.core.messages import SequenceRequest, Stopping
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine
from tests.fakes.decoder_families import save_model, served
from tests.fakes.engines import make_engine, reference_output
from tests.fakes.hash_model import HashStore


def request(sequence_id: int, prompt: list[int], max_tokens: int = 14) -> SequenceRequest:
    return SequenceRequest(
        sequence_id, prompt, stopping=Stopping(max_tokens=max_tokens, ignore_eos=True)
    )


def run(engine: EngineCore) -> dict[int, list[int]]:
    answers: dict[int, list[int]] = {}
    while engine.has_work:
        for delta in engine.step().deltas:
            answers.setdefault(delta.sequence_id, []).extend(delta.token_ids)
        engine.check_integrity()
    return answers


def store_of(engine: EngineCore) -> HashStore:
    store = engine._scheduler.block_tables.store
    assert isinstance(store, HashStore)
    return store


@pytest.mark.parametrize("overlaps", [False, True])
@pytest.mark.parametrize("prefix_cache", [False, True])
def test_it_computes_each_token_once(overlaps: bool, prefix_cache: bool) -> None:
    requests = [request(index, [index] * 9) for index in range(3)]
    limits = {"num_blocks": 10, "prefix_cache": prefix_cache, "overlaps": overlaps}
    engine = make_engine(**limits, saved_blocks=64)  # type: ignore[arg-type]
    engine.add(requests)
    answers = run(engine)
    for each in requests:
        assert answers[each.sequence_id] == reference_output(each, 40)
    load = engine.load()
    assert load.preemptions > 0
    assert load.prompt_tokens == sum(len(each.prompt_token_ids) for each in requests)
    assert store_of(engine).restored_blocks > 0
    assert store_of(engine).is_empty
    again = make_engine(**limits)  # type: ignore[arg-type]
    again.add(requests)
    assert run(again) == answers
    assert again.load().preemptions > 0


def test_what_finds_no_room_is_computed_again() -> None:
    requests = [request(index, [index] * 9) for index in range(3)]
    engine = make_engine(num_blocks=10, prefix_cache=False, saved_blocks=1)
    engine.add(requests)
    answers = run(engine)
    assert engine.load().preemptions > 0
    assert store_of(engine).restored_blocks == 0
    for each in requests:
        assert answers[each.sequence_id] == reference_output(each, 40)


def test_a_sequence_that_is_aborted_while_it_waits_leaves_nothing_behind() -> None:
    engine = make_engine(num_blocks=10, saved_blocks=64)
    engine.add([request(index, [index] * 9) for index in range(3)])
    while engine.load().preemptions == 0:
        engine.step()
    assert not store_of(engine).is_empty
    engine.abort([0, 1, 2])
    assert store_of(engine).is_empty


def test_a_model_goes_on_where_it_was_preempted(tmp_path: Path) -> None:
    save_model("llama", tmp_path, max_position_embeddings=160)

    def answers(**fields: int) -> tuple[dict[int, list[int]], EngineCore]:
        core, _ = build_engine(
            CoreSettings(
                model_path=str(tmp_path),
                device="cpu",
                threads=1,
                dtype="float32",
                cpu_kernels="off",
                # Fourteen blocks, of which each sequence needs six in the end.
                kv_cache_memory_bytes=14 * KVCache.bytes_per_block(4, 16, 2, 8, torch.float32),
                **fields,
            )
        )
        assert isinstance(core, EngineCore)
        core.add([request(index, [9 + index] * 33, max_tokens=60) for index in range(3)])
        return run(core), core

    swapping, core = answers(swap_memory_bytes=1 << 20)
    assert swapping == answers()[0]
    load = core.load()
    assert load.preemptions > 0
    assert load.prompt_tokens == 99


def test_the_native_kernels_compute_again_what_was_preempted(tmp_path: Path) -> None:
    save_model("llama", tmp_path, **served("llama"))
    settings = CoreSettings(model_path=str(tmp_path), device="cpu", swap_memory_bytes=1 << 20)
    with pytest.raises(StartupError, match="set swap_bytes to 0"):
        build_engine(settings)
