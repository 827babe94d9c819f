"""How models are divided, and which are not."""

from __future__ import annotations

from itertools import chain, pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.engine.core.errors import StartupError
from services.engine.core.layer_groups import LayerGroups
from services.engine.core.model_config import ExpertsConfig, ModelConfig
from services.engine.core.parallel.environment import Meeting, rank_of_worker, ranks_of_machine
from services.engine.core.parallel.layout import (
    Layout,
    check_layout,
    shard_config,
    share_of_vocabulary,
)
from services.engine.core.parallel.partition import Partition
from services.engine.core.parallel.stages import Costs, divide_layers, stage_groups


def config(**fields: object) -> ModelConfig:
    known = {
        "architecture": "LlamaForCausalLM",
        "num_layers": 4,
        "hidden_size": 48,
        "intermediate_size": 96,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 8,
        "vocab_size": 97,
        "max_context_tokens": 64,
        "norm_eps": 1e-5,
        "rope": None,
    }
    return ModelConfig(**(known | fields))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "tensor", "problem"),
    [
        ({}, 4, r"does not divide the model's heads \(6\); numbers that do: 1, 2, 6"),
        ({"intermediate_size": 93}, 2, r"does not divide the model's intermediate_size \(93\)"),
        ({"heads": 12, "kv_heads": 4}, 3, r"KV heads \(4\).* numbers that fit: 1, 2, 4, 12"),
        (
            {"experts": ExpertsConfig(4, 2, 33, normalize=True)},
            2,
            r"intermediate_size of an expert \(33\)",
        ),
    ],
)
def test_a_model_that_does_not_divide_is_refused_with_what_would(
    fields: dict[str, object], tensor: int, problem: str
) -> None:
    with pytest.raises(StartupError, match=problem):
        check_layout(config(**fields), Layout(tensor, 1))


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(StartupError, match="pipeline_parallel is 5, but the model has 4 layers"):
        check_layout(config(), Layout(1, 5))


def test_a_feed_forward_size_that_no_layer_has_does_not_matter() -> None:
    experts = ExpertsConfig(4, 2, 32, normalize=True)
    check_layout(config(intermediate_size=93, experts=experts), Layout(2, 1))


def flat(lists: list[list[int]]) -> list[int]:
    return [*chain.from_iterable(lists)]


@settings(max_examples=60)
@given(
    kv_heads=st.sampled_from([1, 2, 3, 4, 8]),
    queries=st.sampled_from([1, 2, 4, 8]),
    tensor=st.sampled_from([1, 2, 3, 4, 8]),
    vocab_size=st.integers(1, 300),
)
def test_ranks_have_all_of_a_model_and_each_part_once(
    kv_heads: int, queries: int, tensor: int, vocab_size: int
) -> None:
    heads = kv_heads * queries
    whole = config(heads=heads, kv_heads=kv_heads, intermediate_size=24, vocab_size=vocab_size)
    layout = Layout(tensor, 1)
    try:
        check_layout(whole, layout)
    except StartupError:
        return
    parts = [Partition(whole, layout.place(rank)) for rank in range(tensor)]
    own = shard_config(whole, tensor)

    def rows(name: str) -> list[list[int]]:
        return [[row for each in part.cut(name).ranges for row in each] for part in parts]  # type: ignore[union-attr]

    q = rows("layers.3.attention.q.weight")
    assert flat(q) == list(range(heads * 8))
    assert {len(each) for each in q} == {own.heads * 8}
    # Each query head is where its KV head is.
    for queries_of, keys_of in zip(q, rows("layers.3.attention.k.bias"), strict=True):
        assert len(keys_of) == own.kv_heads * 8
        assert [keys_of[0] // 8 + index for index in range(own.kv_heads)] == sorted(
            {row // 8 // queries for row in queries_of}
        )
    assert flat(rows("embedding.weight")) == list(range(vocab_size))
    assert max(map(len, rows("head.weight"))) <= share_of_vocabulary(vocab_size, tensor)
    assert flat(rows("layers.0.feed_forward.down.weight")) == list(range(24))
    # Of the two matrices that are stored as one, a rank has the same rows.
    for both in rows("layers.0.feed_forward.gate_up.weight"):
        half = len(both) // 2
        assert [row + 24 for row in both[:half]] == both[half:]
    assert [part.leaves_bias_to_others("layers.0.attention.output") for part in parts] == [
        rank != 0 for rank in range(tensor)
    ]


@settings(max_examples=60)
@given(
    layers=st.lists(st.integers(1, 50), min_size=2, max_size=9),
    free=st.lists(st.integers(60, 900), min_size=2, max_size=3),
    ends=st.tuples(st.integers(0, 60), st.integers(0, 60)),
)
def test_stages_hold_the_most_tokens_that_any_division_does(
    layers: list[int], free: list[int], ends: tuple[int, int]
) -> None:
    free = free[: len(layers)]
    costs = Costs(tuple(layers), *ends, layer_block=3)
    groups = LayerGroups.single(len(layers))

    def rows(bounds: tuple[int, ...]) -> int:
        found = []
        for stage, (start, stop) in enumerate(pairwise(bounds)):
            spare = free[stage] - costs.weights(range(start, stop), len(layers))
            found.append(int(spare * 0.5) // (3 * (stop - start)) if spare > 0 else -1)
        return min(found)

    cuts = range(1, len(layers))
    every = [(0, a, len(layers)) for a in cuts]
    if len(free) == 3:
        every = [(0, a, b, len(layers)) for a in cuts for b in cuts if a < b]
    best = max(map(rows, every))
    if best < 0:
        with pytest.raises(StartupError, match="use more ranks"):
            divide_layers(costs, groups, free, fraction=0.5, enough_rows=1000)
        return
    stages = divide_layers(costs, groups, free, fraction=0.5, enough_rows=1000)
    bounds = (*(stage.start for stage in stages), stages[-1].stop)
    assert bounds[0] == 0
    assert bounds[-1] == len(layers)
    assert rows(bounds) == best


def test_stages_with_room_enough_have_the_like_amount_of_weights() -> None:
    # The head is as large as three layers.
    costs = Costs((10,) * 8, first=0, last=30, layer_block=1)
    stages = divide_layers(
        costs, LayerGroups.single(8), [10_000, 10_000], fraction=0.5, enough_rows=10
    )
    assert [len(stage) for stage in stages] in ([5, 3], [6, 2])


def test_a_stage_keeps_the_groups_of_all_layers_with_places_for_its_own() -> None:
    groups = LayerGroups((None, 8), (0, 1, 0, 1, 1, 0), (0, 0, 1, 1, 2, 2), 3)
    own = stage_groups(groups, range(3, 6))
    assert own.windows == groups.windows
    assert own.group_of_layer == groups.group_of_layer
    assert own.layers_per_block == 2
    assert [own.place_of_layer[layer] for layer in range(3, 6)] == [0, 1, 0]


def test_ranks_of_one_machine_meet_on_it_alone() -> None:
    meeting = Meeting.of_leader(4, "secret", {})
    assert (meeting.address, meeting.port, meeting.local_ranks) == ("127.0.0.1", 0, 4)
    variables = meeting.variables(3)
    assert Meeting.of_worker(variables) == meeting
    assert rank_of_worker(variables) == 3
    assert variables["LOCAL_RANK"] == "3"
    assert meeting.was_started_by_leader


def test_ranks_of_several_machines_meet_where_torchrun_says() -> None:
    variables = {"MASTER_ADDR": "leader", "MASTER_PORT": "29500", "LOCAL_WORLD_SIZE": "8"}
    meeting = Meeting.of_leader(16, "unused", variables)
    assert (meeting.address, meeting.port, meeting.local_ranks) == ("leader", 29500, 8)
    assert meeting.variables(9)["LOCAL_RANK"] == "1"
    assert Meeting.of_worker(variables) == meeting
    assert not meeting.was_started_by_leader
    assert ranks_of_machine(meeting, {"GROUP_RANK": "1"}) == range(8, 16)


def test_ranks_of_a_leader_worker_set_meet_at_its_leader() -> None:
    variables = {
        "LWS_LEADER_ADDRESS": "mesh-0.mesh",
        "LWS_WORKER_INDEX": "2",
        "MASTER_PORT": "29500",
        "LOCAL_WORLD_SIZE": "4",
    }
    meeting = Meeting.of_worker(variables)
    assert meeting == Meeting.of_leader(12, "unused", variables)
    assert meeting.address == "mesh-0.mesh"
    assert ranks_of_machine(meeting, variables) == range(8, 12)


def test_a_machine_that_is_not_told_enough_says_what_it_lacks() -> None:
    with pytest.raises(StartupError, match="MASTER_ADDR, MASTER_PORT, LOCAL_WORLD_SIZE must"):
        Meeting.of_worker({})
    with pytest.raises(StartupError, match="GROUP_RANK must be set"):
        ranks_of_machine(Meeting("leader", 1, 8, ""), {})


@pytest.mark.parametrize(
    ("variables", "problem"),
    [
        ({"LOCAL_WORLD_SIZE": "3"}, "machines cannot have so many each of 4 ranks"),
        ({"LOCAL_WORLD_SIZE": "2"}, "set MASTER_ADDR and MASTER_PORT"),
        ({"LOCAL_WORLD_SIZE": "two"}, "LOCAL_WORLD_SIZE is 'two', and should be a number"),
    ],
)
def test_an_environment_that_contradicts_the_layout_is_refused(
    variables: dict[str, str], problem: str, tmp_path: Path
) -> None:
    with pytest.raises(StartupError, match=problem):
        Meeting.of_leader(4, "", variables)
