"""Tables for narrow terminals: as many columns as fit, the least important left out first."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

from rich.cells import cell_len, set_cell_size
from rich.text import Text

from meshserve.cli.top_format import NOTHING, Glyphs, shortened


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        title: heads it.
        width: in cells; of texts the least, they get what they need where there is room.
        rank: where there is no room columns of the highest rank go first.
        cell: what it shows of a row.
        style: of a cell, from its row.
        key: what rows can be sorted by, the greatest first.
        is_text: stands at the left, numbers at the right.
        is_bar: is headed at the left as well.
    """

    title: str
    width: int
    rank: int
    cell: Callable[[Any], str]
    style: Callable[[Any], str]
    key: Callable[[Any], float] | None
    is_text: bool
    is_bar: bool = False


def named(
    title: str,
    width: int,
    rank: int,
    cell: Callable[[Any], str],
    style: Callable[[Any], str] = lambda row: "",
) -> Column:
    """A column of texts."""
    return Column(title, width, rank, cell, style, None, is_text=True)


def measured(
    title: str,
    width: int,
    rank: int,
    path: str | Callable[[Any], float | None],
    show: Callable[[Any], str],
    style: Callable[[Any], str] = lambda value: "",
) -> Column:
    """A column of numbers, found in a row by the path of a field, `latency.p50_ms` for example, or
    worked out. One that is absent is shown as nothing. `style` is told the number."""

    def value(row: Any) -> Any:
        return path(row) if callable(path) else _at(row, path)

    def cell(row: Any) -> str:
        found = value(row)
        return NOTHING if found is None else show(found)

    return Column(
        title,
        width,
        rank,
        cell,
        lambda row: style(value(row) or 0),
        lambda row: value(row) or 0,
        is_text=False,
    )


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under columns. `remark` is said of a row instead of its numbers; of most there is
    none."""

    columns: Sequence[Column]
    rows: Sequence[Any]
    remark: Callable[[Any], str] = lambda row: ""

    @property
    def sort_keys(self) -> list[str]:
        """Titles of what the rows can be sorted by; the first is the order they have."""
        return [self.columns[0].title, *(c.title for c in self.columns if c.key is not None)]

    def sorted_by(self, title: str) -> Table:
        """The same with the greatest at the top; as it is where no column has this title."""
        for column in self.columns:
            if column.title == title and column.key is not None:
                return replace(self, rows=sorted(self.rows, key=column.key, reverse=True))
        return self

    def lines(self, width: int, height: int, offset: int, glyphs: Glyphs) -> list[Text]:
        """A head and the rows from `offset` on, at most `height` lines in all."""
        columns = _fitting(self.columns, width)
        widths = self._widths(columns, width)
        head = _joined(
            (_head(column, cells, glyphs), "bold dim")
            for column, cells in zip(columns, widths, strict=True)
        )
        room = max(1, height - 1)
        offset = max(0, min(offset, len(self.rows) - room))
        shown = self.rows[offset : offset + room]
        lines = [self._line(row, columns, widths, width, glyphs) for row in shown]
        hidden = len(self.rows) - offset - len(shown)
        if hidden:
            lines[-1] = Text(f"{glyphs.ellipsis} {hidden + 1} more", style="dim")
        return [head, *lines]

    def _widths(self, columns: Sequence[Column], width: int) -> list[int]:
        """Numbers have the width of their column. Texts share what is left, as far as they need
        it."""
        widths = [column.width for column in columns]
        left = width - sum(widths) - len(widths) + 1
        for index, column in enumerate(columns):
            if column.is_text:
                needed = max((cell_len(column.cell(row)) for row in self.rows), default=0)
                more = min(left, max(needed, len(column.title)) - widths[index])
                widths[index] += more
                left -= more
        return widths

    def _line(
        self, row: Any, columns: Sequence[Column], widths: Sequence[int], width: int, glyphs: Glyphs
    ) -> Text:
        remark = self.remark(row)
        if remark:
            columns = list(takewhile(lambda column: column.is_text, columns))
        line = _joined(
            (_cell(column.cell(row), cells, column, glyphs), column.style(row))
            for column, cells in zip(columns, widths, strict=False)
        )
        if remark:
            left = width - line.cell_len - 1
            line.append(f" {shortened(remark, left, glyphs)}", style=columns[0].style(row))
        return line


def _at(row: Any, path: str) -> float | None:
    """The number at a path; None if it, or what it is in, is absent."""
    for name in path.split("."):
        if row.DESCRIPTOR.fields_by_name[name].has_presence and not row.HasField(name):
            return None
        row = getattr(row, name)
    return float(row)


def _fitting(columns: Sequence[Column], width: int) -> list[Column]:
    chosen = list(columns)
    while len(chosen) > 1 and sum(column.width + 1 for column in chosen) - 1 > width:
        chosen.remove(max(reversed(chosen), key=lambda column: column.rank))
    return chosen


def _cell(text: str, width: int, column: Column, glyphs: Glyphs) -> str:
    text = shortened(text, width, glyphs)
    return set_cell_size(text, width) if column.is_text else text.rjust(width)


def _head(column: Column, width: int, glyphs: Glyphs) -> str:
    if column.is_bar:
        return column.title.ljust(width)
    return _cell(column.title, width, column, glyphs)


def _joined(cells: Any) -> Text:
    line = Text(no_wrap=True, overflow="crop")
    for text, style in cells:
        line.append(" " if line else "")
        line.append(text, style=style)
    return line
