"""What is in the KV cache is not computed again, and is shared with nobody who must not see it."""

from __future__ import annotations

import pytest

from services.engine.core.engine import EngineCore
from services.engine.core.messages import (
    Delta,
    FinishReason,
    Sampling,
    SequenceRequest,
    Stopping,
)
from services.engine.core.model_config import SparseAttention
from tests.fakes.engines import make_engine, reference_output
from tests.fakes.hash_model import NAN_TOKEN_ID, Windows

CONTEXT_TOKENS = 128


def engine(**limits: int) -> EngineCore:
    return make_engine(**({"num_blocks": 32, "max_batch_tokens": 64} | limits))


def request(
    sequence_id: int,
    prompt: list[int],
    max_tokens: int = 6,
    *,
    seed: int = 0,
    tenant: str = "",
    cache_salt: bytes = b"",
) -> SequenceRequest:
    return SequenceRequest(
        sequence_id,
        prompt,
        Sampling(seed=seed),
        Stopping(max_tokens=max_tokens, ignore_eos=True),
        tenant=tenant,
        cache_salt=cache_salt,
    )


def finish(core: EngineCore, *requests: SequenceRequest) -> list[int]:
    """Run the requests to their ends, check their answers; returns cached tokens of each."""
    if requests:
        core.add(list(requests))
    ends: dict[int, Delta] = {}
    outputs: dict[int, list[int]] = {}
    while core.has_work:
        for delta in core.step().deltas:
            outputs.setdefault(delta.sequence_id, []).extend(delta.token_ids)
            if delta.finish is not None:
                ends[delta.sequence_id] = delta
        core.check_integrity()
    cached = []
    for each in requests:
        assert outputs[each.sequence_id] == reference_output(each, CONTEXT_TOKENS)
        timing = ends[each.sequence_id].timing
        assert timing is not None
        cached.append(timing.cached_prompt_tokens)
    return cached


PROMPT = list(range(3, 21))  # 18 tokens: 4 full blocks and a half


def test_a_prefix_is_computed_once() -> None:
    core = engine()
    assert finish(core, request(0, PROMPT)) == [0]
    assert core.load().prompt_tokens == 18
    assert finish(core, request(1, [*PROMPT[:12], 40, 41])) == [12]
    assert core.load().prompt_tokens == 18 + 2
    assert core.load().cache_hit_tokens == 12
    assert core.load().cache_queried_tokens == 18 + 14


def test_of_a_prompt_known_as_a_whole_one_token_is_computed() -> None:
    core = engine()
    whole_blocks = PROMPT[:16]
    finish(core, request(0, whole_blocks, seed=1))
    assert finish(core, request(1, whole_blocks, seed=2)) == [15]
    assert core.load().prompt_tokens == 16 + 1


def test_the_next_turn_of_a_chat_finds_the_answer_of_the_last() -> None:
    core = engine()
    first = request(0, PROMPT, max_tokens=15)
    finish(core, first)
    answer = reference_output(first, CONTEXT_TOKENS)
    # Prompt and answer, but for the last token, which nobody has computed: 32 tokens, 8 blocks.
    assert finish(core, request(1, [*PROMPT, *answer, 4, 5, 6])) == [32]


@pytest.mark.parametrize("other", [{"tenant": "b"}, {"cache_salt": b"x"}, {"tenant": ""}])
def test_nobody_hits_the_blocks_of_another_tenant_or_salt(other: dict[str, str]) -> None:
    core = engine()
    finish(core, request(0, PROMPT, tenant="a"))
    fields = {"tenant": "a"} | other
    assert finish(core, request(1, PROMPT, **fields)) == [0]  # type: ignore[arg-type]


def test_tenant_and_salt_do_not_run_into_each_other() -> None:
    core = engine()
    finish(core, request(0, PROMPT, tenant="ab", cache_salt=b"c"))
    assert finish(core, request(1, PROMPT, tenant="a", cache_salt=b"bc")) == [0]


def test_the_prefix_used_last_stays_longest() -> None:
    core = engine(num_blocks=16, max_batch_tokens=64)
    old, used, new = ([first] * 17 for first in (1, 2, 3))
    finish(core, request(0, old, 2))
    finish(core, request(1, used, 2))
    finish(core, request(2, [*used[:-1], 7], 2))
    finish(core, request(3, [4] * 32, 2))  # takes what nothing is known of, and the oldest
    assert finish(core, request(4, used, 2)) == [16]
    assert finish(core, request(5, new, 2)) == [0]
    assert finish(core, request(6, old, 2))[0] < 16


def test_choices_of_a_request_compute_its_prompt_once() -> None:
    core = engine()
    choices = [request(number, PROMPT, seed=number) for number in range(4)]
    assert finish(core, *choices) == [0, 17, 17, 17]
    assert core.load().prompt_tokens == 18 + 3


def test_choices_share_the_full_blocks_of_their_prompt() -> None:
    core = engine()
    core.add([request(number, PROMPT, seed=number) for number in range(4)])
    core.step()
    core.step()
    # Four in common, and of the half full one each its own copy.
    assert core.load().running_sequences == 4
    assert core.load().used_blocks == 4 + 4


def test_a_burst_with_a_common_beginning_computes_it_once() -> None:
    core = engine(max_batch_tokens=16)
    burst = [request(number, [*range(3, 35), 40 + number, 41]) for number in range(4)]
    assert finish(core, *burst) == [0, 32, 32, 32]
    assert core.load().prompt_tokens == 34 + 3 * 2


def test_a_short_prompt_does_not_wait_for_a_long_one_that_begins_alike() -> None:
    core = engine(max_batch_tokens=16)
    core.add([request(0, [*range(3, 43)])])
    core.step()
    core.add([request(1, [3, 4, 5, 6, 50, 51])])
    assert core.load().waiting_sequences == 1
    while core.load().running_sequences < 2:
        core.step()
    assert core.load().prompt_tokens < 40 + 6


def test_who_waited_for_a_prefill_that_is_aborted_computes_it() -> None:
    core = engine(max_batch_tokens=8)
    core.add([request(number, PROMPT, seed=number) for number in range(3)])
    core.step()
    core.abort([0])
    core.check_integrity()
    followers = [request(number, PROMPT, seed=number) for number in (1, 2)]
    outputs: dict[int, list[int]] = {1: [], 2: []}
    while core.has_work:
        for delta in core.step().deltas:
            outputs[delta.sequence_id].extend(delta.token_ids)
        core.check_integrity()
    for each in followers:
        assert outputs[each.sequence_id] == reference_output(each, CONTEXT_TOKENS)


def test_a_failed_sequence_publishes_nothing() -> None:
    core = engine(max_batch_tokens=16)
    poisoned = [*PROMPT, *PROMPT, NAN_TOKEN_ID]
    core.add([request(0, poisoned)])
    reasons = []
    while core.has_work:
        reasons += [delta.finish.reason for delta in core.step().deltas if delta.finish]
        core.check_integrity()
    assert reasons == [FinishReason.ERROR]
    assert finish(core, request(1, PROMPT)) == [0]


def test_without_the_cache_nothing_is_found() -> None:
    core = make_engine(num_blocks=32, max_batch_tokens=64, prefix_cache=False)
    finish(core, request(0, PROMPT))
    assert finish(core, request(1, PROMPT)) == [0]
    # Choices of one request still share their prompt.
    assert finish(core, *(request(number, PROMPT, seed=number) for number in (2, 3))) == [0, 17]


SPARSE = SparseAttention(5, 6)
WINDOWED = [(None, 8), (8,), (None, 5, 5), (SPARSE,), (SPARSE, 8)]


def windowed(windows: Windows, **limits: int) -> EngineCore:
    return make_engine(windows=windows, **({"num_blocks": 96, "max_batch_tokens": 8} | limits))


def finish_windowed(core: EngineCore, windows: Windows, *requests: SequenceRequest) -> list[int]:
    core.add(list(requests))
    outputs: dict[int, list[int]] = {}
    cached = []
    while core.has_work:
        for delta in core.step().deltas:
            outputs.setdefault(delta.sequence_id, []).extend(delta.token_ids)
            if delta.timing is not None and delta.finish is not None:
                cached.append(delta.timing.cached_prompt_tokens)
        core.check_integrity()
    for each in requests:
        assert outputs[each.sequence_id] == reference_output(each, CONTEXT_TOKENS, windows)
    return cached


@pytest.mark.parametrize("windows", WINDOWED)
def test_what_slid_out_of_a_window_while_a_prompt_was_computed_is_found(windows: Windows) -> None:
    core = windowed(windows)
    system_prompt = [*range(3, 43)]
    first = request(0, [*system_prompt, *range(20)])
    assert finish_windowed(core, windows, first) == [0]
    # The window of what follows lies in the middle of what was computed.
    assert finish_windowed(core, windows, request(1, [*system_prompt, 50, 51, 52])) == [40]
    answer = reference_output(first, CONTEXT_TOKENS, windows)
    turn = [*first.prompt_token_ids, *answer, 7]
    assert finish_windowed(core, windows, request(2, turn)) == [(60 + 5) // 4 * 4]


@pytest.mark.parametrize("windows", WINDOWED)
def test_choices_share_their_prompt_where_layers_have_windows(windows: Windows) -> None:
    core = windowed(windows, max_batch_tokens=64)
    choices = [request(number, PROMPT, seed=number) for number in range(4)]
    assert sorted(finish_windowed(core, windows, *choices)) == [0, 17, 17, 17]


@pytest.mark.parametrize("windows", WINDOWED)
def test_what_a_failed_sequence_let_slide_is_not_found(windows: Windows) -> None:
    core = windowed(windows)
    core.add([request(0, [*PROMPT, *PROMPT, NAN_TOKEN_ID])])
    reasons = []
    while core.has_work:
        reasons += [delta.finish.reason for delta in core.step().deltas if delta.finish]
        core.check_integrity()
    assert reasons == [FinishReason.ERROR]
    assert finish_windowed(core, windows, request(1, PROMPT)) == [0]
