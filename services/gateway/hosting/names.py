"""What a request means by `model` and `adapter`."""

from __future__ import annotations

import difflib
from typing import NamedTuple

from services.gateway.hosting.hosting import Hosting, adapter_not_found
from services.runtime.errors import Reason, ServiceError, invalid_field
from services.runtime.settings import Settings

# Between a model and its adapter, where both are given by one name.
ADAPTER_MARK = ":"
MAX_SHOWN_CHARS = 128


class Named(NamedTuple):
    """A model of the settings, and an adapter of it: "" for none."""

    model: str
    adapter: str = ""


class Names:
    """Finds models and adapters. A name is tried as a model's, as an adapter's, and as
    `MODEL:ADAPTER`, in this order."""

    def __init__(self, settings: Settings, hosting: Hosting) -> None:
        self._default = settings.default_model
        self._hosting = hosting
        self._models = {
            alias: name
            for name, model in settings.models.items()
            for alias in (name, *model.aliases)
        }

    def is_model(self, name: str) -> bool:
        """Whether a model or an alias has the name."""
        return name in self._models

    def find(self, name: str, adapter: str = "") -> Named:
        """What the fields `model` and `adapter` of a request mean. Without either it is the default
        model.

        Raises ServiceError (MODEL_NOT_FOUND, ADAPTER_NOT_FOUND, INVALID_ARGUMENT), with the nearest
        name.
        """
        if not name:
            return self._of_adapter(adapter) if adapter else Named(self._default)
        found = self._find(name)
        if found is None:
            raise self._not_found(name)
        if adapter and found.adapter not in ("", adapter):
            raise invalid_field("adapter", f"`model` names another one, {found.adapter!r}")
        return Named(found.model, adapter or found.adapter)

    def is_allowed(self, named: Named, allowed: frozenset[str]) -> bool:
        """Whether a key that lists `allowed`, names as `find` takes them, may use something; an
        empty list allows everything, and a model stands for its adapters too."""
        if not allowed:
            return True
        for each in allowed:
            listed = self._find(each)
            if listed is not None and listed in (named, Named(named.model)):
                return True
        return False

    def _find(self, name: str) -> Named | None:
        model = self._models.get(name)
        if model is not None:
            return Named(model)
        known = self._hosting.adapters.get(name)
        if known is not None:
            return Named(known.model, name)
        # Either part may hold the mark.
        position = name.find(ADAPTER_MARK)
        while position >= 0:
            model = self._models.get(name[:position])
            if model is not None:
                return Named(model, name[position + 1 :])
            position = name.find(ADAPTER_MARK, position + 1)
        return None

    def _of_adapter(self, adapter: str) -> Named:
        known = self._hosting.adapters.get(adapter)
        if known is None:
            raise adapter_not_found(self._default, adapter, sorted(self._hosting.adapters))
        return Named(known.model, adapter)

    def _not_found(self, name: str) -> ServiceError:
        shown = name[:MAX_SHOWN_CHARS]
        known = [*self._models, *self._hosting.adapters]
        near = difflib.get_close_matches(shown, known, n=1, cutoff=0.4)
        suggestion = near[0] if near else self._default
        return ServiceError(
            Reason.MODEL_NOT_FOUND,
            f"no model is called {shown!r}; did you mean {suggestion!r}?",
            field_violations=[("model", "unknown model")],
            metadata={"nearest": suggestion},
        )
