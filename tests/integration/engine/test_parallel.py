"""Engines of several ranks, each a process: they say what one process says, whatever is done with
a sequence."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from transformers import AutoModelForCausalLM

from services.engine.core import device_runner
from services.engine.core.device_runner import make_device_runner
from services.engine.core.engine import EngineCore
from services.engine.core.errors import StartupError
from services.engine.core.kernels.cpu import library
from services.engine.core.messages import Delta, Sampling, SequenceRequest, Stopping
from services.engine.core.parallel import workers
from services.engine.core.parallel.backend import end_workers
from services.engine.core.parallel.model import ParallelModel
from services.engine.core.runner import Runner
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine
from tests.fakes.adapters import add_adapters
from tests.fakes.capturing_ranks import COMMAND
from tests.fakes.decoder_families import save_model, served
from tests.fakes.native_steps import text
from tests.fakes.recorders import Replaying
from tests.fakes.speculators import KnowingSpeculator

VOCAB_SIZE = 97
PROMPTS = [text(40), text(14, 1), text(16, 2), text(40)[:35] + text(10, 9)]
COMPLETION_TOKENS = 16
Answers = dict[int, list[int]]


def settings_of(path: Path, **fields: Any) -> CoreSettings:
    """Those of a core whose steps take fewer tokens than a prompt has."""
    known = {
        "model_path": str(path),
        "device": "cpu",
        "dtype": "float32",
        "threads": 1,
        "cpu_kernels": "off",
        "max_context_tokens": 96,
        "max_batch_tokens": 12,
        "max_running_sequences": 5,
        "kv_cache_memory_bytes": 1 << 20,
        "speculation": "off",
    }
    return CoreSettings(**(known | fields))


@pytest.fixture(scope="module", autouse=True)
def as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    library.activate("off")


@pytest.fixture
def engine() -> Iterator[Callable[..., EngineCore]]:
    """Builds engines, one after the other; of several ranks there is one at a time."""

    def build(path: Path, make_runner: Callable[..., Any] = Runner, **fields: Any) -> EngineCore:
        end_workers()
        core, _ = build_engine(settings_of(path, **fields), make_runner=make_runner)
        assert isinstance(core, EngineCore)
        return core

    yield build
    end_workers()


def requests(prompts: list[list[int]] = PROMPTS, **fields: Any) -> list[SequenceRequest]:
    """A greedy one for each prompt."""
    stopping = Stopping(max_tokens=COMPLETION_TOKENS, ignore_eos=True)
    return [
        SequenceRequest(number, prompt, Sampling(temperature=0), stopping, **fields)
        for number, prompt in enumerate(prompts)
    ]


def deltas(
    core: EngineCore, made: list[SequenceRequest], later: Sequence[SequenceRequest] = ()
) -> list[Delta]:
    """All that comes of requests which come at once, and of `later` ones six steps later."""
    core.add(made)
    found, last = [], core.load().steps + 6
    while core.has_work:
        if later and core.load().steps == last:
            core.add(list(later))
            later = ()
        found += core.step().deltas
        core.check_integrity()
    return found


def answers(
    core: EngineCore, made: list[SequenceRequest], later: Sequence[SequenceRequest] = ()
) -> Answers:
    found: Answers = {each.sequence_id: [] for each in (*made, *later)}
    for delta in deltas(core, made, later):
        found[delta.sequence_id] += delta.token_ids
        assert delta.finish is None or not delta.finish.error, delta.finish
    return found


def logprobs(core: EngineCore, prompt: list[int]) -> list[float]:
    """The log-probabilities of an answer's tokens, and of the likeliest beside them."""
    (request,) = requests([prompt])
    request = structs.replace(request, sampling=Sampling(temperature=0, logprobs=3))
    entries = [entry for delta in deltas(core, [request]) for entry in delta.logprobs]
    return [value for entry in entries for value in (entry.logprob, *entry.top_logprobs)]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A model, and an adapter of it."""
    path = tmp_path_factory.mktemp("llama")
    save_model("llama", path, **served("llama"))
    adapted = tmp_path_factory.mktemp("adapters")
    targets = ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"]
    config = {"r": 4, "lora_alpha": 64, "target_modules": targets}
    add_adapters(AutoModelForCausalLM.from_pretrained(path), adapted, one=config)
    return path, {"one": str(adapted / "one")}


def test_two_ranks_say_what_one_process_says_whatever_is_done_with_a_sequence(
    engine: Callable[..., EngineCore], llama: tuple[Path, dict[str, str]]
) -> None:
    path, adapters = llama
    sampled = Sampling(temperature=1.0, seed=3)
    last = requests(PROMPTS[-1:])[0]
    choices = [
        structs.replace(last, sequence_id=number, sampling=sampled, choice_index=number)
        for number in range(3)
    ]
    beams = [
        structs.replace(
            last,
            sequence_id=number,
            sampling=Sampling(beam_width=3, logprobs=0),
            choice_index=number,
        )
        for number in range(3)
    ]
    adapted = requests(adapter="one")

    def everything(core: EngineCore) -> list[Answers]:
        plain = answers(core, requests())
        core._scheduler._speculator = KnowingSpeculator(plain, VOCAB_SIZE)
        drafted = answers(core, requests())
        assert 0 < core.load().accepted_draft_tokens < core.load().drafted_tokens
        core._scheduler._speculator = None
        urgent = requests(priority=1)[-1:]
        known = answers(core, requests()[:-1], urgent)
        return [plain, drafted, known, *(answers(core, each) for each in (choices, beams, adapted))]

    alone = engine(path, adapters=adapters)
    expected, certain = everything(alone), logprobs(alone, PROMPTS[0])
    assert expected[0] == expected[1] == expected[2] != expected[-1]
    # Eight blocks of 16 tokens, so that an urgent one finds them taken.
    ranks = engine(
        path, tensor_parallel=2, adapters=adapters, kv_cache_memory_bytes=8 * 16 * 4 * 16 * 4 * 2
    )
    assert everything(ranks) == expected
    assert logprobs(ranks, PROMPTS[0]) == pytest.approx(certain, abs=1e-4)
    load = ranks.load()
    assert load.num_blocks == 8
    assert load.preemptions
    assert load.cache_hit_tokens
    assert load.failed_sequences == 0


@pytest.mark.slow
def test_ranks_compute_steps_that_are_launched_ahead_of_their_tokens(
    engine: Callable[..., EngineCore], llama: tuple[Path, dict[str, str]]
) -> None:
    path, adapters = llama
    made = [
        *requests()[:2],
        *(structs.replace(each, adapter="one") for each in requests()[2:]),
    ]
    expected = answers(engine(path, adapters=adapters), made)
    ahead = partial(make_device_runner, vocab_size=VOCAB_SIZE, captures=False, drafts=False)
    fields = {"tensor_parallel": 2, "pipeline_parallel": 2, "adapters": adapters}
    assert answers(engine(path, ahead, plan_ahead="on", **fields), made) == expected


@pytest.mark.slow
def test_ranks_capture_steps_together_over_their_own_exchanges(
    engine: Callable[..., EngineCore],
    llama: tuple[Path, dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path, _ = llama
    expected = answers(engine(path), requests())
    recorder = Replaying()
    monkeypatch.setattr(workers, "WORKER_COMMAND", COMMAND)
    monkeypatch.setattr(device_runner, "CudaRecorder", lambda device: recorder)
    graphed = partial(
        make_device_runner,
        vocab_size=VOCAB_SIZE,
        captures=True,
        drafts=False,
        graphed=ParallelModel.graphed,
    )
    ranks = engine(path, graphed, plan_ahead="on", tensor_parallel=2, pipeline_parallel=2)
    assert answers(ranks, requests()) == expected
    assert recorder.replays > 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "tensor", "stages", "kv_cache_format"),
    [
        ("llama", 2, 2, "int8"),
        ("qwen3", 2, 1, "auto"),
        ("gemma3", 1, 3, "auto"),
        ("mixtral", 2, 1, "auto"),
        ("phi3", 1, 2, "auto"),
        ("gpt2", 2, 2, "auto"),
    ],
)
def test_ranks_say_what_one_process_says_of_every_family(
    engine: Callable[..., EngineCore],
    case: str,
    tensor: int,
    stages: int,
    kv_cache_format: str,
    tmp_path: Path,
) -> None:
    save_model(case, tmp_path, **served(case))
    expected = answers(engine(tmp_path, kv_cache_format=kv_cache_format), requests())
    ranks = engine(
        tmp_path,
        tensor_parallel=tensor,
        pipeline_parallel=stages,
        kv_cache_format=kv_cache_format,
    )
    assert answers(ranks, requests()) == expected


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two GPUs")
@pytest.mark.parametrize("parallel", ["tensor_parallel", "pipeline_parallel"])
def test_two_gpus_say_what_one_says(
    engine: Callable[..., EngineCore], llama: tuple[Path, dict[str, str]], parallel: str
) -> None:
    path, _ = llama
    fields: dict[str, Any] = {"device": "cuda:0", "max_adapters": 0}
    expected = answers(engine(path, **fields), requests())
    assert answers(engine(path, **fields, **{parallel: 2}), requests()) == expected


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"tensor_parallel": 3}, r"does not divide the model's heads \(4\); numbers that do: 1, 2"),
        ({"pipeline_parallel": 5}, "pipeline_parallel is 5, but the model has 4 layers"),
        ({"tensor_parallel": 2, "weights": "int4"}, "weights in int4 are not divided over ranks"),
        ({"tensor_parallel": 2, "device": "cuda:7"}, "the device 'cuda:7' is not there"),
    ],
)
def test_what_cannot_be_divided_is_refused_at_the_start(
    engine: Callable[..., EngineCore],
    llama: tuple[Path, dict[str, str]],
    fields: dict[str, Any],
    problem: str,
) -> None:
    with pytest.raises(StartupError, match=problem):
        engine(llama[0], **fields)
