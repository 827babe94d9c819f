"""Real models answer the same with what is found in the KV cache as with what is computed anew."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from services.engine.core.engine import EngineCore
from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine
from tests.fakes.small_llama import VOCAB_SIZE

Answer = tuple[list[int], list[float], int]  # tokens, their log-probabilities, cached tokens


def engine(checkpoint: Path, **fields: object) -> EngineCore:
    settings = CoreSettings(
        model_path=str(checkpoint),
        device="cpu",
        kv_cache_memory_bytes=1 << 22,
        max_batch_tokens=64,
        max_running_sequences=8,
        **fields,  # type: ignore[arg-type]
    )
    return build_engine(settings)[0]


def answers(core: EngineCore, *requests: SequenceRequest) -> list[Answer]:
    core.add(list(requests))
    tokens: dict[int, list[int]] = {}
    logprobs: dict[int, list[float]] = {}
    cached: dict[int, int] = {}
    while core.has_work:
        for delta in core.step().deltas:
            key = delta.sequence_id
            tokens.setdefault(key, []).extend(delta.token_ids)
            logprobs.setdefault(key, []).extend(each.logprob for each in delta.logprobs or ())
            if delta.finish is not None and delta.timing is not None:
                cached[key] = delta.timing.cached_prompt_tokens
        core.check_integrity()
    ids = [request.sequence_id for request in requests]
    return [(tokens[each], logprobs[each], cached[each]) for each in ids]


def request(number: int, prompt: list[int]) -> SequenceRequest:
    return SequenceRequest(
        number,
        prompt,
        Sampling(temperature=0.8, seed=number, logprobs=0),
        Stopping(max_tokens=20, ignore_eos=True),
    )


@pytest.mark.parametrize(
    ("fields", "tolerance"),
    [
        # The native kernels compute a token the same whatever is computed beside it.
        ({"dtype": "bfloat16"}, 0.0),
        ({"dtype": "bfloat16", "kv_cache_format": "int8"}, 0.0),
        ({"dtype": "float32", "cpu_kernels": "off"}, 1e-4),
    ],
)
def test_found_or_computed_the_answer_is_the_same(
    checkpoint: Path, fields: dict[str, object], tolerance: float
) -> None:
    rng = random.Random(5)
    common = [rng.randrange(3, VOCAB_SIZE) for _ in range(70)]
    requests = [request(number, [*common, number + 3, 9]) for number in range(3)]
    choices = [request(number, common) for number in range(3, 6)]  # a partial block is copied
    whole_blocks = [request(6, common[:64])]  # and here a full one

    alone = engine(checkpoint, prefix_cache=False, **fields)
    expected = [answers(alone, each)[0] for each in (*requests, *choices, *whole_blocks)]
    assert all(cached == 0 for _, _, cached in expected)

    core = engine(checkpoint, **fields)
    found = answers(core, *requests) + answers(core, *choices) + answers(core, *whole_blocks)
    assert [cached for _, _, cached in found] == [0, 64, 64, 64, 69, 69, 63]
    for (tokens, logprobs, _), (wanted, wanted_logprobs, _) in zip(found, expected, strict=True):
        assert tokens == wanted
        assert logprobs == pytest.approx(wanted_logprobs, abs=tolerance, rel=0)
