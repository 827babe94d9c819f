"""Every parameter of a request does to its own logits what `transformers` does to them, in batches
in which every sequence asks for something else."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from services.engine.core.batch import ForwardBatch
from services.engine.core.engine import EngineCore
from services.engine.core.kernels.cpu import library
from services.engine.core.messages import FinishReason, Sampling, SequenceRequest, Stopping
from services.engine.core.noise import stream_key, uniforms
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine
from tests.fakes.logits_plugins import CountDown, install
from tests.fakes.paged_step import libraries
from tests.fakes.small_llama import VOCAB_SIZE, save_small_llama
from tests.fakes.speculators import KnowingSpeculator

EOS_TOKEN_ID = 2
BLOCK_SIZE = 16
PREFIX = [7, 3, 90, 12, 55] * 8  # two blocks and a half
# What a draw may be off by where probabilities are added up in another order.
ROUNDING = 2e-5


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_small_llama(path)
    return path


@pytest.fixture(autouse=True)
def processors_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.fixture(
    params=[
        "torch",
        pytest.param(
            "native", marks=pytest.mark.skipif(not libraries(), reason="no native kernels here")
        ),
    ]
)
def engine(checkpoint: Path, request: pytest.FixtureRequest) -> Iterator[Any]:
    before = torch.get_num_threads()

    def build(num_blocks: int = 512, **fields: Any) -> EngineCore:
        native = request.param == "native"
        bytes_per_block = 2 * 2 * BLOCK_SIZE * 32 * (2 if native else 4)
        core, facts = build_engine(
            CoreSettings(
                model_path=str(checkpoint),
                device="cpu",
                threads=1,
                dtype="bfloat16" if native else "float32",
                cpu_kernels="auto" if native else "off",
                max_context_tokens=256,
                kv_cache_memory_bytes=num_blocks * bytes_per_block,
                **{"speculation": "off", **fields},
            )
        )
        assert isinstance(core, EngineCore)
        assert ("step" in facts.kernels) == native
        return core

    yield build
    torch.set_num_threads(before)
    library.activate("off")


def requests(seed: int, count: int) -> list[SequenceRequest]:
    """Requests each of which asks for something else; half of them begin alike."""
    chance = random.Random(seed)
    made = []
    for number in range(count):
        token_ids = list(range(3, VOCAB_SIZE))
        allowed = tuple(chance.sample(token_ids, 40)) if chance.random() < 0.2 else ()
        banned = tuple(chance.sample(token_ids, 20)) if chance.random() < 0.3 else ()
        sampling = Sampling(
            temperature=chance.choice([0.0, 0.3, 1.0, 1.0, 2.5]),
            top_k=chance.choice([0, 0, 1, 5, 30, 1000]),
            top_p=chance.choice([1.0, 1.0, 0.95, 0.6]),
            min_p=chance.choice([0.0, 0.0, 0.02, 0.3]),
            seed=chance.randrange(2**64),
            repetition_penalty=chance.choice([1.0, 1.0, 1.3, 0.7]),
            presence_penalty=chance.choice([0.0, 0.0, 1.5, -1.0]),
            frequency_penalty=chance.choice([0.0, 0.0, 0.8, -0.4]),
            logit_bias={chance.choice(token_ids): chance.uniform(-20, 5) for _ in range(3)}
            if chance.random() < 0.4
            else {},
            allowed_token_ids=allowed,
            banned_token_ids=banned,
            logits_processors=(("count-down", json.dumps({"start": number, "by": 4})),)
            if chance.random() < 0.2
            else (),
            logprobs=chance.choice([None, 0, 5]),
            prompt_logprobs=chance.choice([None, None, 0, 3]),
        )
        stopping = Stopping(
            max_tokens=chance.randrange(1, 30),
            min_tokens=chance.choice([0, 0, 1]),
            ignore_eos=chance.random() < 0.3,
            stop_token_ids=tuple(chance.sample(token_ids, chance.choice([0, 3]))),
        )
        own = [chance.choice(token_ids) for _ in range(chance.randrange(1, 40))]
        made.append(
            SequenceRequest(
                number,
                PREFIX + own if number % 2 else own,
                sampling,
                stopping,
                choice_index=chance.choice([0, 0, 3]),
                priority=chance.choice([0, 0, 5, -5]),
            )
        )
    return made


class Answer:
    """What a request was answered."""

    def __init__(self) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[Any] = []
        self.prompt_logprobs: Any = None
        self.reason: FinishReason | None = None


def answers(engine: EngineCore, arrivals: dict[int, list[SequenceRequest]]) -> dict[int, Answer]:
    """What each request is answered when they arrive at these steps."""
    arrivals = dict(arrivals)
    found: dict[int, Answer] = {}
    step = 0
    while arrivals or engine.has_work:
        if step in arrivals:
            engine.add(arrivals.pop(step))
        step += 1
        if not engine.has_work:
            continue
        for delta in engine.step().deltas:
            own = found.setdefault(delta.sequence_id, Answer())
            own.token_ids += delta.token_ids
            own.logprobs += delta.logprobs or []
            own.prompt_logprobs = delta.prompt_logprobs or own.prompt_logprobs
            if delta.finish is not None:
                own.reason = delta.finish.reason
        engine.check_integrity()
    return found


def own_logits(core: EngineCore, token_ids: list[int]) -> Tensor:
    """The logits of the model that the engine runs, after each token of a sequence."""
    runner = core._runner._runner
    count = len(token_ids)
    every = torch.arange(count)
    blocks = torch.arange(-(-count // BLOCK_SIZE), dtype=torch.int32)
    batch = ForwardBatch(
        torch.tensor(token_ids), every, every, blocks.unsqueeze(0), (count,), (count,), every
    )
    with torch.inference_mode():
        return runner._model(batch, runner._kv_cache).clone().float()


def processors(request: SequenceRequest) -> LogitsProcessorList:
    """What edits the logits of a request."""
    sampling, stopping = request.sampling, request.stopping
    chain = LogitsProcessorList()
    for _, arguments in sampling.logits_processors:
        count_down = CountDown(json.loads(arguments))

        def process(input_ids: Tensor, scores: Tensor, own: CountDown = count_down) -> Tensor:
            token_ids = input_ids[0].tolist()
            prompt = len(request.prompt_token_ids)
            return own(token_ids[:prompt], token_ids[prompt:], scores[0]).unsqueeze(0)

        chain.append(process)
    if sampling.repetition_penalty != 1.0:
        chain.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))

    # transformers has none; as OpenAI defines them.
    def penalise(input_ids: Tensor, scores: Tensor) -> Tensor:
        said = Counter(input_ids[0, len(request.prompt_token_ids) :].tolist())
        for token_id, count in said.items():
            scores[0, token_id] -= sampling.presence_penalty + sampling.frequency_penalty * count
        return scores

    chain.append(penalise)
    if sampling.logit_bias:
        biases = [[[token_id], bias] for token_id, bias in sampling.logit_bias.items()]
        chain.append(SequenceBiasLogitsProcessor(biases))
    if sampling.allowed_token_ids:
        allowed = list(sampling.allowed_token_ids)
        chain.append(PrefixConstrainedLogitsProcessor(lambda *_: allowed, num_beams=1))
    if sampling.banned_token_ids:
        chain.append(SuppressTokensLogitsProcessor(list(sampling.banned_token_ids)))
    ends = list(stopping.stop_token_ids) + ([] if stopping.ignore_eos else [EOS_TOKEN_ID])
    if stopping.min_tokens and ends:
        chain.append(
            MinNewTokensLengthLogitsProcessor(
                len(request.prompt_token_ids), stopping.min_tokens, ends
            )
        )
    return chain


def warpers(sampling: Sampling, top_p: float) -> LogitsProcessorList:
    """What is left to draw from."""
    chain = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        chain.append(TopKLogitsWarper(sampling.top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    if sampling.min_p:
        chain.append(MinPLogitsWarper(sampling.min_p))
    return chain


def may_be_drawn(token_id: int, scores: Tensor, sampling: Sampling, uniform: float) -> bool:
    """Whether `uniform` draws the token from the distribution that transformers makes of the
    processed logits [1, vocab]."""
    for top_p in {sampling.top_p, sampling.top_p - ROUNDING, min(1, sampling.top_p + ROUNDING)}:
        warped = warpers(sampling, top_p)(torch.empty(1, 0, dtype=torch.long), scores.clone())
        shares = warped[0].double().softmax(dim=-1)
        end = float(shares[: token_id + 1].sum())
        begin = end - float(shares[token_id])
        if shares[token_id] > 0 and begin - ROUNDING <= uniform <= end + ROUNDING:
            return True
    return False


def assert_answered(request: SequenceRequest, answer: Answer, logits: Tensor) -> None:
    """Hold an answer against the logits of its own tokens, [prompt and output, vocab]."""
    sampling = request.sampling
    num_prompt = len(request.prompt_token_ids)
    sequence = request.prompt_token_ids + answer.token_ids
    logprobs = logits.log_softmax(dim=-1)
    key = np.array([stream_key(sampling.seed, request.choice_index)], np.uint64)
    chain = processors(request)
    for position, token_id in enumerate(answer.token_ids):
        at = num_prompt + position
        scores = chain(torch.tensor([sequence[:at]]), logits[at - 1 : at].clone())
        if sampling.temperature == 0:
            assert scores[0, token_id] >= scores.max() - ROUNDING
        else:
            uniform = float(uniforms(key, np.array([position]))[0])
            assert may_be_drawn(token_id, scores, sampling, uniform), (request, position)
    for positions, count, entries in (
        (range(num_prompt, len(sequence)), sampling.logprobs, answer.logprobs),
        (range(1, num_prompt), sampling.prompt_logprobs, answer.prompt_logprobs or []),
    ):
        if count is None:
            assert not entries
            continue
        for at, entry in zip(positions, entries, strict=True):
            expected = logprobs[at - 1]
            assert entry.logprob == pytest.approx(float(expected[sequence[at]]), abs=2e-4)
            likeliest = expected.topk(count) if count else None
            top = likeliest.values.tolist() if likeliest else []
            assert entry.top_logprobs == pytest.approx(top, abs=2e-4)
            named = expected[entry.top_token_ids].tolist()
            assert named == pytest.approx(entry.top_logprobs, abs=2e-4)


COMPANY: dict[str, dict[str, Any]] = {
    "all at once": {"max_running_sequences": 64},
    "in tiny chunks": {"max_batch_tokens": 9, "max_running_sequences": 5},
    "preempted": {"num_blocks": 16},
    "preempted in tiny chunks": {
        "num_blocks": 16,
        "max_batch_tokens": 23,
        "max_running_sequences": 20,
    },
    "each step planned ahead": {"plan_ahead": "on"},
}


@pytest.mark.parametrize("fields", COMPANY.values(), ids=COMPANY.keys())
@pytest.mark.parametrize("speculation", [False, True], ids=["", "speculating"])
def test_every_sequence_of_a_mixed_batch_gets_what_it_asks_for(
    engine: Any, fields: dict[str, Any], speculation: bool
) -> None:
    made = requests(list(COMPANY.values()).index(fields), 24)
    alone = engine(prefix_cache=False)
    expected: dict[int, Answer] = {}
    for request in made:
        expected |= answers(alone, {0: [request]})
    together = engine(**fields)
    if speculation:
        together._scheduler._speculator = KnowingSpeculator(
            {sequence_id: answer.token_ids for sequence_id, answer in expected.items()}, VOCAB_SIZE
        )
    chance = random.Random(3)
    arrivals: dict[int, list[SequenceRequest]] = {}
    for request in chance.sample(made, len(made)):
        arrivals.setdefault(chance.randrange(0, 12), []).append(request)

    found = answers(together, arrivals)

    load = together.load()
    assert load.cache_hit_tokens > 0
    assert load.preemptions > 0 or "num_blocks" not in fields
    assert (load.accepted_draft_tokens > 0) == speculation
    for request in made:
        answer = found[request.sequence_id]
        assert answer.token_ids == expected[request.sequence_id].token_ids
        assert answer.reason == expected[request.sequence_id].reason
        logits = own_logits(alone, request.prompt_token_ids + answer.token_ids)
        assert_answered(request, answer, logits)
