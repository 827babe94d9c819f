"""Ranks capture steps together, and say by their graphs what one process says."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from services.engine.core import device_runner
from services.engine.core.capturing import CaptureLimits
from services.engine.core.device_runner import make_device_runner
from services.engine.core.engine import EngineCore
from services.engine.core.errors import FatalEngineError
from services.engine.core.graphs import Compute
from services.engine.core.messages import Sampling, SequenceRequest, Stopping
from services.engine.core.parallel import worker, workers
from services.engine.core.parallel.layout import Layout
from services.engine.core.parallel.model import ParallelModel
from services.engine.core.runner import Runner
from services.engine.core.settings import CoreSettings
from services.engine.core.startup import build_engine
from tests.fakes.adapters import add_adapters
from tests.fakes.decoder_families import VOCAB_SIZE, save_model, served
from tests.fakes.native_steps import text
from tests.fakes.recorders import Refusing, Replaying
from tests.fakes.worker_threads import worker_threads

PROMPTS = [text(40), text(14, 1), text(3, 2), text(70, 5)]
ALONE, TWO_RANKS = Layout(1, 1), Layout(2, 1)


def build(
    path: Path,
    layout: Layout = ALONE,
    make_runner: Callable[..., Any] = Runner,
    adapters: dict[str, str] | None = None,
) -> EngineCore:
    settings = CoreSettings(
        model_path=str(path),
        device="cpu",
        threads=1,
        dtype="float32",
        cpu_kernels="off",
        max_context_tokens=160,
        kv_cache_memory_bytes=1 << 20,
        max_running_sequences=4,
        max_batch_tokens=64,
        plan_ahead="on",
        speculation="off",
        tensor_parallel=layout.tensor,
        pipeline_parallel=layout.stages,
        adapters=adapters or {},
    )
    core, _ = build_engine(settings, make_runner=make_runner)
    assert isinstance(core, EngineCore)
    return core


def graphed(path: Path, layout: Layout, adapters: dict[str, str] | None = None) -> EngineCore:
    """A core of ranks that captures as on GPUs."""
    make_runner = partial(
        make_device_runner,
        captures=True,
        drafts=False,
        vocab_size=VOCAB_SIZE,
        graphed=ParallelModel.graphed,
    )
    return build(path, layout, make_runner, adapters)


def answers(core: EngineCore, adapter: str = "") -> dict[int, list[int]]:
    """adapter: of every other request."""
    stopping = Stopping(max_tokens=12, ignore_eos=True)
    core.add(
        [
            SequenceRequest(
                number,
                prompt,
                Sampling(temperature=0.0),
                stopping,
                adapter=adapter if number % 2 else "",
            )
            for number, prompt in enumerate(PROMPTS)
        ]
    )
    found: dict[int, list[int]] = {}
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.finish is None or not delta.finish.error, delta.finish
            found.setdefault(delta.sequence_id, []).extend(delta.token_ids)
    return found


Recorders = Callable[..., list[Replaying]]


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> Recorders:
    """Takes those of the ranks, rank 0's first: others are had in any order."""

    def use(own: Replaying, *others: Replaying) -> list[Replaying]:
        left = list(others)
        monkeypatch.setattr(device_runner, "CudaRecorder", lambda device: own)
        monkeypatch.setattr(worker, "make_recorder", lambda device: left.pop())
        return [own, *others]

    return use


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    save_model("llama", path, **served("llama", max_position_embeddings=160))
    return path


@pytest.mark.parametrize(
    ("family", "layout"),
    [
        ("llama", Layout(2, 1)),
        ("llama", Layout(1, 3)),
        ("llama", Layout(2, 2)),
        ("gemma3", Layout(2, 1)),  # its layers are of two groups
        ("gemma3", Layout(1, 2)),
        ("mixtral", Layout(2, 1)),
        ("gpt2", Layout(1, 2)),
    ],
)
def test_answers_are_the_same(
    family: str, layout: Layout, recorders: Recorders, tmp_path: Path
) -> None:
    save_model(family, tmp_path, **served(family, max_position_embeddings=160))
    used = recorders(*(Replaying() for _ in range(layout.num_ranks)))
    with worker_threads(layout):
        found = answers(graphed(tmp_path, layout))
    assert found == answers(build(tmp_path))
    for each in used:
        assert each.replays == used[0].replays > 3
        assert each.pieces > 3


@pytest.mark.parametrize("layout", [Layout(2, 1), Layout(1, 2)])
def test_answers_through_an_adapter_are_the_same(
    layout: Layout, llama: Path, recorders: Recorders, tmp_path: Path
) -> None:
    config = {"r": 4, "lora_alpha": 64, "target_modules": ["q_proj", "o_proj", "down_proj"]}
    add_adapters(AutoModelForCausalLM.from_pretrained(llama), tmp_path, one=config)
    adapters = {"one": str(tmp_path / "one")}
    used = recorders(Replaying(), Replaying())
    with worker_threads(layout):
        found = answers(graphed(llama, layout, adapters), "one")
    assert found == answers(build(llama, adapters=adapters), "one")
    assert found != answers(build(llama))
    assert used[1].replays == used[0].replays > 3


@pytest.mark.parametrize("failing", [(0,), (1,), (0, 1)])
def test_what_one_rank_cannot_capture_no_rank_computes_by_graphs(
    failing: tuple[int, ...],
    llama: Path,
    recorders: Recorders,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO)
    used = recorders(*(Refusing(2) if rank in failing else Replaying() for rank in range(2)))
    with worker_threads(TWO_RANKS):
        core = graphed(llama, TWO_RANKS)
        found = answers(core)
    assert "captured 2 of 8 shapes" in caplog.text
    assert f"could not be: rank {failing[0]}: RuntimeError: operation not permitted" in caplog.text
    assert found == answers(build(llama))
    assert used[0].replays == used[1].replays > 3


class Slow(Replaying):
    def record(self, compute: Compute) -> Compute:
        time.sleep(0.3)
        return super().record(compute)


class Large(Replaying):
    def num_bytes(self) -> int:
        return 1 << 40


@pytest.mark.parametrize("kind", [Slow, Large])
def test_the_time_and_the_memory_that_one_rank_uses_up_are_used_up_for_all(
    kind: type[Replaying],
    llama: Path,
    recorders: Recorders,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(device_runner, "CaptureLimits", partial(CaptureLimits, seconds=0.3))
    recorders(Replaying(), kind())
    with worker_threads(TWO_RANKS):
        found = answers(graphed(llama, TWO_RANKS))
    assert "captured 1 of 8 shapes" in caplog.text
    assert "time or memory for more is used up" in caplog.text
    assert found == answers(build(llama))


class Broken(Replaying):
    """Fails before it computes anything, where others wait for it."""

    def record(self, compute: Compute) -> Compute:
        raise RuntimeError("out of memory")


@pytest.mark.parametrize(
    ("ranks", "told"),
    [
        ((Replaying, Broken), "rank 1 failed in a step: RuntimeError: out of memory"),
        ((Broken, Replaying), "fail to capture a step together: rank 0: RuntimeError: out of"),
    ],
)
def test_a_rank_that_others_wait_for_in_vain_ends_the_core(
    ranks: tuple[type[Replaying], ...],
    told: str,
    llama: Path,
    recorders: Recorders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(workers, "_ALIKE_S", 0.5)
    recorders(*(each() for each in ranks))
    with worker_threads(TWO_RANKS), pytest.raises(FatalEngineError, match=told):
        graphed(llama, TWO_RANKS)


def test_ranks_that_fail_alike_before_they_exchange_compute_kernel_by_kernel(
    llama: Path, recorders: Recorders, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    recorders(Broken(), Broken())
    with worker_threads(TWO_RANKS):
        found = answers(graphed(llama, TWO_RANKS))
    assert "captured 0 of 8 shapes" in caplog.text
    assert found == answers(build(llama))
