"""Captured steps serve adapters that come and go, and those without any are captured apart.

As in test_graphs, what a GPU would replay is computed anew from captured memory. What adapters do
is computed here as kernels do it: from addresses in a table, by launches that were there when the
step was captured.
"""

from __future__ import annotations

import ctypes
import random
from collections import Counter
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from torch import Tensor

from services.engine.core.batch import CapturedShape, ForwardBatch
from services.engine.core.capturing import shapes_to_capture
from services.engine.core.engine import EngineCore
from services.engine.core.graphs import GraphedModel
from services.engine.core.kernels import SlottedParts
from services.engine.core.layers import adapters as module
from services.engine.core.messages import LoadAdapter, SequenceRequest, UnloadAdapter
from tests.fakes.adapters import add_adapters
from tests.fakes.decoder_families import save_model
from tests.fakes.recorders import Replaying
from tests.unit.engine_core.test_graphs import (
    FAMILIES,
    answers,
    build,
    graphed,
    requests,
)

TARGETS = {"gpt2": ["c_attn", "c_proj", "c_fc"], "qwen3-moe": ["q_proj", "v_proj", "o_proj"]}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Launches:
    """`add_low_ranks` as kernels compute it: of adapters they know nothing but the table."""

    def __init__(self) -> None:
        self.made: Counter[tuple[Any, ...]] = Counter()

    def __call__(
        self, projected: Tensor, hidden: Tensor, grouped: Tensor, adapters: SlottedParts
    ) -> Tensor:
        table = adapters.table
        places = table.data_ptr(), table.shape, adapters.max_rank
        self.made[projected.shape, hidden.shape, *places] += 1
        tokens, slots = grouped
        for slot in {*slots.tolist()} - {-1}:
            rows = tokens[slots == slot]
            for down, up, rank, first, count in table[slot].tolist():
                if rank:
                    low = hidden[rows] @ _at(down, rank, hidden.shape[1]).T
                    projected[rows, first : first + count] += low @ _at(up, count, rank).T
        return projected


def _at(address: int, rows: int, columns: int) -> Tensor:
    """A matrix of float32 that lies at an address."""
    memory = (ctypes.c_float * (rows * columns)).from_address(address)
    return torch.frombuffer(memory, dtype=torch.float32).view(rows, columns)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    made = Launches()
    monkeypatch.setattr(module, "add_low_ranks", made)
    return made


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[CapturedShape | None]]:
    """How often each captured shape was computed; None: what was not captured."""
    taken: Counter[CapturedShape | None] = Counter()
    inner = GraphedModel.__call__

    def call(self: GraphedModel, batch: ForwardBatch, kv_cache: Any) -> Tensor:
        taken[batch.captured] += 1
        assert (batch.token_adapters is not None) == (
            batch.captured is not None and batch.captured.has_adapters
        )
        if batch.token_adapters is not None and not batch.are_bounds:
            assert (batch.token_adapters[sum(batch.query_lengths) :] == -1).all()
        return inner(self, batch, kv_cache)

    monkeypatch.setattr(GraphedModel, "__call__", call)
    return taken


def save_adapters(family: str, path: Path) -> dict[str, str]:
    """A model, and three adapters of other ranks and of other projections."""
    model = save_model(family, path, max_position_embeddings=160)
    targets = TARGETS.get(family, ALL)
    config = {"lora_alpha": 64}
    add_adapters(
        model,
        path / "adapters",
        one=config | {"r": 4, "target_modules": targets},
        two=config | {"r": 17, "target_modules": targets[:2]},
        late=config | {"r": 24, "target_modules": targets[1:]},
    )
    return {name: str(path / "adapters" / name) for name in ("one", "two", "late")}


def asking(names: list[str]) -> list[SequenceRequest]:
    """The requests of test_graphs through these adapters in turn, by chance: small models say the
    same over and over when they say what is likeliest."""
    return [
        structs.replace(
            each,
            adapter=names[index % len(names)],
            sampling=structs.replace(each.sampling, temperature=1.0, seed=index),
        )
        for index, each in enumerate(requests())
    ]


def change(core: EngineCore, *commands: LoadAdapter | UnloadAdapter) -> None:
    """Load and unload, and wait for it."""
    for command in commands:
        core.change_adapter(command)
        changes: list[Any] = []
        while not changes:
            changes = core.adapter_changes()
        assert not changes[0].error_kind, changes[0]


@pytest.mark.parametrize("speculation", ["off", "ngram"])
@pytest.mark.parametrize("family", FAMILIES)
def test_answers_are_those_of_the_path_of_a_cpu(
    family: str,
    speculation: Any,
    tmp_path: Path,
    launches: Launches,
    steps: Counter[CapturedShape | None],
) -> None:
    paths = save_adapters(family, tmp_path)
    settings: dict[str, Any] = {"max_adapters": 2, "speculation": speculation}
    settings["adapters"] = {name: paths[name] for name in ("one", "two")}
    recorder = Replaying()
    make_runner = partial(graphed, recorder, drafts=speculation != "off")
    core, plain = build(tmp_path, make_runner, **settings), build(tmp_path, **settings)
    assert answers(core) == answers(plain)
    assert not any(shape is None or shape.has_adapters for shape in steps), "nobody had any"
    captured = {*launches.made}
    mixed = ["one", "", "two"]
    found = answers_of(core, asking(mixed))
    assert found == answers_of(plain, asking(mixed))
    assert found != answers_of(plain, asking([""]))
    adapted = [shape for shape in steps if shape is not None and shape.has_adapters]
    assert {shape.max_query_length for shape in adapted} >= {1, None}
    # Others come, of larger ranks and of projections that none was of, and some go.
    swap = UnloadAdapter(1, "one"), LoadAdapter(2, "late", paths["late"])
    for each in (core, plain):
        change(each, *swap)
    later = ["late", "two", "late", ""]
    late = answers_of(core, asking(later))
    assert late == answers_of(plain, asking(later))
    assert late != answers_of(plain, asking(["", "two", "", ""]))
    assert not steps[None]
    assert {*launches.made} == captured, "an adapter has changed what is launched"


def answers_of(core: EngineCore, made: list[SequenceRequest]) -> dict[int, list[int]]:
    """As `answers`, of other requests."""
    core.add(made)
    found: dict[int, list[int]] = {}
    while core.has_work:
        for delta in core.step().deltas:
            assert delta.finish is None or not delta.finish.error, delta.finish
            found.setdefault(delta.sequence_id, []).extend(delta.token_ids)
        core.check_integrity()
    return found


def test_adapters_come_and_go_between_steps_of_those_who_stay(
    tmp_path: Path, launches: Launches, steps: Counter[CapturedShape | None]
) -> None:
    paths = save_adapters("llama", tmp_path)
    settings: dict[str, Any] = {"max_adapters": 3, "adapters": {"one": paths["one"]}}
    settings["speculation"] = "off"
    core = build(tmp_path, partial(graphed, Replaying(), drafts=False), **settings)
    expected = answers_of(build(tmp_path, **settings), asking(["one", ""]))
    chance = random.Random(7)
    core.add(asking(["one", ""]))
    found: dict[int, list[int]] = {}
    loaded: set[str] = set()
    number = 0
    while core.has_work:
        for delta in core.step().deltas:
            found.setdefault(delta.sequence_id, []).extend(delta.token_ids)
        if chance.random() < 0.4:
            name = chance.choice(["two", "late"])
            number += 1
            if name in loaded:
                change(core, UnloadAdapter(number, name))
            else:
                change(core, LoadAdapter(number, name, paths[name]))
            loaded ^= {name}
    assert number > 3
    assert found == expected
    assert not steps[None]


def test_padding_goes_through_no_adapter(tmp_path: Path) -> None:
    save_model("llama", tmp_path, max_position_embeddings=160)
    core = build(tmp_path, partial(graphed, Replaying(), drafts=True), max_adapters=2)
    assert core._overlapping is not None
    runner = core._overlapping._runner
    for shape in runner._shapes:
        slots = runner._inputs.padding(shape).token_adapters
        assert (slots is not None) == shape.has_adapters
        assert slots is None or slots.tolist() == [-1] * shape.num_tokens


def test_shapes_with_adapters_come_last_and_are_fewer() -> None:
    for most in (1, 3, 8, 64, 100, 512):
        shapes = shapes_to_capture(
            max_running_sequences=most,
            max_batch_tokens=2048,
            max_query_length=16,
            takes_adapters=True,
        )
        order = [each.has_adapters for each in shapes]
        assert order == sorted(order)
        assert len({*shapes}) == len(shapes)
        plain = {each.num_tokens for each in shapes if not each.has_adapters}
        assert plain >= {each.num_tokens for each in shapes if each.has_adapters} - {96, 192, 384}
        sizes = sorted(
            each.num_tokens for each in shapes if each.has_adapters and each.max_query_length == 1
        )
        assert sizes[0] == 1
        assert sizes[-1] == most
        assert all(large <= 2 * small for small, large in pairwise(sizes))
