"""Layers share blocks by what they see, and a sequence is counted by what it takes of them."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
import pytest
from hypothesis import given

from services.engine.core.layer_groups import LayerGroups
from services.engine.core.model_config import ModelConfig
from services.engine.core.table_shape import TableShape

CONTEXT = 32_768


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
    windows=st.lists(st.none() | st.integers(1, 90), min_size=1, max_size=4),
    step_tokens=st.integers(1, 70),
    num_tokens=st.integers(1, 400),
)
def test_what_a_sequence_needs_holds_what_each_of_its_steps_sees(
    block_size: int, windows: list[int | None], step_tokens: int, num_tokens: int
) -> None:
    shape = TableShape.of_steps(block_size, tuple(windows), step_tokens)
    needed = shape.blocks_for(num_tokens)
    for begin in range(num_tokens):
        end = min(begin + step_tokens, num_tokens)
        seen = 0
        for window in windows:
            first = 0 if window is None else max(0, begin - window + 1)
            # Of a group that sees all, those of the whole prompt are taken at once.
            last = num_tokens if window is None else end
            seen += (last - 1) // block_size - first // block_size + 1
        assert seen <= needed


@given(
    windows=st.lists(st.none() | st.integers(1, 90), min_size=1, max_size=4),
    num_blocks=st.integers(1, 200),
)
def test_a_pool_holds_the_longest_sequence_that_it_is_said_to(
    windows: list[int | None], num_blocks: int
) -> None:
    shape = TableShape.of_steps(4, tuple(windows), 8)
    most = shape.most_tokens(num_blocks, 1000)
    assert most == 0 or shape.blocks_for(most) <= num_blocks
    assert most == 1000 or shape.blocks_for(most + 1) > num_blocks
