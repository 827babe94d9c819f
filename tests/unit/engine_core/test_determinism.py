"""On the native kernels a request gives the same tokens and log-probabilities, bit for bit,
whatever company it keeps."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from services.engine.core.kernels.cpu import library
from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine
from tests.fakes.amx_processor import pretend
from tests.fakes.paged_step import libraries
from tests.fakes.small_llama import VOCAB_SIZE, save_small_llama

pytestmark = pytest.mark.skipif(not libraries(), reason="no native kernels on this machine")

PREFIX = [7, 3, 90, 12, 55] * 13  # four blocks, and one token


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_small_llama(path)
    return path


@pytest.fixture
def engine(checkpoint: Path) -> Any:
    before = torch.get_num_threads()

    def build(num_blocks: int = 512, **fields: Any) -> Any:
        bytes_per_block = 2 * 2 * 16 * 32 * (2 if "kv_cache_format" not in fields else 1)
        bytes_per_block += 0 if "kv_cache_format" not in fields else 2 * 2 * 2 * 64
        defaults = {"device": "cpu", "threads": 1, "max_context_tokens": 256}
        memory = num_blocks * bytes_per_block
        fields = {**defaults, "kv_cache_memory_bytes": memory, **fields}
        core, facts = build_engine(CoreSettings(model_path=str(checkpoint), **fields))
        assert "step" in facts.kernels
        assert facts.num_blocks <= num_blocks
        return core

    yield build
    torch.set_num_threads(before)
    library.activate("off")


def requests(seed: int) -> list[SequenceRequest]:
    """32 requests of all kinds; half of them share a prefix."""
    chance = random.Random(seed)
    made = []
    for number in range(32):
        own = [chance.randrange(3, VOCAB_SIZE) for _ in range(chance.randrange(1, 60))]
        sampling = Sampling(
            temperature=chance.choice([0.0, 0.7, 1.5]),
            top_k=chance.choice([0, 20]),
            top_p=chance.choice([1.0, 0.9]),
            seed=number,
            presence_penalty=chance.choice([0.0, 0.5]),
            logprobs=3,
        )
        stopping = Stopping(max_tokens=chance.randrange(1, 40), ignore_eos=True)
        prompt = PREFIX + own if number % 2 else own
        made.append(SequenceRequest(number, prompt, sampling, stopping))
    return made


Answers = dict[int, list[tuple[int, float, list[int], list[float]]]]


def answers(engine: Any, arrivals: dict[int, list[SequenceRequest]]) -> Answers:
    """What each request is answered when they arrive at these steps: tokens and their logprobs."""
    found: Answers = {}
    step = 0
    while arrivals or engine.has_work:
        engine.add(arrivals.pop(step, []))
        step += 1
        if not engine.has_work:
            continue
        for delta in engine.step().deltas:
            own = found.setdefault(delta.sequence_id, [])
            assert len(delta.token_ids) == len(delta.logprobs)
            for token, logprobs in zip(delta.token_ids, delta.logprobs, strict=True):
                own.append((token, logprobs.logprob, logprobs.top_token_ids, logprobs.top_logprobs))
    return found


def one_by_one(engine: Any, made: list[SequenceRequest]) -> Answers:
    found: Answers = {}
    for request in made:
        found |= answers(engine, {0: [request]})
    return found


COMPANY: dict[str, dict[str, Any]] = {
    "all at once": {},
    "no prefix cache": {"prefix_cache": False},
    "small chunks": {"max_batch_tokens": 33, "max_running_sequences": 32},
    "few at a time, in tiny chunks": {"max_batch_tokens": 7, "max_running_sequences": 5},
    "preempted": {"num_blocks": 14},
    "several threads": {"threads": 2},
    "each step planned ahead": {"plan_ahead": "on"},
    "no step planned ahead": {"plan_ahead": "off"},
    "larger blocks": {"num_blocks": 256, "block_size": 32, "kv_cache_memory_bytes": 256 * 8192},
}


@pytest.mark.parametrize("fields", COMPANY.values(), ids=COMPANY.keys())
def test_company_changes_no_bit(engine: Any, fields: dict[str, Any]) -> None:
    made = requests(seed=1)
    expected = one_by_one(engine(prefix_cache=False, speculation="off"), made)
    assert all(len(expected[each.sequence_id]) == each.stopping.max_tokens for each in made)
    chance = random.Random(2)
    arrivals: dict[int, list[SequenceRequest]] = {}
    for request in chance.sample(made, len(made)):
        arrivals.setdefault(chance.randrange(0, 40), []).append(request)
    together = engine(**fields)

    found = answers(together, arrivals)

    assert found == expected
    load = together.load()
    if fields.get("num_blocks") == 14:
        assert load.preemptions > 0
    assert (load.cache_hit_tokens > 0) == fields.get("prefix_cache", True)


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_neither_do_quantised_weights_and_caches(engine: Any, weights: str, cache: str) -> None:
    made = requests(seed=3)
    stored = {"weights": weights} | ({"kv_cache_format": cache} if cache == "int8" else {})
    expected = one_by_one(engine(prefix_cache=False, speculation="off", **stored), made)
    arrivals = {step: made[8 * step : 8 * step + 8] for step in range(4)}
    assert answers(engine(max_batch_tokens=70, **stored), arrivals) == expected


@pytest.mark.parametrize("weights", ["bfloat16", "int8", "int4"])
def test_nor_does_company_on_amx(
    engine: Any, monkeypatch: pytest.MonkeyPatch, weights: str
) -> None:
    pretend(monkeypatch)
    if "amx" not in library.isa_names(library.find_or_build()):
        pytest.skip("AMX cannot be run here, nor in software without AVX512-BF16")
    made = requests(seed=5)[:8]
    alone = engine(cpu_kernels="amx", weights=weights, prefix_cache=False, speculation="off")
    expected = one_by_one(alone, made)
    together = engine(cpu_kernels="amx", weights=weights, max_batch_tokens=70, threads=2)
    assert answers(together, {0: made}) == expected
    if weights != "bfloat16":
        # Sums of bytes are exact, on tiles and off.
        without = engine(cpu_kernels="avx512bf16", weights=weights)
        assert answers(without, {0: made}) == expected


def test_nor_does_another_run_or_what_ran_before(engine: Any) -> None:
    core, made = engine(), requests(seed=4)
    first = answers(core, {0: made})
    again = answers(core, {0: list(reversed(made))})
    assert again == first
