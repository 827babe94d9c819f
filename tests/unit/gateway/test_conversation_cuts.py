"""A conversation that is too long loses its oldest turns, and nothing else."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from meshserve.v1 import types_pb2
from services.gateway.conversation_cuts import longest_that_fits

ROLES = {
    "s": types_pb2.ROLE_SYSTEM,
    "u": types_pb2.ROLE_USER,
    "a": types_pb2.ROLE_ASSISTANT,
    "t": types_pb2.ROLE_TOOL,
}


def conversation(spoken: str) -> types_pb2.Conversation:
    """One message for each letter, whose content is its place."""
    return types_pb2.Conversation(
        messages=[
            types_pb2.ChatMessage(role=ROLES[role], content=str(place))
            for place, role in enumerate(spoken)
        ],
        tools=[types_pb2.Tool(name="kept")],
    )


async def cut(spoken: str, room: int) -> list[int]:
    """The places of the messages that are left; each is a token."""
    renderings = 0

    async def render(left: types_pb2.Conversation) -> list[int]:
        nonlocal renderings
        renderings += 1
        assert left.tools[0].name == "kept"
        return [int(message.content) for message in left.messages]

    kept = await longest_that_fits(conversation(spoken), room, render)
    assert renderings <= 2 + len(spoken).bit_length()
    return kept


async def test_what_fits_is_left_alone() -> None:
    assert await cut("suaua", 5) == [0, 1, 2, 3, 4]


async def test_instructions_and_the_latest_turns_are_kept() -> None:
    assert await cut("ssuauatau", 6) == [0, 1, 8]
    assert await cut("ssuauatau", 7) == [0, 1, 4, 5, 6, 7, 8]
    assert await cut("uauau", 4) == [2, 3, 4]


async def test_the_last_turn_is_what_is_left_at_least() -> None:
    assert await cut("suauaa", 1) == [0, 3, 4, 5]
    assert await cut("su", 1) == [0, 1]


@given(
    instructions=st.integers(0, 2),
    turns=st.lists(st.sampled_from(["ua", "uata", "u", "uaa"]), min_size=1, max_size=12),
    room=st.integers(1, 40),
)
async def test_no_turn_is_dropped_that_would_have_fitted(
    instructions: int, turns: list[str], room: int
) -> None:
    kept = await cut("s" * instructions + "".join(turns), room)
    sizes = [len(turn) for turn in turns]
    fitting = [
        first for first in range(len(turns)) if instructions + sum(sizes[first:]) <= room
    ] or [len(turns) - 1]
    start = instructions + sum(sizes[: fitting[0]])
    assert kept == [*range(instructions), *range(start, instructions + sum(sizes))]
