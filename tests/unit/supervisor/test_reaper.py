"""The reaper knows what is left from what it was told."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from meshserve.supervisor.reaper import remaining_groups


@given(st.lists(st.tuples(st.booleans(), st.integers(2, 6))))
def test_groups_that_were_added_and_not_removed_remain(events: list[tuple[bool, int]]) -> None:
    expected: set[int] = set()
    for added, group in events:
        if added:
            expected.add(group)
        else:
            expected.discard(group)
    lines = [f"{'+' if added else '-'}{group}\n" for added, group in events]
    assert remaining_groups(lines) == expected


def test_a_line_cut_off_by_death_is_no_signal_to_others() -> None:
    assert remaining_groups(["+12\n", "+\n", "\n", "+0\n", "+1\n", "+x\n", "-1", "+34"]) == {12}
