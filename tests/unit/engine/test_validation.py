"""Requests that cannot be served are told which field is wrong, and what would be right."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from meshserve.v1 import engine_pb2, types_pb2
from services.engine.core.logits_processors import processor_names
from services.engine.core.messages import ModelFacts, SequenceRequest
from services.engine.validation import default_sampling, sequence_requests
from services.runtime.errors import Reason, ServiceError
from tests.fakes import logits_plugins

VOCAB_SIZE = 64
CONTEXT_TOKENS = 256
FACTS = ModelFacts(
    architecture="hash",
    num_layers=1,
    num_parameters=1,
    vocab_size=VOCAB_SIZE,
    max_context_tokens=CONTEXT_TOKENS,
    eos_token_ids=(2,),
    dtype="float32",
    device="cpu",
    block_size=4,
    num_blocks=64,
    kv_cache_memory_bytes=0,
    load_time_s=0.0,
)


def generate_request(prompt: list[int], **fields: Any) -> engine_pb2.EngineServiceGenerateRequest:
    fields.setdefault("request_id", "r")
    return engine_pb2.EngineServiceGenerateRequest(prompt=types_pb2.TokenIds(ids=prompt), **fields)


def sequences(request: engine_pb2.EngineServiceGenerateRequest) -> list[SequenceRequest]:
    return sequence_requests(request, FACTS, itertools.count().__next__)


def failure(request: engine_pb2.EngineServiceGenerateRequest) -> ServiceError:
    with pytest.raises(ServiceError) as raised:
        sequences(request)
    return raised.value


def test_absent_numbers_mean_their_documented_defaults() -> None:
    (sequence,) = sequences(generate_request([1, 2]))
    sampling = sequence.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (1, 1, 0, 0)
    assert (sampling.repetition_penalty, sampling.presence_penalty) == (1, 0)
    assert sampling.logprobs is None
    assert sequence.stopping.max_tokens is None


def test_the_model_s_own_defaults_stand_in_for_absent_numbers() -> None:
    own = {"temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    facts = msgspec.structs.replace(FACTS, default_sampling=own)
    request = generate_request([1], sampling=types_pb2.SamplingParams(top_p=0.5))
    (sequence,) = sequence_requests(request, facts, itertools.count().__next__)
    sampling = sequence.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.5, 20)
    assert sampling.repetition_penalty == 1.1
    shown = default_sampling(facts)
    assert shown.temperature == pytest.approx(0.6)
    assert not shown.HasField("min_p")


def test_a_temperature_of_zero_is_not_absence() -> None:
    request = generate_request([1], sampling=types_pb2.SamplingParams(temperature=0))
    assert sequences(request)[0].sampling.temperature == 0


def test_requests_without_a_seed_get_different_ones() -> None:
    seeds = {sequences(generate_request([1]))[0].sampling.seed for _ in range(8)}
    assert len(seeds) == 8
    fixed = generate_request([1], sampling=types_pb2.SamplingParams(seed=2**64 - 1))
    assert sequences(fixed)[0].sampling.seed == 2**64 - 1


def test_choices_are_sequences_that_share_all_but_their_index() -> None:
    choices = sequences(generate_request([1], sampling=types_pb2.SamplingParams(n=3)))
    assert [choice.choice_index for choice in choices] == [0, 1, 2]
    assert len({choice.sequence_id for choice in choices}) == 3
    assert len({choice.sampling.seed for choice in choices}) == 1


def test_logits_processors_are_known_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits_plugins.install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    processor_names.cache_clear()
    try:
        processor = types_pb2.LogitsProcessor(name="count-down")
        processor.arguments.update({"start": 3})
        sampling = types_pb2.SamplingParams(logits_processors=[processor])
        (sequence,) = sequences(generate_request([1], sampling=sampling))
        assert sequence.sampling.logits_processors == (("count-down", '{"start": 3.0}'),)
    finally:
        processor_names.cache_clear()


def test_a_prompt_is_scored_once_for_all_choices() -> None:
    request = generate_request([1], sampling=types_pb2.SamplingParams(n=3), prompt_logprobs=2)
    wanted = [choice.sampling.prompt_logprobs for choice in sequences(request)]
    assert wanted == [2, None, None]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("request_id", {"request_id": ""}),
        ("request_id", {"request_id": "x" * 257}),
        ("prompt", {"prompt": []}),
        ("prompt.ids", {"prompt": [VOCAB_SIZE]}),
        ("priority", {"priority": 101}),
        ("sampling.temperature", {"sampling": {"temperature": -0.1}}),
        ("sampling.temperature", {"sampling": {"temperature": math.nan}}),
        ("sampling.temperature", {"sampling": {"temperature": math.inf}}),
        ("sampling.top_p", {"sampling": {"top_p": 0}}),
        ("sampling.top_p", {"sampling": {"top_p": 2}}),
        ("sampling.min_p", {"sampling": {"min_p": 1.5}}),
        ("sampling.repetition_penalty", {"sampling": {"repetition_penalty": 0}}),
        ("sampling.presence_penalty", {"sampling": {"presence_penalty": 3}}),
        ("sampling.frequency_penalty", {"sampling": {"frequency_penalty": -3}}),
        ("sampling.logit_bias", {"sampling": {"logit_bias": {VOCAB_SIZE: 1.0}}}),
        ("sampling.logit_bias", {"sampling": {"logit_bias": {1: 101.0}}}),
        (
            "sampling.allowed_token_ids",
            {"sampling": {"allowed_token_ids": [1], "banned_token_ids": [1]}},
        ),
        ("sampling.banned_token_ids", {"sampling": {"banned_token_ids": range(VOCAB_SIZE)}}),
        ("sampling.logits_processors", {"sampling": {"logits_processors": [{}] * 9}}),
        (
            "sampling.logits_processors[0].name",
            {"sampling": {"logits_processors": [{"name": "nobody-has-this"}]}},
        ),
        ("sampling.beam_width", {"sampling": {"beam_width": 0}}),
        ("sampling.beam_width", {"sampling": {"beam_width": 129}}),
        ("sampling.length_penalty", {"sampling": {"length_penalty": 2.0}}),
        ("sampling.length_penalty", {"sampling": {"beam_width": 2, "length_penalty": 11.0}}),
        ("sampling.early_stopping", {"sampling": {"early_stopping": True}}),
        ("sampling.n", {"sampling": {"beam_width": 2, "n": 3}}),
        ("sampling.presence_penalty", {"sampling": {"beam_width": 2, "presence_penalty": 1.0}}),
        ("sampling.banned_token_ids", {"sampling": {"beam_width": 2, "banned_token_ids": [1]}}),
        ("prompt_logprobs", {"sampling": {"beam_width": 2}, "prompt_logprobs": 1}),
        ("constraint", {"sampling": {"beam_width": 2}, "constraint": {"regex": "a"}}),
        ("sampling.n", {"sampling": {"n": 0}}),
        ("sampling.n", {"sampling": {"n": 129}}),
        ("logprobs", {"logprobs": 21}),
        ("prompt_logprobs", {"prompt_logprobs": 21}),
        ("stopping.max_tokens", {"stopping": {"max_tokens": 0}}),
        ("stopping.min_tokens", {"stopping": {"max_tokens": 2, "min_tokens": 3}}),
        ("stopping.stop_token_ids", {"stopping": {"stop_token_ids": [VOCAB_SIZE]}}),
        ("stopping.stop_strings", {"stopping": {"stop_strings": ["."]}}),
        ("stop_sequences", {"stop_sequences": [{"ids": [1]}] * 1025}),
        ("stop_sequences[1].ids", {"stop_sequences": [{"ids": [1]}, {"ids": []}]}),
        ("stop_sequences[0].ids", {"stop_sequences": [{"ids": [VOCAB_SIZE]}]}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_bad_field_is_named(path: str, fields: dict[str, Any]) -> None:
    fields = dict(fields)
    request = generate_request(fields.pop("prompt", [1]), **fields)
    error = failure(request)
    assert error.reason is Reason.INVALID_FIELD
    assert [violation[0] for violation in error.field_violations] == [path]


@pytest.mark.parametrize(
    ("prompt_tokens", "max_tokens", "path"),
    [(CONTEXT_TOKENS, 1, "prompt"), (3, CONTEXT_TOKENS, "stopping.max_tokens")],
)
def test_what_exceeds_the_context_is_refused_with_the_limit(
    prompt_tokens: int, max_tokens: int, path: str
) -> None:
    request = generate_request(
        [1] * prompt_tokens, stopping=types_pb2.StoppingCriteria(max_tokens=max_tokens)
    )
    error = failure(request)
    assert error.reason is Reason.PROMPT_TOO_LONG
    assert error.field_violations[0][0] == path
    assert error.metadata["context_tokens"] == str(CONTEXT_TOKENS)


@pytest.mark.parametrize(
    ("capability", "fields"),
    [
        ("best_of", {"sampling": {"n": 1, "best_of": 2}}),
    ],
)
def test_what_the_engine_cannot_do_is_said(capability: str, fields: dict[str, Any]) -> None:
    error = failure(generate_request([1], **fields))
    assert error.reason is Reason.CAPABILITY_MISSING
    assert error.metadata["capability"] == capability


def test_an_adapter_that_is_not_loaded_is_not_found() -> None:
    error = failure(generate_request([1], adapter="a"))
    assert error.reason is Reason.ADAPTER_NOT_FOUND
    assert error.field_violations[0][0] == "adapter"
