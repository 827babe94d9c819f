"""The models that a tokenizer service answers for, by name."""

from __future__ import annotations

import difflib
from pathlib import Path

from services.runtime.errors import Reason, ServiceError, invalid_field
from services.runtime.modelfiles.store import locate
from services.runtime.settings import ModelSettings
from services.tokenizer.model_tokenizer import ModelTokenizer, load_model_tokenizer


class ServedModels:
    """Tokenizers by model name and alias."""

    def __init__(self) -> None:
        self._tokenizers: dict[str, ModelTokenizer] = {}
        self._names: dict[str, str] = {}

    @property
    def names(self) -> list[str]:
        """Names of the models, aliases left out."""
        return list(self._tokenizers)

    def load(self, name: str, settings: ModelSettings, cache_dir: Path | None) -> None:
        """Loads the tokenizer of a model that is on this machine.

        Raises:
            ModelStoreError: the model is not there.
            TokenizerLoadError: it has no tokenizer that can be used.
        """
        self.add(name, load_model_tokenizer(locate(settings.source, cache_dir)), settings.aliases)

    def add(self, name: str, tokenizer: ModelTokenizer, aliases: tuple[str, ...] = ()) -> None:
        """Serves a tokenizer under a name."""
        self._tokenizers[name] = tokenizer
        self._names |= dict.fromkeys((name, *aliases), name)

    def find(self, name: str) -> tuple[str, ModelTokenizer]:
        """A model's own name and its tokenizer; the empty name means the only model.

        Raises ServiceError MODEL_NOT_FOUND, or INVALID_FIELD where a name is needed.
        """
        if not name:
            if len(self._tokenizers) != 1:
                raise invalid_field("model", "is required, because several models are served")
            return next(iter(self._tokenizers.items()))
        own_name = self._names.get(name)
        if own_name is None:
            near = difflib.get_close_matches(name[:256], self._names, n=1)
            raise ServiceError(
                Reason.MODEL_NOT_FOUND,
                "no model has this name" + (f"; did you mean {near[0]!r}?" if near else ""),
                field_violations=[("model", "is not a model that is served")],
                metadata={"nearest": near[0]} if near else None,
            )
        return own_name, self._tokenizers[own_name]
