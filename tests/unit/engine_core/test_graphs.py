"""Captured steps compute what steps do that are launched kernel by kernel.

What a GPU would replay is computed anew here, from the memory that was captured and from nothing
else: what the host knows of a step does not reach it.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from msgspec.structs import replace
from torch import Tensor

from services.engine.core import device_runner
from services.engine.core.batch import CapturedShape, ForwardBatch
from services.engine.core.capturing import CaptureLimits, capture_all, shapes_to_capture
from services.engine.core.device_runner import (
    DeviceRunner,
    make_device_runner,
    make_drafting_runner,
)
from services.engine.core.device_sampling import DeviceSampler
from services.engine.core.device_staging import DeviceStaging
from services.engine.core.engine import EngineCore
from services.engine.core.graphs import GraphedModel
from services.engine.core.kernels.sampling import SamplingForm
from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core.settings import CoreSettings
from services.engine.core.speculation.draft_model import DraftModelSpeculator
from services.engine.core.speculation.step_cost import StepCost
from services.engine.core.startup import build_engine
from tests.fakes.decoder_families import VOCAB_SIZE, save_model
from tests.fakes.recorders import Refusing, Replaying

FAMILIES = ["llama", "gemma2", "qwen3-moe", "gpt2"]


def build(path: Path, make_runner: Callable[..., Any] | None = None, **fields: Any) -> EngineCore:
    settings = CoreSettings(
        model_path=str(path),
        device="cpu",
        threads=1,
        dtype="float32",
        cpu_kernels="off",
        kv_cache_memory_bytes=1 << 21,
        max_running_sequences=6,
        max_batch_tokens=64,
        step_latency_target_ms=1e6,  # however slow the machine, steps are the same
        plan_ahead="on",
        **fields,
    )
    more = {} if make_runner is None else {"make_runner": make_runner}
    core, _ = build_engine(settings, **more)
    assert isinstance(core, EngineCore)
    return core


def graphed(recorder: Replaying, *args: Any, drafts: bool, **shape: Any) -> DeviceRunner:
    """A device's runner on a CPU, its graphs computed anew."""
    with patch.object(device_runner, "CudaRecorder", lambda device: recorder):
        return make_device_runner(
            *args, captures=True, drafts=drafts, vocab_size=VOCAB_SIZE, **shape
        )


def requests() -> list[SequenceRequest]:
    chance = random.Random(3)
    return [
        SequenceRequest(
            number,
            [chance.randrange(3, VOCAB_SIZE) for _ in range(3 + 11 * number)] + [5, 6, 7, 8] * 3,
            Sampling(temperature=0.0, presence_penalty=0.3 if number == 2 else 0.0),
            Stopping(max_tokens=8 + 3 * number, ignore_eos=True),
        )
        for number in range(8)
    ]


def answers(core: EngineCore, asked: list[SequenceRequest] | None = None) -> dict[int, list[int]]:
    core.add(asked or requests())
    found: dict[int, list[int]] = {}
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.finish is None or not delta.finish.error, delta.finish
            found.setdefault(delta.sequence_id, []).extend(delta.token_ids)
        core.check_integrity()
    return found


@pytest.mark.parametrize("speculation", ["off", "ngram"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_the_same(family: str, speculation: Any, tmp_path: Path) -> None:
    save_model(family, tmp_path, max_position_embeddings=160)
    recorder = Replaying()
    make_runner = partial(graphed, recorder, drafts=speculation != "off")
    found = answers(build(tmp_path, make_runner, speculation=speculation))
    assert found == answers(build(tmp_path, speculation=speculation))
    # How much is drafted, and so how few steps there are, hangs on what steps take.
    assert recorder.replays > (3 if speculation == "off" else 0)
    assert recorder.pieces > 3 * 5  # four layers make five pieces


PLAIN: list[dict[str, Any]] = [{"temperature": 0.0}]
DRAWN: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.8, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 0.0},
    {"temperature": 1.2, "top_k": 5},
]
EDITED: list[dict[str, Any]] = [
    *DRAWN[:3],
    {"temperature": 0.0, "frequency_penalty": 1.0, "logit_bias": {7: 3.0}},
    {"temperature": 1.0, "logprobs": 2},
]


@pytest.mark.parametrize("kinds", [PLAIN, DRAWN, EDITED], ids=["greedy", "drawn", "edited"])
@pytest.mark.parametrize("speculation", ["off", "ngram"])
def test_graphs_choose_tokens_where_nothing_else_is_wanted_of_logits(
    kinds: list[dict[str, Any]],
    speculation: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    choosing_there: None,
) -> None:
    save_model("llama", tmp_path, max_position_embeddings=160)
    enqueued: list[int] = []
    enqueue = DeviceSampler.enqueue

    def enqueueing(self: DeviceSampler, logits: Tensor, form: SamplingForm) -> None:
        enqueued.append(form.num_rows)
        enqueue(self, logits, form)

    monkeypatch.setattr(DeviceSampler, "enqueue", enqueueing)
    asked = [
        replace(each, sampling=Sampling(**kinds[index % len(kinds)], seed=index))
        for index, each in enumerate(requests())
    ]
    make_runner = partial(graphed, Replaying(), drafts=speculation != "off")
    core = build(tmp_path, make_runner, speculation=speculation)
    found = answers(core, asked)
    assert found == answers(build(tmp_path, speculation=speculation), asked)
    steps = core.load().steps
    if kinds is EDITED:
        assert len(enqueued) > steps // 2
    else:
        # Of steps that compute prompts.
        assert len(enqueued) < steps // 2


def test_a_draft_model_has_graphs_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Drafts then pay where they are right.
    monkeypatch.setattr(StepCost, "observe", lambda *_: None)
    save_model("llama", tmp_path, max_position_embeddings=160)
    models, drafts = Replaying(), Replaying()
    core = build(tmp_path, partial(graphed, models, drafts=True), draft_model_path=str(tmp_path))
    speculator = core._scheduler._speculator
    assert isinstance(speculator, DraftModelSpeculator)
    plain = speculator._runner
    with patch.object(device_runner, "CudaRecorder", lambda device: drafts):
        speculator._runner = make_drafting_runner(
            plain._model,
            plain._kv_cache,
            captures=True,
            vocab_size=VOCAB_SIZE,
            device=torch.device("cpu"),
            block_size=16,
            max_batch_tokens=64,
            max_running_sequences=6,
            max_context_tokens=160,
        )
    assert answers(core) == answers(build(tmp_path, speculation="off"))
    load = core.load()
    assert drafts.replays > load.drafted_tokens / 6  # of six sequences at most, one token each
    assert models.replays > 3
    assert load.accepted_draft_tokens > 0.9 * load.drafted_tokens > 30


@pytest.fixture
def choosing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_runner, "DeviceSampler", partial(DeviceSampler, at_once=False))


@pytest.mark.usefixtures("choosing_there")
def test_a_step_that_decodes_is_a_transfer_and_a_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model("gemma2", tmp_path, max_position_embeddings=160)  # it has two groups of layers
    recorder = Replaying()
    core = build(tmp_path, partial(graphed, recorder, drafts=False), speculation="off")
    core.add([likeliest(number, [3 + number] * 10) for number in range(3)])
    for _ in range(3):
        core.step()
    sent: list[int] = []
    send = DeviceStaging.send

    def sending(self: DeviceStaging, arrays: Any) -> list[Tensor]:
        sent.append(len(arrays))
        return send(self, arrays)

    monkeypatch.setattr(DeviceStaging, "send", sending)
    monkeypatch.setattr(DeviceSampler, "_send", None)
    replays = recorder.replays
    for _ in range(20):
        core.step()
    # They get new blocks meanwhile, and each reads the tokens of the step before.
    assert len(sent) == recorder.replays - replays == 20


@pytest.mark.usefixtures("choosing_there")
def test_who_enters_with_many_blocks_is_heard_of_by_a_graph(tmp_path: Path) -> None:
    save_model("llama", tmp_path, max_position_embeddings=160)
    make_runner = partial(graphed, Replaying(), drafts=False)
    cores = [build(tmp_path, how, speculation="off") for how in (make_runner, None)]
    prompt = [3 + number % (VOCAB_SIZE - 5) for number in range(65)]
    found = []
    for core in cores:
        first = answers(core, [likeliest(0, prompt)])
        core.add([likeliest(1, [5, 6])])
        core.step()
        core.step()
        # All but the last token is cached, in the blocks of another row.
        found.append((first, answers(core, [likeliest(2, prompt)])[2]))
        assert first[0] == found[-1][1]
    assert found[0] == found[1]


def likeliest(sequence_id: int, prompt: list[int]) -> SequenceRequest:
    stopping = Stopping(max_tokens=30, ignore_eos=True)
    return SequenceRequest(sequence_id, prompt, Sampling(temperature=0.0), stopping)


def test_what_cannot_be_captured_is_computed_kernel_by_kernel(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_model("llama", tmp_path, max_position_embeddings=160)
    caplog.set_level(logging.INFO)
    found = answers(build(tmp_path, partial(graphed, Refusing(1), drafts=False)))
    assert "captured 1 of 10 shapes" in caplog.text
    assert "could not be: operation not permitted" in caplog.text
    assert found == answers(build(tmp_path))


class _Config:
    vocab_size = 8


class _Model:
    config = _Config()
    logits_memory: Tensor | None = None


def test_capturing_ends_when_its_time_or_memory_is_used_up() -> None:
    shapes = shapes_to_capture(max_running_sequences=64, max_batch_tokens=64, max_query_length=1)

    class Large(Replaying):
        def num_bytes(self) -> int:
            return 1000

    class Nothing(GraphedModel):
        def capture(self, batch: ForwardBatch, kv_cache: Any) -> None:
            pass

    def done(limits: CaptureLimits, recorder: Replaying) -> tuple[CapturedShape, ...]:
        model = Nothing(_Model(), recorder, shapes, device=torch.device("cpu"))
        return capture_all(model, None, shapes, lambda shape: None, limits)  # type: ignore[arg-type,return-value]

    assert done(CaptureLimits(), Replaying()) == shapes
    assert done(CaptureLimits(num_bytes=999), Large()) == shapes[:1]
    assert done(CaptureLimits(seconds=0.0), Replaying()) == shapes[:1]


def test_the_sizes_that_are_captured_leave_little_to_pad() -> None:
    for most in (1, 3, 8, 33, 64, 256, 300, 512):
        shapes = shapes_to_capture(
            max_running_sequences=most, max_batch_tokens=2048, max_query_length=1
        )
        sizes = sorted(each.num_tokens for each in shapes if each.max_query_length == 1)
        assert sizes[0] == 1
        assert sizes[-1] == most
        assert all(large <= 2 * small for small, large in pairwise(sizes))
        wide = [size for size in sizes if size >= 32]
        assert all(4 * large <= 5 * small for small, large in pairwise(wide))
