"""Filters of chat templates that Jinja's own would be wrong or unbounded for."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from jinja2 import Undefined
from jinja2.filters import do_title

from services.tokenizer.errors import ChatTemplateError
from services.tokenizer.traced_text import concatenate, traced

MAX_INDENT = 64
# Jinja puts words into title case one by one.
MAX_TITLE_CHARS = 1 << 16


def tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    if indent is not None and (indent if isinstance(indent, int) else len(indent)) > MAX_INDENT:
        raise ChatTemplateError(f"the template indents by more than {MAX_INDENT}")
    if isinstance(value, Undefined):
        raise TypeError(f"{value._undefined_message} and has no JSON form")
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def indented(text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    """Text whose lines are moved to the right; the first line stays unless `first`."""
    if (width if isinstance(width, int) else len(width)) > MAX_INDENT:
        raise ChatTemplateError(f"the template indents by more than {MAX_INDENT}")
    margin = " " * width if isinstance(width, int) else width
    lines = (traced(str(text) if not isinstance(text, str) else text) + "\n").splitlines()
    parts: list[str] = []
    for index, line in enumerate(lines):
        if index:
            parts.append("\n")
        if (index and (line or blank)) or (not index and first):
            parts.append(margin)
        parts.append(line)
    return concatenate(parts)


def titled(value: Any) -> str:
    """Text whose words begin with a capital."""
    text = str(value)
    if len(text) > MAX_TITLE_CHARS:
        raise ChatTemplateError(f"`title` takes no more than {MAX_TITLE_CHARS} characters")
    return do_title(text)


def escaped(value: Any) -> str:
    """Text that is safe in HTML."""
    text = str(value)
    for plain, entity in (
        ("&", "&amp;"),
        (">", "&gt;"),
        ("<", "&lt;"),
        ("'", "&#39;"),
        ('"', "&#34;"),
    ):
        text = text.replace(plain, entity)
    return text


def rounded(value: float, precision: int = 0, method: str = "common") -> float:
    """A rounded number; `method` is `common`, `floor` or `ceil`."""
    if abs(precision) > MAX_INDENT:
        raise ChatTemplateError("the template rounds to too many digits")
    if method == "common":
        return round(value, precision)
    scaled = value * 10.0**precision
    floor = int(scaled // 1)
    return (floor if method == "floor" or floor == scaled else floor + 1) / 10.0**precision


def summed(values: Iterable[Any], attribute: str | None = None, start: float = 0) -> Any:
    """The sum of numbers."""
    total: Any = start
    for value in values:
        number = value[attribute] if attribute is not None else value
        if not isinstance(number, (int, float)):
            raise TypeError("sum adds numbers")
        total += number
    return total
