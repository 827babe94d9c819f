"""The sandbox that chat templates run in: Jinja that traces text and cannot run away.

It understands what the templates of published models use: blocks trimmed, loop controls,
`raise_exception`, `strftime_now`, `tojson` without HTML escapes, `{% generation %}`. Python's
internals are out of reach (Jinja's immutable sandbox). What bounds a rendering:

- time: a deadline that every turn of a loop, call, operator and filter checks;
- text: no string longer than the largest prompt, and a bound on all strings made together;
- structures: no list or mapping of more than MAX_ITEMS members, counted through all levels;
- numbers: no integer of more than MAX_INTEGER_BITS;
- depth: Python's own recursion limit.

Filters that could do unbounded work in one step are not there.
"""

from __future__ import annotations

import datetime
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import LoopControlExtension
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedFormatter
from jinja2.utils import Namespace

from services.tokenizer.errors import ChatTemplateError
from services.tokenizer.template_compiler import GenerationBlock, TracingCodeGenerator
from services.tokenizer.template_filters import escaped, indented, rounded, summed, titled, tojson
from services.tokenizer.template_limits import (
    MAX_INTEGER_BITS,
    check_items,
    check_power,
    check_product,
    check_structure,
)
from services.tokenizer.traced_text import (
    MAX_ITEMS,
    TracedText,
    concatenate,
    runs_of,
    traced,
    trusted_text,
)

_MAX_DATE_FORMAT_CHARS = 256
_DATE_FORMAT_WIDTH = re.compile(r"%[-_0^#+]*\d")
_FORMAT_WIDTH = re.compile(r"\d{5}")
_FORBIDDEN_TEXT_METHODS = frozenset({"encode", "translate", "maketrans"})
_KEPT_FILTERS = (
    "abs",
    "attr",
    "capitalize",
    "count",
    "d",
    "default",
    "dictsort",
    "first",
    "float",
    "groupby",
    "int",
    "items",
    "last",
    "length",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "reverse",
    "select",
    "selectattr",
    "sort",
    "unique",
    "upper",
)


class _Rendering(threading.local):
    deadline: float | None = None


class TemplateDict:
    """`dict(...)` inside a template, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)


class TemplateNamespace(Namespace):
    """`namespace(...)` inside a template; names that begin with an underscore are refused."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        attributes = dict(*args[1:], **kwargs)
        for name in attributes:
            _refuse_private(name)
        Namespace.__init__(args[0], attributes)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_private(name)
        super().__setitem__(name, value)


class ChatTemplateEnvironment(ImmutableSandboxedEnvironment):
    """Compiles and runs chat templates; see the module for what bounds them."""

    code_generator_class = TracingCodeGenerator
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})
    concat = staticmethod(concatenate)

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationBlock, LoopControlExtension],
            # Folding constants while compiling would do unbounded work outside the limits.
            optimized=False,
        )
        self._rendering = _Rendering()
        self.globals = {
            "range": self.globals["range"],
            "dict": TemplateDict(),
            "namespace": TemplateNamespace,
            "joiner": self.globals["joiner"],
            "cycler": self.globals["cycler"],
            "raise_exception": _raise_exception,
            "strftime_now": _strftime_now,
        }
        filters: dict[str, Callable[..., Any]] = {
            name: self.filters[name] for name in _KEPT_FILTERS
        }
        filters |= {
            "escape": escaped,
            "e": escaped,
            "format": lambda text, *args: traced(text) % args,
            "indent": indented,
            "join": self._join,
            "list": lambda value: list(islice(value, MAX_ITEMS + 1)),
            "replace": lambda text, old, new, count=-1: traced(self.to_text(text)).replace(
                self.to_text(old), self.to_text(new), count
            ),
            "round": rounded,
            "safe": lambda value: value,
            "string": self.to_text,
            "sum": summed,
            "title": titled,
            "tojson": tojson,
            "trim": lambda text, chars=None: traced(self.to_text(text)).strip(chars),
        }
        self.filters = {name: self._limited(function) for name, function in filters.items()}

    def begin(self, timeout_s: float) -> None:
        """Starts a rendering on this thread."""
        self._rendering.deadline = time.monotonic() + timeout_s

    def end(self) -> None:
        """Ends it."""
        self._rendering.deadline = None

    def tick(self) -> str:
        """Raises ChatTemplateError once the time is up."""
        deadline = self._rendering.deadline
        if deadline is not None and time.monotonic() > deadline:
            raise ChatTemplateError("the template takes too long")
        return ""

    # What compiled templates call.

    def trusted(self, text: str) -> TracedText:
        """A literal of the template."""
        return trusted_text(text)

    def to_text(self, value: Any) -> str:
        """What a value prints as."""
        if isinstance(value, str):
            return value
        return TracedText(str(self.bounded(value)))

    def concatenate_values(self, values: Iterable[Any]) -> TracedText:
        """The `~` operator."""
        return concatenate([self.to_text(value) for value in values])

    def bounded(self, value: Any) -> Any:
        """Returns the value. Raises ChatTemplateError if it is too large a structure or number."""
        if isinstance(value, (list, tuple, dict)):
            check_structure(value)
        elif isinstance(value, int) and value.bit_length() > MAX_INTEGER_BITS:
            raise ChatTemplateError(f"the template makes a number of over {MAX_INTEGER_BITS} bits")
        return value

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """An operator between two values."""
        self.tick()
        if isinstance(left, str):
            left = traced(left)
        if operator == "*":
            check_product(left, right)
        elif operator == "**":
            check_power(left, right)
        elif operator == "+" and isinstance(left, (list, tuple)) and isinstance(right, type(left)):
            check_items(len(left) + len(right))
        return self.bounded(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """A call of a function, macro or method."""
        __self.tick()
        result = super().call(__context, __obj, *args, **kwargs)
        return traced(result) if isinstance(result, str) else __self.bounded(result)

    def getattr(self, obj: Any, attribute: str) -> Any:
        """`obj.attribute`."""
        return super().getattr(traced(obj) if isinstance(obj, str) else obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`."""
        return super().getitem(traced(obj) if isinstance(obj, str) else obj, argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may see an attribute."""
        if isinstance(obj, (int, float, bytes)):
            return False
        if isinstance(obj, str) and attr in _FORBIDDEN_TEXT_METHODS:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`"...".format(...)`, traced."""
        owner = getattr(value, "__self__", None)
        name = getattr(value, "__name__", "")
        if not isinstance(owner, str) or name not in ("format", "format_map"):
            return None
        template = traced(owner)
        formatter = _TracingFormatter(self)
        if name == "format_map":
            return lambda mapping: formatter.traced_format(template, (), mapping)
        return lambda *args, **kwargs: formatter.traced_format(template, args, kwargs)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template = super()._parse(source, name, filename)
        for loop in template.find_all(nodes.For):
            check = nodes.Call(nodes.EnvironmentAttribute("tick"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(check, lineno=loop.lineno))
        return template

    def _limited(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def limited(*args: Any, **kwargs: Any) -> Any:
            self.tick()
            result = function(*args, **kwargs)
            return traced(result) if isinstance(result, str) else self.bounded(result)

        # Jinja looks here for what a filter wants to be passed first.
        if (wants := getattr(function, "jinja_pass_arg", None)) is not None:
            limited.jinja_pass_arg = wants  # type: ignore[attr-defined]
        return limited

    def _join(self, value: Any, separator: str = "", attribute: str | int | None = None) -> str:
        items = islice(value, MAX_ITEMS + 1)
        if attribute is not None:
            parts = [self.to_text(self.getitem(item, attribute)) for item in items]
        else:
            parts = [self.to_text(item) for item in items]
        return traced(self.to_text(separator)).join(parts)


class _TracingFormatter(SandboxedFormatter):
    """Formatting whose literal parts keep the trust of the format string."""

    def traced_format(
        self, template: TracedText, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> TracedText:
        if _FORMAT_WIDTH.search(template):
            raise ChatTemplateError("the template pads text to too great a width")
        whole = runs_of(template) == ((0, len(template)),)
        parts: list[str] = []
        automatic = 0
        for literal, field, spec, conversion in self.parse(template):
            parts.append(trusted_text(literal) if whole else TracedText(literal))
            if field is None:
                continue
            if "{" in (spec or ""):
                raise ChatTemplateError("nested format fields are not supported")
            if not field or field[0] in ".[":
                field, automatic = f"{automatic}{field}", automatic + 1
            value, _ = self.get_field(field, args, kwargs)
            if conversion:
                value = self.convert_field(value, conversion)
            if isinstance(value, str) and not spec:
                parts.append(value)
            else:
                parts.append(str(self.format_field(value, spec or "")))
        return concatenate(parts)


def _refuse_private(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")


def _raise_exception(message: object) -> None:
    raise TemplateError(str(message))


def _strftime_now(pattern: str) -> str:
    if len(pattern) > _MAX_DATE_FORMAT_CHARS or _DATE_FORMAT_WIDTH.search(pattern):
        raise ChatTemplateError("the template's date format is too long or pads its fields")
    return datetime.datetime.now().strftime(pattern)
