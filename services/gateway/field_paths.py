"""The fields of a peer's error, by the names that our own caller knows them by."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from services.runtime.errors import ServiceError

# A streaming request wraps the request proper.
STREAMING_PREFIX = "request."


@contextmanager
def renamed_fields(names: Mapping[str, str]) -> Iterator[None]:
    """Renames the first part of field paths in a ServiceError on its way out.

    `{"texts": "stopping.stop_strings"}` makes `stopping.stop_strings[3]` of `texts[3]`; a name that
    ends in `[0]` stands for that entry alone.
    """
    try:
        yield
    except ServiceError as error:
        error.field_violations = tuple(
            (_renamed(path, names), description) for path, description in error.field_violations
        )
        raise


def under_request(error: ServiceError) -> None:
    """Puts the fields of an error below the request that a streaming request wraps."""
    error.field_violations = tuple(
        (f"{STREAMING_PREFIX}{path}", description) for path, description in error.field_violations
    )


def _renamed(path: str, names: Mapping[str, str]) -> str:
    for name, own in names.items():
        if path == name or re.match(rf"{re.escape(name)}[.\[]", path):
            return own + path[len(name) :]
    return path
