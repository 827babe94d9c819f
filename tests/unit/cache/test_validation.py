"""The cache takes only whole, unfiltered answers, and says which field is wrong."""

from __future__ import annotations

import pytest
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st

from meshserve.v1 import cache_pb2, types_pb2
from services.cache.leases import NONCE_BYTES, LeaseToken
from services.cache.validation import (
    check_answer,
    checked_duration_ms,
    checked_key,
    checked_lease_token,
)
from services.runtime.errors import Reason, ServiceError


def answer(*ends: tuple[int, int], chunks: tuple[int, ...] = ()) -> cache_pb2.CachedAnswer:
    return cache_pb2.CachedAnswer(
        ends=[cache_pb2.CachedEnd(index=i, finish_reason=reason) for i, reason in ends],
        chunks=[cache_pb2.CachedChunk(index=i, text="x") for i in chunks],
    )


def violated_field(call, *args, **kwargs) -> str:
    with pytest.raises(ServiceError) as caught:
        call(*args, **kwargs)
    assert caught.value.reason is Reason.INVALID_FIELD
    return caught.value.field_violations[0][0]


@pytest.mark.parametrize(
    "reason",
    [
        types_pb2.FINISH_REASON_STOP,
        types_pb2.FINISH_REASON_LENGTH,
        types_pb2.FINISH_REASON_TOOL_CALLS,
    ],
)
def test_finished_answers_are_taken(reason):
    check_answer(answer((1, reason), (0, reason), chunks=(0, 1, 0)))
    check_answer(answer((0, reason)))


@pytest.mark.parametrize(
    "reason",
    [
        types_pb2.FINISH_REASON_UNSPECIFIED,
        types_pb2.FINISH_REASON_CONTENT_FILTER,
        types_pb2.FINISH_REASON_ABORTED,
        99,
    ],
)
def test_one_choice_that_did_not_finish_spoils_the_answer(reason):
    spoiled = answer((0, types_pb2.FINISH_REASON_STOP), (1, reason))
    assert violated_field(check_answer, spoiled) == "answer.ends[1].finish_reason"


def test_blocked_answers_are_refused():
    stop = types_pb2.FINISH_REASON_STOP
    blocked = types_pb2.SafetyVerdict(action=types_pb2.SAFETY_ACTION_BLOCK)
    completion, prompt = answer((0, stop)), answer((0, stop))
    completion.ends[0].safety.CopyFrom(blocked)
    prompt.prompt_safety.CopyFrom(blocked)
    assert violated_field(check_answer, completion) == "answer.ends[0].safety.action"
    assert violated_field(check_answer, prompt) == "answer.prompt_safety.action"


def test_flagged_and_redacted_answers_are_taken():
    for action in (types_pb2.SAFETY_ACTION_FLAG, types_pb2.SAFETY_ACTION_REDACT):
        flagged = answer((0, types_pb2.FINISH_REASON_STOP))
        flagged.ends[0].safety.action = action
        check_answer(flagged)


def test_chunks_and_ends_must_match():
    stop = types_pb2.FINISH_REASON_STOP
    assert violated_field(check_answer, answer()) == "answer.ends"
    assert violated_field(check_answer, answer((1, stop))) == "answer.ends[0].index"
    assert violated_field(check_answer, answer((0, stop), (0, stop))) == "answer.ends[1].index"
    unended = answer((0, stop), chunks=(0, 1))
    assert violated_field(check_answer, unended) == "answer.chunks[1].index"


def test_keys_need_a_model_and_a_request():
    assert violated_field(checked_key, cache_pb2.CacheKey(request=b"r")) == "key.model"
    assert violated_field(checked_key, cache_pb2.CacheKey(model="m")) == "key.request"
    checked_key(cache_pb2.CacheKey(model="m", request=b"r"))


@given(st.integers(0, 10_000), st.integers(0, 999_999_999))
def test_durations_are_rounded_up_to_milliseconds(seconds, nanos):
    total_ms = checked_duration_ms(
        Duration(seconds=seconds, nanos=nanos), "wait", at_least_ms=0, at_most_s=20_000
    )
    exact_ns = seconds * 10**9 + nanos
    assert 0 <= total_ms * 10**6 - exact_ns < 10**6


@pytest.mark.parametrize(
    "duration",
    [
        Duration(seconds=-1),
        Duration(nanos=-1_000_000),
        Duration(seconds=1, nanos=-1),
        Duration(nanos=2_000_000_000),
        Duration(seconds=61),
        Duration(seconds=2**62),
        Duration(),
    ],
)
def test_senseless_durations_are_refused(duration):
    assert (
        violated_field(checked_duration_ms, duration, "ttl", at_least_ms=1, at_most_s=60) == "ttl"
    )


@given(
    st.binary(min_size=16, max_size=16), st.integers(0, 2**63), st.binary(min_size=24, max_size=24)
)
def test_a_lease_token_survives_its_text(nonce, issued_us, stamp):
    token = LeaseToken(nonce, issued_us, stamp)
    assert len(nonce) == NONCE_BYTES
    assert checked_lease_token(str(token)) == token


@given(st.text(max_size=80))
def test_other_text_is_not_a_lease_token(text):
    assert violated_field(checked_lease_token, text) == "lease_token"
