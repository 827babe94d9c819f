"""Numbers, bars and sparklines for narrow columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich.text import Text

NOTHING = "-"


@dataclass(frozen=True, slots=True)
class Glyphs:
    """What pictures are drawn with."""

    levels: str
    full: str
    empty: str
    marks: dict[str, str]
    dot: str
    ellipsis: str


UNICODE = Glyphs(
    levels="▁▂▃▄▅▆▇█",
    full="█",
    empty="░",
    marks={
        "serving": "●",
        "starting": "◐",
        "unhealthy": "▲",
        "draining": "◌",
        "unreachable": "✗",
    },
    dot="·",
    ellipsis="…",
)
ASCII = Glyphs(
    levels="_.-:=+*#",
    full="#",
    empty=".",
    marks={
        "serving": "*",
        "starting": "~",
        "unhealthy": "!",
        "draining": "o",
        "unreachable": "x",
    },
    dot="|",
    ellipsis="...",
)


def number(value: float) -> str:
    """At most five characters: 0.4, 12.3, 812, 1.2k, 34k, 5.6M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        # What would be rounded to 1000 is the next unit's.
        if value >= limit * 0.9995:
            scaled = value / limit
            return f"{scaled:.1f}{unit}" if scaled < 9.95 else f"{scaled:.0f}{unit}"
    if value == 0:
        return "0"
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def count(value: float) -> str:
    """A whole number, grouped: 12,345."""
    return f"{value:,.0f}"


def percent(share: float | None) -> str:
    """A share: 0.3%, 42%, or nothing."""
    if share is None:
        return NOTHING
    hundredths = 100 * share
    return f"{hundredths:.1f}%" if 0 < hundredths < 9.95 else f"{hundredths:.0f}%"


def duration(ms: float) -> str:
    """0.4ms, 12ms, 1.2s, 34s, 5m."""
    if ms < 9.95:
        return f"{ms:.1f}ms"
    if ms < 999.5:
        return f"{ms:.0f}ms"
    if ms < 9_950:
        return f"{ms / 1000:.1f}s"
    return f"{ms / 1000:.0f}s" if ms < 99_500 else f"{ms / 60_000:.0f}m"


def age(ms: float) -> str:
    """12s, 5m, 3h 20m, 4d 2h."""
    seconds = int(ms / 1000)
    minutes, hours, days = seconds // 60, seconds // 3600, seconds // 86_400
    if days:
        return f"{days}d {hours % 24}h"
    if hours:
        return f"{hours}h {minutes % 60}m"
    return f"{minutes}m" if minutes else f"{seconds}s"


def size(count: float) -> str:
    """Bytes: 512B, 87M, 1.2G."""
    for limit, unit in ((2**40, "T"), (2**30, "G"), (2**20, "M"), (2**10, "K")):
        if count >= limit:
            scaled = count / limit
            return f"{scaled:.1f}{unit}" if scaled < 9.95 else f"{scaled:.0f}{unit}"
    return f"{count:.0f}B"


def money(amount: float, currency: str) -> str:
    """An amount with what it is in: 0.0003 USD, 12.34 USD."""
    return f"{amount:.2f} {currency}" if amount >= 1 or amount == 0 else f"{amount:.2g} {currency}"


def sparkline(values: Sequence[float], width: int, glyphs: Glyphs) -> str:
    """The last values, one character each, of as much height as the largest of them allows."""
    shown = list(values)[-width:]
    highest = max(shown, default=0.0)
    top = len(glyphs.levels) - 1
    line = "".join(glyphs.levels[round(top * value / highest) if highest else 0] for value in shown)
    return line.rjust(width)


def bar(share: float, width: int, glyphs: Glyphs) -> str:
    """A share of a whole as a bar: none is empty but of nothing, none is full but of all of it."""
    filled = round(share * width)
    if 0 < share < 1:
        filled = max(1, min(filled, width - 1))
    return glyphs.full * filled + glyphs.empty * (width - filled)


def shortened(text: str, width: int, glyphs: Glyphs) -> str:
    """A text of at most this width; of a longer one its end is missing."""
    if len(text) <= width:
        return text
    return text[: max(0, width - len(glyphs.ellipsis))] + glyphs.ellipsis[:width]


def cut(line: Text, width: int, glyphs: Glyphs) -> Text:
    """A styled line of at most this width; the end of a longer one is missing."""
    if line.cell_len > width:
        line.truncate(max(0, width - len(glyphs.ellipsis)))
        line.append(glyphs.ellipsis[:width])
    return line


def joined(parts: Iterable[str], glyphs: Glyphs) -> str:
    """Parts of a line with dots between them."""
    return f" {glyphs.dot} ".join(part for part in parts if part)
