"""What ranks find out together before an engine serves: how much memory there is, and which kernels
are the fastest."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from services.engine.core.errors import StartupError
from services.engine.core.gpu_memory import Readings
from services.engine.core.kernels import choice
from services.engine.core.kernels.choice import Choice, Signature
from services.engine.core.layer_groups import LayerGroups
from services.engine.core.models.loader import open_model
from services.engine.core.parallel import backend, rank, worker
from services.engine.core.parallel.backend import ParallelBackend, start_workers
from services.engine.core.parallel.layout import Layout
from services.engine.core.profiling import run_largest_steps
from services.engine.core.settings import CoreSettings
from tests.fakes.decoder_families import save_model, served
from tests.fakes.worker_threads import worker_threads

CPU = torch.device("cpu")
MIB = 1 << 20
# Keys and values of four layers of two heads, of which a rank has one, of 16 dimensions, for 16
# tokens in float32.
ROW_BYTES = 2 * 4 * 16 * 16 * 4


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[tuple[CoreSettings, ParallelBackend]]:
    """Two ranks of a model, its weights loaded."""
    save_model("llama", tmp_path, **served("llama"))
    settings = CoreSettings(
        model_path=str(tmp_path),
        device="cpu",
        dtype="float32",
        threads=1,
        cpu_kernels="off",
        tensor_parallel=2,
        max_batch_tokens=32,
        max_running_sequences=8,
        kv_cache_memory_fraction=0.5,
    )
    with worker_threads(Layout(2, 1)):
        workers = start_workers(settings)
        assert workers is not None
        opened = open_model(tmp_path)
        yield settings, ParallelBackend(opened, settings, CPU, [], workers)


class Card:
    """A card of 64 MiB of which others take eight, and a step what it is told."""

    def __init__(self, step_bytes: int) -> None:
        self._step_bytes = step_bytes
        self.readings = 0

    def reset(self) -> None:
        pass

    def read(self) -> Readings:
        self.readings += 1
        held = 16 * MIB
        step = 0 if self.readings == 1 else self._step_bytes
        return Readings(64 * MIB, 40 * MIB, held, held + step)


def watched(
    ranks: tuple[CoreSettings, ParallelBackend],
    step_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    graphs_bytes: int = 0,
) -> int:
    """The rows for which rank 1 finds room, beside a step that takes so many bytes there."""
    settings, made = ranks
    card = Card(step_bytes)
    monkeypatch.setattr(rank, "make_reader", lambda device: card)
    groups = LayerGroups.single(4)
    made.profile()
    model, kv_cache = made.allocate(1, settings, groups)
    run_largest_steps(
        model, kv_cache, settings, device=CPU, max_context_tokens=64, cached_tokens=640
    )
    rows = made.count_rows(graphs_bytes)
    assert card.readings == 2
    return rows


def test_a_rank_has_room_for_what_the_largest_step_leaves(
    ranks: tuple[CoreSettings, ParallelBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Half of 64 MiB, less 8 of others and 16 of weights.
    left = 8 * MIB - 7 * MIB - MIB // 2
    assert watched(ranks, 7 * MIB, monkeypatch, MIB // 2) == left // ROW_BYTES


def test_a_rank_without_room_beside_the_largest_step_says_so(
    ranks: tuple[CoreSettings, ParallelBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StartupError, match="rank 1: a KV cache of 1 bytes holds no block"):
        watched(ranks, 9 * MIB, monkeypatch)


def test_ranks_go_by_what_is_fastest_on_the_slowest_of_them(
    ranks: tuple[CoreSettings, ParallelBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    product: Signature = ("linear", torch.float32, 64, 64, 32)
    told = []

    def tune(seconds: dict[str, float]) -> object:
        def measured(matrices: Iterator[torch.Tensor], dtype: torch.dtype) -> list[Choice]:
            assert {each.shape[0] for each in matrices} >= {64, 56}  # projections, and the head
            return [Choice(product, 1, seconds)]

        return measured

    def go_by(choices: list[Choice]) -> None:
        told.append((threading.current_thread() is threading.main_thread(), choices))

    monkeypatch.setattr(backend, "tune", tune({"cuda": 1.0, "triton": 3.0}))
    monkeypatch.setattr(worker, "tune", tune({"cuda": 5.0, "triton": 4.0}))
    monkeypatch.setattr(backend, "go_by", go_by)
    monkeypatch.setattr(worker, "go_by", go_by)
    ranks[1].tune()
    ranks[1].count_rows(0)  # answered, once all before it has been done
    expected = [Choice(product, 1, {"cuda": 5.0, "triton": 4.0})]
    assert sorted(told, key=lambda each: each[0]) == [(False, expected), (True, expected)]


def test_measured_choices_replace_all_that_were_before() -> None:
    product: Signature = ("linear", torch.float32, 64, 64, 32)
    other: Signature = ("linear", torch.float32, 32, 64, 32)
    weight = torch.empty(64, 64)
    try:
        choice.go_by([Choice(other, 1, {"cuda": 1.0}), Choice(product, 1, {"triton": 1.0})])
        assert not choice.streams("linear", torch.empty(1, 64), weight)
        choice.go_by([Choice(other, 1, {"cuda": 1.0})])
        assert choice.streams("linear", torch.empty(1, 64), weight)  # by the rule
    finally:
        choice.forget()
