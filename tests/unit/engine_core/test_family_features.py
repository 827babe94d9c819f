"""Whatever the engine does with a sequence of any family, its tokens are those of a plain run."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from transformers import AutoModelForCausalLM

from services.engine.core.engine import EngineCore
from services.engine.core.kernels.cpu import library
from services.engine.core.messages import (
    Constraint,
    FinishReason,
    Sampling,
    SequenceRequest,
    Stopping,
)
from services.engine.core.models import read_config
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine
from tests.fakes.adapters import add_adapters
from tests.fakes.decoder_families import FAMILIES, WINDOW, save_model, served
from tests.fakes.native_steps import text
from tests.fakes.paged_step import libraries
from tests.fakes.speculators import KnowingSpeculator
from tests.fakes.spelling_llama import VOCAB_SIZE, save_spelling_tokenizer, spelled

BLOCK_SIZE = 16
CONTEXT_TOKENS = 96
# Two begin alike, and some reach beyond a window and a block.
PROMPTS = [text(length, seed) for seed, length in enumerate((40, 14, 2 * WINDOW))]
PROMPTS.append(PROMPTS[0][:35] + text(10, 9))
COMPLETION_TOKENS = 20
# Few layers, of each kind one.
LAYERS: dict[str, Any] = {"num_hidden_layers": 2}
MIXED_LAYERS = LAYERS | {"layer_types": ["sliding_attention", "full_attention"]}
NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(not libraries(), reason="no native kernels on this machine"),
)
ON_TORCH = pytest.mark.parametrize("steps", ["torch"], indirect=True, scope="module")
ON_THE_KERNELS = pytest.mark.parametrize("steps", [NATIVE], indirect=True, scope="module")
Answers = dict[int, list[int]]
Build = Callable[..., EngineCore]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest) -> str:
    """One family after the other."""
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def model(case: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Where a model of a family is, with a tokenizer, and the model."""
    path = tmp_path_factory.mktemp("model")
    layers = MIXED_LAYERS if case == "gemma3" else LAYERS
    reference = save_model(case, path, **served(case, vocab_size=VOCAB_SIZE, **layers))
    save_spelling_tokenizer(path)
    return path, reference


@pytest.fixture(scope="module", params=["torch", NATIVE])
def steps(request: pytest.FixtureRequest) -> str:
    """What computes."""
    found: str = request.param
    return found


@pytest.fixture(scope="module")
def engine(model: tuple[Path, Any], steps: str) -> Iterator[Build]:
    """Engines over a family's model, of which there is one for each settings."""
    before = torch.get_num_threads()
    path, _ = model
    config = read_config(path)
    token_bytes = 2 * config.num_layers * config.kv_heads * config.head_dim
    native = steps == "native"
    known: dict[str, EngineCore] = {}

    def build(num_blocks: int = 256, **fields: Any) -> EngineCore:
        key = f"{num_blocks} {fields}"
        if key in known:
            return known[key]
        core, facts = build_engine(
            CoreSettings(
                model_path=str(path),
                device="cpu",
                threads=1,
                dtype="bfloat16" if native else "float32",
                cpu_kernels="auto" if native else "off",
                max_context_tokens=CONTEXT_TOKENS,
                kv_cache_memory_bytes=num_blocks * BLOCK_SIZE * token_bytes * (2 if native else 4),
                **{"speculation": "off", **fields},
            )
        )
        assert isinstance(core, EngineCore)
        assert ("step" in facts.kernels) == native
        known[key] = core
        return core

    yield build
    torch.set_num_threads(before)
    library.activate("off")


def requests(*, sampled: bool = False, **fields: Any) -> list[SequenceRequest]:
    """One for each prompt, greedy unless sampled."""
    return [
        SequenceRequest(
            number,
            prompt,
            Sampling(temperature=1.0 if sampled else 0.0, seed=number),
            Stopping(max_tokens=COMPLETION_TOKENS, ignore_eos=True),
            **fields,
        )
        for number, prompt in enumerate(PROMPTS)
    ]


def answers(
    core: EngineCore, made: list[SequenceRequest], later: Sequence[SequenceRequest] = ()
) -> Answers:
    """What each request is answered when all come at once, and `later` ones two steps later."""
    found: Answers = {each.sequence_id: [] for each in (*made, *later)}
    core.add(made)
    steps = 0
    while core.has_work:
        if steps == 2:
            core.add(list(later))
        steps += 1
        for delta in core.step().deltas:
            found[delta.sequence_id] += delta.token_ids
            if delta.finish is not None:
                assert delta.finish.reason in (FinishReason.LENGTH, FinishReason.STOP), delta
        core.check_integrity()
    return found


def alone(engine: Build, made: list[SequenceRequest], **fields: Any) -> Answers:
    """The same where each comes when the one before it has been answered, and nothing is kept."""
    core = engine(prefix_cache=False, **fields)
    found: Answers = {}
    for each in made:
        found |= answers(core, [each])
    return found


@pytest.fixture(scope="module")
def expected(engine: Build) -> Answers:
    """What a plain run answers."""
    return alone(engine, requests())


@pytest.mark.proves("{case}", "plain torch")
@ON_TORCH
def test_a_plain_run_says_what_transformers_says(
    model: tuple[Path, Any], expected: Answers
) -> None:
    _, reference = model
    for prompt, answer in zip(PROMPTS, expected.values(), strict=True):
        ids = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=COMPLETION_TOKENS,
            do_sample=False,
            eos_token_id=None,
        )
        assert answer == ids[0, len(prompt) :].tolist()


@pytest.mark.proves("{case}", "chunked prefill")
def test_a_prompt_in_chunks(engine: Build, expected: Answers) -> None:
    core = engine(max_batch_tokens=9, max_running_sequences=5)
    before = core.load()
    assert answers(core, requests()) == expected
    assert core.load().steps - before.steps > sum(map(len, PROMPTS)) // 9


@pytest.mark.proves("{case}", "prefix cache")
def test_a_prompt_that_is_known_in_part(engine: Build, expected: Answers) -> None:
    core = engine()
    answers(core, requests()[:1])
    before = core.load()
    assert answers(core, requests()) == expected
    # Two whole blocks of the first one and of the last.
    assert core.load().cache_hit_tokens - before.cache_hit_tokens >= 2 * 2 * BLOCK_SIZE


@pytest.mark.proves("{case}", "preemption")
def test_sequences_that_are_preempted(engine: Build, expected: Answers) -> None:
    core = engine(num_blocks=7, max_running_sequences=2)
    before = core.load()
    # Where all layers have a window, nobody outgrows the pool: only what is urgent preempts.
    urgent = requests(priority=1)[-1:]
    assert answers(core, requests()[:-1], urgent) == expected
    assert core.load().preemptions > before.preemptions


@pytest.mark.proves("{case}", "speculation")
def test_drafts_that_are_right_and_wrong(engine: Build, expected: Answers) -> None:
    core = engine(speculation="ngram")
    core._scheduler._speculator = KnowingSpeculator(expected, VOCAB_SIZE)
    assert answers(core, requests()) == expected
    load = core.load()
    assert 0 < load.accepted_draft_tokens < load.drafted_tokens


@pytest.mark.proves("{case}", "n > 1")
def test_choices_that_share_their_prompt(engine: Build) -> None:
    each = requests(sampled=True)[-1]
    made = [
        SequenceRequest(number, each.prompt_token_ids, each.sampling, each.stopping, number)
        for number in range(4)
    ]
    expected = alone(engine, made)
    assert len({tuple(answer) for answer in expected.values()}) == len(made)
    core = engine()
    before = core.load()
    assert answers(core, made) == expected
    computed = core.load().prompt_tokens - before.prompt_tokens
    assert computed < 2 * len(each.prompt_token_ids)


@pytest.mark.proves("{case}", "structured output")
def test_answers_that_follow_a_rule(engine: Build) -> None:
    rule = r"[a-f]{3,9}-(ab|xy){2}\\.[0-9]{4}"
    made = requests(sampled=True, constraint=Constraint("regex", rule))[:2]
    expected = alone(engine, made)
    for answer in expected.values():
        assert re.fullmatch(rule, spelled(answer).decode())
    assert answers(engine(max_batch_tokens=9, max_running_sequences=5), made) == expected


@pytest.mark.proves("{case}", "beam search")
def test_beams(model: tuple[Path, Any], engine: Build, steps: str) -> None:
    prompt = PROMPTS[2]
    made = [
        SequenceRequest(
            number,
            prompt,
            Sampling(beam_width=3, logprobs=0),
            Stopping(max_tokens=8, ignore_eos=True),
            choice_index=number,
        )
        for number in range(3)
    ]
    core = engine()
    found = answers(core, made)
    assert answers(engine(max_batch_tokens=9, max_running_sequences=5), made) == found
    if steps == "torch":
        _, reference = model
        ids = reference.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=8,
            num_beams=3,
            num_return_sequences=3,
            do_sample=False,
            eos_token_id=None,
        )
        assert list(found.values()) == ids[:, len(prompt) :].tolist()


@pytest.mark.proves("{case}", "int8 KV cache")
@ON_THE_KERNELS
def test_keys_and_values_in_eight_bits(engine: Build) -> None:
    expected = alone(engine, requests(), kv_cache_format="int8")
    tight = engine(
        num_blocks=7, kv_cache_format="int8", max_batch_tokens=9, max_running_sequences=5
    )
    assert answers(tight, requests()) == expected


# What of each family an adapter changes; elsewhere its queries, values and outputs.
ADAPTED = {"phi3": ["qkv_proj", "o_proj"], "gpt2": ["c_attn", "c_proj"]}
ADAPTERS = ("one", "", "two", "one")  # of each prompt


@pytest.fixture(scope="module")
def adapters(
    case: str, model: tuple[Path, Any], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Where two adapters of a family's model are."""
    folder = tmp_path_factory.mktemp("adapters")
    targets = ADAPTED.get(case, ["q_proj", "v_proj", "o_proj"])
    config = {"r": 4, "lora_alpha": 64, "target_modules": targets}
    reference = AutoModelForCausalLM.from_pretrained(model[0])
    add_adapters(reference, folder, one=config, two=config | {"r": 12})
    return {name: str(folder / name) for name in ("one", "two")}


@pytest.mark.proves("{case}", "adapters")
def test_each_sequence_goes_through_its_own_adapter(
    engine: Build, expected: Answers, adapters: dict[str, str]
) -> None:
    made = [
        structs.replace(request, adapter=name)
        for request, name in zip(requests(), ADAPTERS, strict=True)
    ]
    plain, expected = expected, alone(engine, made, adapters=adapters)
    assert expected[1] == plain[1]
    assert all(expected[number] != plain[number] for number in (0, 2, 3))
    # The second time nothing of one adapter may be found by another.
    core = engine(adapters=adapters)
    assert answers(core, requests()) == plain
    assert answers(core, made) == expected
    chunks = engine(max_batch_tokens=9, max_running_sequences=5, adapters=adapters)
    assert answers(chunks, made) == expected
    tight = engine(num_blocks=7, max_running_sequences=2, plan_ahead="on", adapters=adapters)
    urgent = structs.replace(made[-1], priority=1)
    assert answers(tight, made[:-1], [urgent]) == expected
    assert tight.load().preemptions
    drafting = engine(speculation="ngram", adapters=adapters)
    drafting._scheduler._speculator = KnowingSpeculator(expected, VOCAB_SIZE)
    assert answers(drafting, made) == expected
    assert 0 < drafting.load().accepted_draft_tokens < drafting.load().drafted_tokens


def test_choices_and_beams_through_an_adapter(engine: Build, adapters: dict[str, str]) -> None:
    each = structs.replace(requests(sampled=True)[-1], adapter="two")
    for sampling, tokens in ((each.sampling, 20), (Sampling(beam_width=3, logprobs=0), 8)):
        made = [
            structs.replace(
                each,
                sequence_id=number,
                choice_index=number,
                sampling=sampling,
                stopping=Stopping(max_tokens=tokens, ignore_eos=True),
            )
            for number in range(3)
        ]
        found = answers(engine(adapters=adapters), made)
        chunks = engine(max_batch_tokens=9, max_running_sequences=5, adapters=adapters)
        assert answers(chunks, made) == found
        assert found != answers(engine(), [structs.replace(one, adapter="") for one in made])
