"""Layers share blocks by what they see, and a sequence is counted by what it takes of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import hypothesis.strategies as st
import pytest
from hypothesis import given

from services.engine.core.layer_groups import LayerGroups
from services.engine.core.model_config import ModelConfig, SparseAttention, Window
from services.engine.core.table_shape import TableShape
from tests.fakes.hash_model import positions_seen

CONTEXT = 32_768
SPARSE = st.builds(SparseAttention, st.integers(1, 90), st.integers(0, 40))


def config(windows: tuple[int | None, ...], context: int = CONTEXT) -> ModelConfig:
    return ModelConfig(
        "x", len(windows), 64, 64, 4, 2, 16, 99, context, 1e-5, None, windows=windows
    )


def every(period: int, window: int, num_layers: int) -> tuple[int | None, ...]:
    """One layer of so many sees all."""
    return tuple(None if index % period == period - 1 else window for index in range(num_layers))


@pytest.mark.parametrize(
    ("windows", "expected"),
    [
        ((None,) * 12, (None,)),
        ((4096,) * 32, (4096,)),
        ((CONTEXT,) * 12, (None,)),  # it hides nothing
        (every(2, 4096, 26), (None, 4096)),
        (every(6, 1024, 34), (None, *(1024,) * 6)),
        ((None,) * 27 + (4096,), (None,)),  # nothing to speak of is saved
    ],
)
def test_layers_that_see_the_same_form_groups(
    windows: tuple[int | None, ...], expected: tuple[int | None, ...]
) -> None:
    assert LayerGroups.of(config(windows)).windows == expected


@pytest.mark.parametrize(
    ("windows", "sparse", "expected"),
    [
        ((None,) * 12, SparseAttention(4096, 64), (SparseAttention(4096, 64),)),
        ((None,) * 12, SparseAttention(CONTEXT - 64, 64), (None,)),  # it hides nothing
        (
            every(2, 4096, 26),
            SparseAttention(8192, 64),
            (SparseAttention(8192, 64), 4096),
        ),
    ],
)
def test_layers_that_would_see_all_give_back_what_a_sparse_pattern_hides(
    windows: tuple[int | None, ...], sparse: SparseAttention, expected: tuple[Window | None, ...]
) -> None:
    chosen = replace(config(windows), sparse_attention=sparse)
    assert LayerGroups.of(chosen).windows == expected


windows_of_layers = st.lists(
    st.sampled_from([None, None, 512, 4096, CONTEXT]), min_size=1, max_size=40
)


@given(windows=windows_of_layers)
def test_every_layer_has_a_place_of_its_own_in_blocks_that_keep_what_it_sees(
    windows: list[int | None],
) -> None:
    groups = LayerGroups.of(config(tuple(windows)))
    places = Counter(zip(groups.group_of_layer, groups.place_of_layer, strict=True))
    assert set(places.values()) == {1}
    assert max(groups.place_of_layer) < groups.layers_per_block
    assert len(groups.windows) <= 8
    for window, group in zip(windows, groups.group_of_layer, strict=True):
        kept = groups.windows[group]
        assert kept is None or (window is not None and window <= kept)


@given(
    block_size=st.sampled_from([1, 4, 16]),
    windows=st.lists(st.none() | st.integers(1, 90) | SPARSE, min_size=1, max_size=4),
    step_tokens=st.integers(1, 70),
    num_tokens=st.integers(1, 400),
)
def test_what_a_sequence_needs_holds_what_each_of_its_steps_sees(
    block_size: int, windows: list[Window | None], step_tokens: int, num_tokens: int
) -> None:
    shape = TableShape.of_steps(block_size, tuple(windows), step_tokens)
    needed = shape.blocks_for(num_tokens)
    for begin in range(num_tokens):
        end = min(begin + step_tokens, num_tokens)
        seen = 0
        for window in windows:
            # Of a group that sees all, those of the whole prompt are taken at once.
            positions = (
                range(num_tokens)
                if window is None
                else positions_seen(end, window, queries=end - begin)
            )
            seen += len({position // block_size for position in positions})
        assert seen <= needed


@given(
    windows=st.lists(st.none() | st.integers(1, 90) | SPARSE, min_size=1, max_size=4),
    num_blocks=st.integers(1, 200),
)
def test_a_pool_holds_the_longest_sequence_that_it_is_said_to(
    windows: list[Window | None], num_blocks: int
) -> None:
    shape = TableShape.of_steps(4, tuple(windows), 8)
    most = shape.most_tokens(num_blocks, 1000)
    assert most == 0 or shape.blocks_for(most) <= num_blocks
    assert most == 1000 or shape.blocks_for(most + 1) > num_blocks


@given(
    sparse=SPARSE,
    block_size=st.sampled_from([1, 4, 16]),
    num_tokens=st.integers(1, 400),
    num_computed=st.integers(0, 400),
)
def test_what_a_pattern_gives_back_is_what_no_later_token_sees(
    sparse: SparseAttention, block_size: int, num_tokens: int, num_computed: int
) -> None:
    (sliding,) = TableShape(block_size, (sparse,)).slidings
    end = num_computed + num_tokens
    seen = {each // block_size for each in positions_seen(end, sparse, queries=num_tokens)}
    slid = set(range(sliding.kept_rows, sliding.slid_end(num_computed)))
    assert not seen & slid
    rows = set(range(-(-end // block_size)))
    beginning = set(range(sliding.kept_rows))
    assert rows - seen - slid <= beginning
