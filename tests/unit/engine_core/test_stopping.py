"""When sequences end."""

from __future__ import annotations

from array import array

import hypothesis.strategies as st
import pytest
from hypothesis import given

from services.engine.core.messages import Finish, FinishReason, Stopping
from services.engine.core.stopping import StopChecker

EOS = (2, 3)


def finish_of(stopping: Stopping, output: list[int], prompt: tuple[int, ...] = (9,)) -> Finish:
    """How a sequence with this output ends, which must be at its last token and not before."""
    checker = StopChecker(stopping, eos_token_ids=EOS, max_tokens=stopping.max_tokens or 100)
    tokens = array("q", prompt)
    for token in output[:-1]:
        tokens.append(token)
        assert checker.check(tokens, len(prompt)) is None
    tokens.append(output[-1])
    finish = checker.check(tokens, len(prompt))
    assert finish is not None
    return finish


def test_any_end_of_sequence_token_ends_it() -> None:
    for eos in EOS:
        assert finish_of(Stopping(), [5, eos]) == Finish(FinishReason.STOP, stop_token_id=eos)


def test_ignored_ends_do_not_end_it() -> None:
    stopping = Stopping(ignore_eos=True, max_tokens=3)
    assert finish_of(stopping, [2, 3, 2]) == Finish(FinishReason.LENGTH)


def test_a_stop_token_is_named() -> None:
    stopping = Stopping(stop_token_ids=(6,), ignore_eos=True)
    assert finish_of(stopping, [2, 6]) == Finish(FinishReason.STOP, stop_token_id=6)


def test_a_stop_on_the_last_allowed_token_is_a_stop() -> None:
    assert finish_of(Stopping(max_tokens=2), [5, 2]).reason is FinishReason.STOP


def test_a_stop_sequence_must_lie_in_the_output_alone() -> None:
    stopping = Stopping(stop_sequences=((9, 5),))
    assert finish_of(stopping, [5, 9, 5], prompt=(9,)).stop_sequence_index == 0


def test_before_min_tokens_ends_are_barred_and_stop_sequences_do_not_count() -> None:
    stopping = Stopping(min_tokens=3, stop_token_ids=(6,), stop_sequences=((7,),))
    checker = StopChecker(stopping, eos_token_ids=EOS, max_tokens=100)
    assert [checker.barred_token_ids(count) for count in (0, 2, 3)] == [{2, 3, 6}, {2, 3, 6}, set()]
    assert finish_of(stopping, [7, 7, 7]).stop_sequence_index == 0


small = st.integers(10, 12)


@given(
    output=st.lists(small, min_size=1, max_size=30),
    stops=st.lists(st.lists(small, min_size=1, max_size=4).map(tuple), max_size=5).map(tuple),
)
def test_stop_sequences_are_found_where_a_plain_search_finds_them(
    output: list[int], stops: tuple[tuple[int, ...], ...]
) -> None:
    checker = StopChecker(Stopping(stop_sequences=stops), eos_token_ids=EOS, max_tokens=1000)
    tokens = array("q", [10, 11])
    for count in range(1, len(output) + 1):
        tokens.append(output[count - 1])
        ends = [stop for stop in stops if tuple(output[:count][-len(stop) :]) == stop]
        finish = checker.check(tokens, 2)
        assert (finish is not None) == bool(ends)
        if finish is not None:
            assert finish.stop_sequence_index is not None
            assert stops[finish.stop_sequence_index] in ends
            break


def test_many_stop_sequences_cost_one_look_up() -> None:
    stops = tuple((index, index + 1) for index in range(20, 5000))
    checker = StopChecker(Stopping(stop_sequences=stops), eos_token_ids=EOS, max_tokens=10)
    assert len(checker._by_last_token[30]) == 1
    with pytest.raises(KeyError):
        checker._by_last_token[5]
