"""Shortens a conversation that does not fit, by whole turns, its oldest first."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from meshserve.v1 import types_pb2

_INSTRUCTIONS = (types_pb2.ROLE_SYSTEM, types_pb2.ROLE_DEVELOPER)


def shortened(conversation: types_pb2.Conversation) -> list[types_pb2.Conversation]:
    """What is left of a conversation with ever more of its oldest turns dropped, all of it first.

    A turn begins with a message of the user, so no answer stands without its question and no result
    without its call. Instructions that stand before the first turn are kept, and so is the last
    turn.
    """
    messages = conversation.messages
    kept = 0
    while kept < len(messages) and messages[kept].role in _INSTRUCTIONS:
        kept += 1
    turns = [
        index
        for index in range(kept + 1, len(messages))
        if messages[index].role == types_pb2.ROLE_USER
    ]
    shorter = [conversation]
    for start in turns:
        rest = types_pb2.Conversation()
        rest.CopyFrom(conversation)
        del rest.messages[kept:start]
        shorter.append(rest)
    return shorter


async def longest_that_fits(
    conversation: types_pb2.Conversation,
    room: int,
    render: Callable[[types_pb2.Conversation], Awaitable[list[int]]],
) -> list[int]:
    """The token ids of the most of a conversation that has `room` tokens at most, or of its last
    turn where not even that fits. Renders it as often as the logarithm of its turns."""
    candidates = shortened(conversation)
    best = await render(candidates[0])
    if len(best) <= room or len(candidates) == 1:
        return best
    low, high = 1, len(candidates) - 1
    best = await render(candidates[high])
    while low < high:
        middle = (low + high) // 2
        token_ids = await render(candidates[middle])
        if len(token_ids) <= room:
            best, high = token_ids, middle
        else:
            low = middle + 1
    return best
