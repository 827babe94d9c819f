"""Finds stop strings in streamed text, across any split of it, in one pass."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string that was found. `text` is what may be sent of the text fed with it."""

    stop: str
    text: str


class StopStringMatcher:
    """An Aho-Corasick automaton over the stop strings of a request.

    Aho and Corasick, "Efficient string matching: an aid to bibliographic search", CACM 1975. The
    depth of the state is the length of the longest end of the text that may still grow into a stop
    string, so exactly that much is held back. The stop string that ends first wins; of those that
    end together, the longest.
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        """`stops` are not empty strings; `include_stop` leaves the match in the text."""
        self._include_stop = include_stop
        self._edges: list[dict[str, int]] = [{}]
        self._fallback = [0]
        self._depth = [0]
        self._longest_match: list[str | None] = [None]
        for stop in stops:
            self._add(stop)
        self._link()
        self._state = 0
        self._held = ""

    def feed(self, text: str, *, may_stop: bool = True) -> str | StopMatch:
        """The text that can be sent now, or the match. With `may_stop` false matches that end in
        `text` are passed over."""
        if len(self._edges) == 1:
            return text
        buffer = self._held + text
        offset = len(self._held)
        state = self._state
        for position, character in enumerate(text, start=offset + 1):
            while state and character not in self._edges[state]:
                state = self._fallback[state]
            state = self._edges[state].get(character, 0)
            stop = self._longest_match[state]
            if stop is not None and may_stop:
                self._held = ""
                end = position if self._include_stop else position - len(stop)
                return StopMatch(stop, buffer[:end])
        self._state = state
        release = len(buffer) - self._depth[state]
        self._held = buffer[release:]
        return buffer[:release]

    def flush(self) -> str:
        """What is held back, once nothing follows."""
        held, self._held = self._held, ""
        self._state = 0
        return held

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            following = self._edges[state].get(character)
            if following is None:
                following = len(self._edges)
                self._edges[state][character] = following
                self._edges.append({})
                self._fallback.append(0)
                self._depth.append(self._depth[state] + 1)
                self._longest_match.append(None)
            state = following
        self._longest_match[state] = stop

    def _link(self) -> None:
        """Sets where each state falls back to, breadth first, and lets matches shine through."""
        queue = deque(self._edges[0].values())
        while queue:
            state = queue.popleft()
            for character, following in self._edges[state].items():
                fallback = self._fallback[state]
                while fallback and character not in self._edges[fallback]:
                    fallback = self._fallback[fallback]
                target = self._edges[fallback].get(character, 0)
                self._fallback[following] = target
                if self._longest_match[following] is None:
                    self._longest_match[following] = self._longest_match[target]
                queue.append(following)
