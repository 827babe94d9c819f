"""Plugins that edit the logits of a request, found by their entry points.

A package offers one under the group `meshserve.logits_processors`, by a name that requests give:

    [project.entry-points."meshserve.logits_processors"]
    no-repeats = "my_package:NoRepeats"

What the entry point names is called once with the request's arguments, a dict from JSON, and gives
a `LogitsProcessor`. It is shared by all requests that give the same arguments.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache, lru_cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Protocol

from services.engine.core.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor

GROUP = "meshserve.logits_processors"


class LogitsProcessor(Protocol):
    """Edits the logits of one next token. It keeps nothing between calls: what it does depends on
    its arguments alone, since a sequence may be computed anew, guessed ahead or be one of several.
    """

    def __call__(
        self, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int], logits: Tensor, /
    ) -> Tensor:
        """The edited logits, [vocab] float32 as given; they may be edited in place.

        Tokens at -Inf cannot be chosen, whatever is done to them here.
        """
        ...


class LogitsProcessorError(EngineError):
    """A logits processor raised, or gave back what are no logits."""


@cache
def processor_names() -> frozenset[str]:
    """The names that requests may give."""
    return frozenset(entry.name for entry in entry_points(group=GROUP))


@lru_cache(maxsize=256)
def _processor(name: str, arguments_json: str) -> LogitsProcessor:
    (entry,) = entry_points(group=GROUP, name=name)
    processor: LogitsProcessor = entry.load()(json.loads(arguments_json))
    return processor


def process(
    calls: tuple[tuple[str, str], ...],
    prompt_token_ids: Sequence[int],
    output_token_ids: Sequence[int],
    logits: Tensor,
) -> Tensor:
    """What the processors, (name, arguments as JSON) each, make of `logits` [vocab], which is not
    changed.

    Raises:
        LogitsProcessorError: one of them failed.
    """
    edited = logits.clone()
    for name, arguments_json in calls:
        try:
            edited = _processor(name, arguments_json)(prompt_token_ids, output_token_ids, edited)
            if edited.shape != logits.shape:
                raise ValueError(f"it gave logits of shape {tuple(edited.shape)}")
            edited = edited.to(logits.dtype)
        except Exception as error:
            raise LogitsProcessorError(
                f"the logits processor {name!r} failed: {type(error).__name__}: {error}"
            ) from error
    return edited.masked_fill(logits.isneginf(), -float("inf"))
