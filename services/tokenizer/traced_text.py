"""Text that knows which of its characters the chat template itself wrote.

A control token such as `<|im_start|>` may be placed by the template alone, never by the text of a
conversation. So every string inside a template is a `TracedText`: equal to the plain string in all
respects, and carrying the ranges of characters that came from the template's own source. Slicing,
joining, trimming, splitting, replacing and formatting keep the ranges; whatever other operation
makes a string gives one without any, which can only turn a control token into ordinary text and
never the other way round.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from typing import Any, SupportsIndex, cast

from services.tokenizer.errors import ChatTemplateError

Runs = tuple[tuple[int, int], ...]
"""Ascending, disjoint, non-adjacent [start, end) ranges of characters."""

# Parts that a text may be split into, and members of any list in a template.
MAX_ITEMS = 100_000
_SHORT_CHARS = 256
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"
_PERCENT_FIELD = re.compile(r"%(?:\((?P<key>\w+)\))?(?P<conversion>[sdr%])")


class TextBudget(threading.local):
    """How many characters the strings of one rendering may have; one rendering per thread.

    `largest` bounds each string and `remaining` all of them together. Without a rendering under
    way nothing is bounded.
    """

    largest: int | None = None
    remaining: int = 0

    def begin(self, largest: int, total: int) -> None:
        """Starts a rendering."""
        self.largest, self.remaining = largest, total

    def end(self) -> None:
        """Ends it."""
        self.largest = None

    def check(self, chars: int) -> None:
        """Raises ChatTemplateError if a string of this size may not be made."""
        if self.largest is not None and chars > self.largest:
            raise ChatTemplateError(
                f"the template makes a text of more than {self.largest} characters"
            )

    def charge(self, chars: int) -> None:
        """Counts a string that is being made. Raises ChatTemplateError."""
        if self.largest is None:
            return
        self.check(chars)
        self.remaining -= chars
        if self.remaining < 0:
            raise ChatTemplateError("the template copies too much text")


budget = TextBudget()


class TracedText(str):
    """A string and the ranges of it that the template wrote."""

    __slots__ = ("_trusted",)
    _trusted: Runs

    def __new__(cls, text: str, trusted: Runs = ()) -> TracedText:
        if len(text) > _SHORT_CHARS:
            budget.charge(len(text))
        made = super().__new__(cls, text)
        made._trusted = trusted
        return made

    def __getitem__(self, key: SupportsIndex | slice) -> TracedText:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            text = str.__getitem__(self, key)
            if step != 1 or not self._trusted:
                return TracedText(text)
            return TracedText(text, _cut(self._trusted, start, stop))
        index = int(key.__index__())
        text = str.__getitem__(self, index)
        position = index if index >= 0 else len(self) + index
        return TracedText(text, _cut(self._trusted, position, position + 1))

    def __iter__(self) -> Iterator[str]:
        for index in range(len(self)):
            yield self[index]

    def __add__(self, other: str) -> TracedText:
        return concatenate((self, other)) if isinstance(other, str) else NotImplemented

    def __radd__(self, other: str) -> TracedText:
        return concatenate((other, self)) if isinstance(other, str) else NotImplemented

    def __mul__(self, count: SupportsIndex) -> TracedText:
        times = max(0, count.__index__())
        budget.check(len(self) * times)
        if not self._trusted:
            return TracedText(str.__mul__(self, times))
        if times > _SHORT_CHARS and self._trusted != ((0, len(self)),):
            return TracedText(str.__mul__(self, times))
        if self._trusted == ((0, len(self)),):
            return trusted_text(str.__mul__(self, times))
        return concatenate([self] * times)

    __rmul__ = __mul__

    def __mod__(self, values: Any) -> TracedText:
        return _format_percent(self, values)

    def strip(self, chars: str | None = None, /) -> TracedText:
        return self.lstrip(chars).rstrip(chars)

    def lstrip(self, chars: str | None = None, /) -> TracedText:
        kept = len(str.lstrip(self, chars))
        return self if kept == len(self) else self[len(self) - kept :]

    def rstrip(self, chars: str | None = None, /) -> TracedText:
        kept = len(str.rstrip(self, chars))
        return self if kept == len(self) else self[:kept]

    def removeprefix(self, prefix: str, /) -> TracedText:
        return self[len(prefix) :] if prefix and self.startswith(prefix) else self

    def removesuffix(self, suffix: str, /) -> TracedText:
        return self[: -len(suffix)] if suffix and self.endswith(suffix) else self

    # The standard library declares lists of plain strings; these hold strings that know more.
    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.split(self, sep, _bounded_splits(maxsplit)), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.rsplit(self, sep, _bounded_splits(maxsplit)), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        _check_parts(sum(map(self.count, _LINE_ENDS)))
        lines: list[str] = []
        start = 0
        for whole, kept in zip(
            str.splitlines(self, True), str.splitlines(self, keepends), strict=True
        ):
            lines.append(self[start : start + len(kept)])
            start += len(whole)
        return lines

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        return self._parted(self.find(sep), sep, (self, TracedText(""), TracedText("")))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        return self._parted(self.rfind(sep), sep, (TracedText(""), TracedText(""), self))

    def join(self, iterable: Iterable[str], /) -> TracedText:
        parts: list[str] = []
        for part in iterable:
            if not isinstance(part, str):
                raise TypeError(f"sequence item {len(parts)}: expected a string")
            if parts:
                parts.append(self)
            parts.append(part)
        return concatenate(parts)

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> TracedText:
        limit = count.__index__()
        found = self.count(old) if limit < 0 else min(self.count(old), limit)
        budget.check(len(self) + found * (len(new) - len(old)))
        if not found:
            return self
        if not old or not (self._trusted or runs_of(new)):
            return TracedText(str.replace(self, old, new, limit))
        parts: list[str] = []
        for part in self.split(old, limit):
            if parts:
                parts.append(new)
            parts.append(part)
        return concatenate(parts)

    def ljust(self, width: SupportsIndex, fillchar: str = " ", /) -> TracedText:
        budget.check(width.__index__())
        return TracedText(str.ljust(self, width, fillchar))

    def rjust(self, width: SupportsIndex, fillchar: str = " ", /) -> TracedText:
        budget.check(width.__index__())
        return TracedText(str.rjust(self, width, fillchar))

    def center(self, width: SupportsIndex, fillchar: str = " ", /) -> TracedText:
        budget.check(width.__index__())
        return TracedText(str.center(self, width, fillchar))

    def zfill(self, width: SupportsIndex, /) -> TracedText:
        budget.check(width.__index__())
        return TracedText(str.zfill(self, width))

    def expandtabs(self, tabsize: SupportsIndex = 8) -> TracedText:
        budget.check(len(self) + self.count("\t") * max(0, tabsize.__index__()))
        return TracedText(str.expandtabs(self, tabsize))

    def _parted(
        self, at: int, sep: str, absent: tuple[str, str, str]
    ) -> tuple[TracedText, TracedText, TracedText]:
        if not sep:
            raise ValueError("empty separator")
        if at < 0:
            return cast("tuple[TracedText, TracedText, TracedText]", absent)
        return self[:at], self[at : at + len(sep)], self[at + len(sep) :]

    def _located(self, parts: list[str], sep: str | None) -> list[str]:
        _check_parts(len(parts))
        if not self._trusted:
            return [TracedText(part) for part in parts]
        located: list[str] = []
        start = 0
        for part in parts:
            if sep is None:
                start = self.find(part, start)
            located.append(self[start : start + len(part)])
            start += len(part) + (len(sep) if sep is not None else 0)
        return located


def trusted_text(text: str) -> TracedText:
    """Text that the template wrote."""
    return TracedText(text, ((0, len(text)),) if text else ())


def traced(text: str) -> TracedText:
    """Any string as TracedText; a plain one is text that the template did not write."""
    return text if isinstance(text, TracedText) else TracedText(text)


def runs_of(text: str) -> Runs:
    """The ranges of a string that the template wrote."""
    return text._trusted if isinstance(text, TracedText) else ()


def concatenate(parts: Iterable[str]) -> TracedText:
    """The strings one after the other, with their ranges."""
    parts = tuple(parts)
    budget.check(sum(map(len, parts)))
    runs: list[tuple[int, int]] = []
    offset = 0
    for part in parts:
        for start, end in runs_of(part):
            if runs and runs[-1][1] == offset + start:
                runs[-1] = (runs[-1][0], offset + end)
            else:
                runs.append((offset + start, offset + end))
        offset += len(part)
    return TracedText("".join(parts), tuple(runs))


def _bounded_splits(maxsplit: SupportsIndex) -> int:
    splits = maxsplit.__index__()
    return MAX_ITEMS if splits < 0 or splits > MAX_ITEMS else splits


def _check_parts(count: int) -> None:
    if count > MAX_ITEMS:
        raise ChatTemplateError(f"the template makes a list of more than {MAX_ITEMS} members")


def _cut(runs: Runs, start: int, end: int) -> Runs:
    if start >= end:
        return ()
    return tuple(
        (max(run_start, start) - start, min(run_end, end) - start)
        for run_start, run_end in runs
        if run_start < end and start < run_end
    )


def _format_percent(template: TracedText, values: Any) -> TracedText:
    """`template % values` for the plain conversions; anything else is refused."""
    arguments = iter(values if isinstance(values, tuple) else (values,))
    parts: list[str] = []
    start = 0
    while (at := template.find("%", start)) >= 0:
        field = _PERCENT_FIELD.match(template, at)
        if field is None:
            raise ChatTemplateError(
                "the template uses a `%` conversion that is not supported; %s, %d and %r are"
            )
        parts.append(template[start:at])
        start = field.end()
        conversion = field["conversion"]
        if conversion == "%":
            parts.append(template[at : at + 1])
            continue
        try:
            value = values[field["key"]] if field["key"] else next(arguments)
        except StopIteration:
            raise TypeError("not enough arguments for format string") from None
        if conversion == "s":
            parts.append(value if isinstance(value, str) else str(value))
        else:
            parts.append(("%d" if conversion == "d" else "%r") % (value,))
    parts.append(template[start:])
    if isinstance(values, tuple) and next(arguments, arguments) is not arguments:
        raise TypeError("not all arguments converted during string formatting")
    return concatenate(parts)
