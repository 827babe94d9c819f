"""JSON files that describe a model, read with the type of each field checked."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from services.runtime.modelfiles.errors import ModelFileError

# No configuration or index comes near it.
_MOST_BYTES = 32 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file; raises ModelFileError for whatever is none."""
    try:
        size_bytes = path.stat().st_size
        content = path.read_bytes() if size_bytes <= _MOST_BYTES else b""
    except FileNotFoundError:
        raise ModelFileError(path, "no such file") from None
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror}") from None
    if size_bytes > _MOST_BYTES:
        raise ModelFileError(path, f"is larger than {_MOST_BYTES} bytes")
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ModelFileError(path, f"is not JSON: {error}") from None
    if not isinstance(parsed, dict):
        raise ModelFileError(path, "is not a JSON object")
    return parsed


class Fields:
    """Typed look-up in a JSON object; null counts as absent, as HF writes it.

    A field that is of another type, or absent without a default, raises ModelFileError by its name.
    `within` names the object that the fields are in, where that is not the whole file.
    """

    def __init__(self, path: Path, raw: Mapping[str, Any], within: str = "") -> None:
        self.path = path
        self.raw = raw
        self._within = within

    def error(self, name: str, problem: str) -> ModelFileError:
        """What to raise where a field is at fault."""
        return ModelFileError(self.path, problem, what=f"{self._within}{name}")

    def table(self, name: str) -> Fields | None:
        """An object within this one, None where the field is absent."""
        value = self.raw.get(name)
        if value is None:
            return None
        if not isinstance(value, dict):
            raise self.error(name, "is not a table")
        return Fields(self.path, value, f"{self._within}{name}.")

    def integer(self, name: str, default: int | None = None) -> int:
        """A whole number."""
        return int(self._value(name, int, "an integer", default))

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number."""
        value = self._value(name, (int, float), "a number", default)
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.error(name, "is not a finite number")
        return number

    def optional_number(self, name: str) -> float | None:
        """A finite number, None where the field is absent."""
        return None if self.raw.get(name) is None else self.number(name)

    def flag(self, name: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(name, f"{value!r} is not true or false")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """A string."""
        return str(self._value(name, str, "a string", default))

    def numbers(self, name: str) -> tuple[float, ...]:
        """A list of finite numbers."""
        value = self._value(name, list, "a list", None)
        each = Fields(self.path, {f"{name}[{index}]": item for index, item in enumerate(value)})
        return tuple(each.number(item) for item in each.raw)

    def integers(self, name: str) -> tuple[int, ...]:
        """A list of whole numbers; none where the field is absent."""
        value = self.raw.get(name) or []
        if not (isinstance(value, list) and all(type(each) is int for each in value)):
            raise ModelFileError(self.path, f"{value!r} is not a list of integers", what=name)
        return tuple(value)

    def token_ids(self, name: str) -> tuple[int, ...]:
        """One token id or a list of them; none where the field is absent."""
        value = self.raw.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(each, int) and each >= 0 for each in ids):
            raise self.error(name, f"{value!r} is not a token id or a list")
        return tuple(dict.fromkeys(ids))

    def _value(self, name: str, kind: type | tuple[type, ...], says: str, default: Any) -> Any:
        value = self.raw.get(name)
        if value is None:
            if default is None:
                raise self.error(name, "is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, kind):
            raise self.error(name, f"{value!r} is not {says}")
        return value
