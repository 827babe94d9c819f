"""What operators have asked for: one small document, which all gateways have in common."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Self

# Between an adapter's name and its revision, in the names that engines know adapters by.
REVISION_MARK = "@"


class DamagedDocumentError(Exception):
    """What is kept is no such document."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter that an operator has loaded."""

    model: str
    name: str
    source: str
    revision: str
    load_time_unix_ms: int

    @classmethod
    def new(cls, model: str, name: str, source: str) -> Self:
        """One that has not been loaded before, whatever had the name."""
        return cls(model, name, source, secrets.token_hex(4), int(time.time() * 1000))

    @property
    def engine_name(self) -> str:
        """What engines know it by: loaded anew, it is another adapter to them. So requests in
        flight end with what they began with, and no cache takes one for the other."""
        return f"{self.name}{REVISION_MARK}{self.revision}"


@dataclass(frozen=True, slots=True)
class Desired:
    """The document. Each change makes the next version.

    Attributes:
        models: whether a model is to be loaded; one that is not here is as the settings have it.
        adapters: those that are to be loaded, by name; no two models have the same name.
    """

    version: int = 0
    models: Mapping[str, bool] = field(default_factory=dict)
    adapters: Mapping[str, Adapter] = field(default_factory=dict)

    def with_model(self, name: str, *, loaded: bool) -> Desired:
        """The next version, which wants a model to be loaded or unloaded."""
        return replace(self, version=self.version + 1, models={**self.models, name: loaded})

    def with_adapter(self, adapter: Adapter) -> Desired:
        """The next version, with an adapter in the place of what had its name."""
        adapters = {**self.adapters, adapter.name: adapter}
        return replace(self, version=self.version + 1, adapters=adapters)

    def without_adapter(self, name: str) -> Desired:
        """The next version, without an adapter."""
        adapters = {key: each for key, each in self.adapters.items() if key != name}
        return replace(self, version=self.version + 1, adapters=adapters)

    def adapters_of(self, model: str) -> list[Adapter]:
        """Those of a model."""
        return [each for each in self.adapters.values() if each.model == model]

    def to_json(self) -> str:
        """The document as it is kept."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, document: str | bytes) -> Self:
        """What `to_json` made. Raises DamagedDocumentError."""
        try:
            fields = json.loads(document)
            return cls(
                version=int(fields["version"]),
                models={str(name): bool(loaded) for name, loaded in fields["models"].items()},
                adapters={
                    str(name): Adapter(**adapter) for name, adapter in fields["adapters"].items()
                },
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedDocumentError(f"not a document of this gateway: {error}") from error
