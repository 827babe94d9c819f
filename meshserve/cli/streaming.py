"""Writes an answer as it is generated, and what it cost below it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from rich.text import Text

from meshserve.cli.output import stderr_console, write_text
from meshserve.types import FinishReason, Usage

_REMARKS = {
    FinishReason.LENGTH: "cut off at the token limit",
    FinishReason.CONTENT_FILTER: "ended by the safety filter",
    FinishReason.ABORTED: "aborted",
    FinishReason.TOOL_CALLS: "calls a tool",
}


@dataclass(slots=True)
class Timing:
    """When the pieces of an answer came, on a monotonic clock."""

    started_s: float
    first_s: float | None = None
    last_s: float | None = None

    def tokens_per_s(self, tokens: int) -> float | None:
        """Rate from the request to the last piece; None where there was none.

        The wait for the first piece counts: pieces that were held back and came at once would
        look impossibly fast without it.
        """
        if self.last_s is None or self.last_s <= self.started_s:
            return None
        return tokens / (self.last_s - self.started_s)


def write_stream(pieces: Iterator[str]) -> Timing:
    """Writes pieces of text to standard output as they come, and a line end after them."""
    terminal = sys.stdout.isatty()
    timing = Timing(time.monotonic())
    line_is_open = False
    try:
        for piece in pieces:
            timing.last_s = time.monotonic()
            if timing.first_s is None:
                timing.first_s = timing.last_s
            write_text(piece, terminal=terminal)
            line_is_open = not piece.endswith("\n")
        line_is_open = line_is_open or timing.first_s is None  # an empty answer is a line too
    finally:
        if line_is_open:
            write_text("\n", terminal=terminal)
    return timing


def write_footer(
    usage: Usage, timing: Timing, *, cached: bool, finish_reason: FinishReason
) -> None:
    """What the answer cost, dim; on a terminal only, so that pipes carry answers alone."""
    console = stderr_console()
    if not (console.is_terminal and sys.stdout.isatty()):
        return
    parts = [f"{usage.completion_tokens} tokens"]
    rate = timing.tokens_per_s(usage.completion_tokens)
    if cached:
        parts.append("from the cache")
    elif rate is not None:
        parts.append(f"{rate:.1f} tokens/s")
    if timing.first_s is not None:
        parts.append(f"first after {timing.first_s - timing.started_s:.2f} s")
    if usage.cached_prompt_tokens:
        parts.append(f"{usage.cached_prompt_tokens} of {usage.prompt_tokens} prompt tokens reused")
    if finish_reason in _REMARKS:
        parts.append(_REMARKS[finish_reason])
    console.print(Text(" · ".join(parts), style="dim"), soft_wrap=True)
