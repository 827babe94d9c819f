"""Writes the tables of the reference pages from the code that they describe.

What stands between `<!-- generated: NAME -->` and `<!-- end of generated -->` is replaced; the rest
of a page is written by hand. `python docs/generate.py` rewrites the pages, and a test fails while
they differ from what it would write.
"""

from __future__ import annotations

import functools
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

DOCS = Path(__file__).parent
sys.path.insert(0, str(DOCS.parent))

from services.runtime.errors import REASONS  # noqa: E402
from services.runtime.settings import Settings, TlsSettings  # noqa: E402
from services.runtime.telemetry.metrics import METRICS  # noqa: E402
from services.runtime.telemetry.spans import EVENTS, SPANS  # noqa: E402
from tests.support import proofs  # noqa: E402

PAGES = ("configuration.md", "errors.md", "parameters.md", "support.md", "telemetry.md")
CONTRACT = DOCS.parent / "protos" / "meshserve" / "v1" / "types.proto"
BLOCK = re.compile(r"(<!-- generated: ([a-z]+) -->\n).*?(<!-- end of generated -->)", re.DOTALL)


def rendered(page: str) -> str:
    """The text of a page with its generated parts as they should be."""
    text = (DOCS / page).read_text(encoding="utf-8")
    return BLOCK.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], text)


def settings_tables() -> str:
    """One table per section of the settings, in the order of the file."""
    lines: list[str] = []
    for title, meaning, model in _sections(Settings, ""):
        lines += [f"### {title}", "", meaning, ""] if title else []
        lines += _table(
            ("Key", "Type", "Default", "Meaning"),
            (
                (f"`{name}`", _type(field), _default(field), field.description or "")
                for name, field in _inherited_descriptions(model).items()
                if not _holds_sections(field)
            ),
        )
    return "\n".join(lines)


def _sections(model: type[BaseModel], path: str) -> Iterator[tuple[str, str, type[BaseModel]]]:
    """(heading, meaning, model) of a model and of all sections below it."""
    meaning = (model.__doc__ or "").strip()
    if any(not _holds_sections(field) for field in model.model_fields.values()):
        yield (f"`{path}`" if path else ""), meaning, model
    for name, field in model.model_fields.items():
        inner, suffix = _inner_section(field.annotation)
        if inner is not None:
            below = f"{path}.{name}" if path else name
            if inner is not TlsSettings:
                yield from _sections(inner, below + suffix)
    if model is Settings:
        # The same for every service, so it is shown once.
        yield from _sections(TlsSettings, "SERVICE.tls")


def _inner_section(annotation: Any) -> tuple[type[BaseModel] | None, str]:
    """The section that a field holds, and how a path goes on into it."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, ""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _inner_section(arguments[0])
    if origin is dict:
        return _inner_section(arguments[1])[0], ".NAME"
    if origin is tuple:
        return _inner_section(arguments[0])[0], "[]"
    return None, ""


def _holds_sections(field: FieldInfo) -> bool:
    return _inner_section(field.annotation)[0] is not None


def _inherited_descriptions(model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The fields of a model; one that only changes a default keeps its base's description."""
    fields = dict(model.model_fields)
    for name, field in fields.items():
        for base in model.__mro__[1:]:
            inherited = getattr(base, "model_fields", {}).get(name)
            if field.description is None and inherited is not None and inherited.description:
                described = field._copy()
                described.description = inherited.description
                fields[name] = described
                break
    return fields


def _type(field: FieldInfo) -> str:
    return _type_name(field.annotation) + _bounds(field)


def _type_name(annotation: Any) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return " or ".join(f"`{value}`" for value in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type_name(argument) for argument in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return f"{_type_name(arguments[1])} by name"
    if origin is typing.Annotated:
        return _type_name(arguments[0])
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path"}
    return "null" if annotation is type(None) else names[annotation]


def _bounds(field: FieldInfo) -> str:
    """The bounds that a person may run into; those of 32 and 64 bits are not told."""
    constraints = list(field.metadata)
    for argument in typing.get_args(field.annotation):
        constraints += getattr(argument, "__metadata__", ())
    for constraint in list(constraints):
        constraints += getattr(constraint, "metadata", ())
    texts = []
    for constraint in constraints:
        for name, sign in (("gt", ">"), ("ge", "≥"), ("lt", "<"), ("le", "≤")):
            bound = getattr(constraint, name, None)
            if bound is not None and bound < 2**31 - 1:
                texts.append(f"{sign} {bound:,.0f}")
        if getattr(constraint, "pattern", None):
            texts.append(f"matches `{constraint.pattern}`")
    return f", {', '.join(texts)}" if texts else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True, validated_data={})
    assert default is not PydanticUndefined
    if default is None or default == () or default == {}:
        return "none"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`"


def errors_table() -> str:
    """One row per reason."""
    rows = (
        (
            f"`{reason.value}`",
            f"`{entry.code.name}`",
            entry.meaning,
            entry.remedy,
            ", ".join(("ErrorInfo", *entry.details)),
        )
        for reason, entry in REASONS.items()
    )
    return "\n".join(_table(("Reason", "gRPC code", "Meaning", "What to do", "Details"), rows))


def metrics_table() -> str:
    """One row per metric, under the name that Prometheus sees."""
    rows = (
        (
            f"`{row.name}{'_total' if row.kind == 'counter' else ''}`",
            row.kind,
            row.service,
            ", ".join(f"`{label}`" for label in row.labels) or "none",
            row.meaning,
        )
        for row in METRICS
    )
    return "\n".join(_table(("Metric", "Kind", "Service", "Labels", "Meaning"), rows))


def spans_table() -> str:
    """One row per span."""
    rows = (
        (
            f"`{span.name}`",
            span.kind,
            span.service,
            ", ".join(f"`{attribute}`" for attribute in span.attributes) or "none",
            span.meaning,
        )
        for span in SPANS
    )
    return "\n".join(_table(("Span", "Kind", "Service", "Attributes", "Meaning"), rows))


def events_table() -> str:
    """One row per event."""
    rows = (
        (
            f"`{event.name}`",
            ", ".join(f"`{span}`" for span in event.spans) or "any that failed",
            ", ".join(f"`{attribute}`" for attribute in event.attributes) or "none",
            event.meaning,
        )
        for event in EVENTS
    )
    return "\n".join(_table(("Event", "Span", "Attributes", "Meaning"), rows))


def message_table(message: str) -> str:
    """One row per field of a message of the contract, from its comments."""
    rows = []
    for declaration, comment in _members("message", message):
        name = declaration.split("=")[0].split()[-1]
        bounds = re.search(r"Range (?:of a bias )?([\[(].+?[\])])", comment)
        default = re.search(r"Default: (.+?)\.(?= |$)", comment)
        meaning = re.sub(r" ?(Range|Default:) .+?\.(?= |$)", "", comment)
        cells = (bounds[1] if bounds else "", default[1] if default else "required")
        rows.append((f"`{name}`", *cells, meaning))
    return "\n".join(_table(("Parameter", "Range", "Default", "Meaning"), rows))


def truncation_table() -> str:
    """One row per policy."""
    rows = [
        (f"`{declaration.split()[0].removeprefix('TRUNCATION_POLICY_').lower()}`", comment)
        for declaration, comment in _members("enum", "TruncationPolicy")
    ]
    return "\n".join(_table(("`truncation`", "What happens"), rows))


def _members(kind: str, name: str) -> Iterator[tuple[str, str]]:
    """(declaration, comment) of what a message or an enum holds."""
    body = re.search(
        rf"^{kind} {name} {{\n(.*?)^}}", CONTRACT.read_text(), re.DOTALL | re.MULTILINE
    )
    assert body is not None, name
    comment: list[str] = []
    for line in map(str.strip, body[1].splitlines()):
        if line.startswith("//"):
            comment.append(line.removeprefix("//").strip())
        else:
            yield line, " ".join(comment)
            comment = []


def support_table(families: dict[str, str], columns: Iterable[str]) -> str:
    """One row per family, one column per format or feature; its cells name tests."""
    numbers, found = _proving_tests()

    def cell(family: str, column: str) -> str:
        if (family, column) in proofs.HAS_NONE:
            return "–"
        return " ".join(f"[{numbers[test]}]" for test in found.get((family, column), ()))

    rows = (
        (f"**{name}**", *(cell(family, column) for column in columns))
        for family, name in families.items()
    )
    return "\n".join(_table(("", *columns), rows))


def proving_tests_table() -> str:
    """One row per test that proves something, and where links of the tables above lead."""
    numbers, _ = _proving_tests()
    lines = []
    for test, number in numbers.items():
        file, _, name = test.rpartition("::")
        says = name.partition("::")[0].removeprefix("test_").replace("_", " ")
        lines.append((f"{number}", says, f"`{file.removeprefix('tests/')}::{name}`"))
    links = [f"[{number}]: ../{test.partition('::')[0]}" for test, number in numbers.items()]
    table = _table(("", "What it says", "Where it is"), lines)
    return "\n".join([*table, *links, ""])


@functools.cache
def _proving_tests() -> tuple[dict[str, int], dict[tuple[str, str], list[str]]]:
    """The number of each test that proves something, and the tests of each cell."""
    found = proofs.collect()
    names = sorted({name for names in found.values() for name in names})
    return {name: number for number, name in enumerate(names, 1)}, found


def _table(head: tuple[str, ...], rows: typing.Iterable[tuple[str, ...]]) -> list[str]:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows]
    return [*lines, ""]


TABLES: dict[str, Callable[[], str]] = {
    "settings": settings_tables,
    "errors": errors_table,
    "metrics": metrics_table,
    "spans": spans_table,
    "events": events_table,
    "sampling": lambda: message_table("SamplingParams"),
    "stopping": lambda: message_table("StoppingCriteria"),
    "output": lambda: message_table("OutputOptions"),
    "truncation": truncation_table,
    "formats": lambda: support_table(proofs.DECODERS, proofs.FORMATS),
    "features": lambda: support_table(proofs.DECODERS, proofs.FEATURES),
    "encoders": lambda: support_table(proofs.ENCODERS, proofs.OF_ENCODERS),
    "proofs": proving_tests_table,
}


def main() -> None:
    """Rewrites the pages that differ."""
    for page in PAGES:
        text = rendered(page)
        if (DOCS / page).read_text(encoding="utf-8") != text:
            (DOCS / page).write_text(text, encoding="utf-8")
            sys.stdout.write(f"docs/{page} rewritten\n")


if __name__ == "__main__":
    main()
