"""The check of texts that go to an encoder."""

from __future__ import annotations

from functools import partial

from services.gateway.encoding.context import EncodingContext
from services.gateway.pipeline import Step
from services.gateway.prompt_check import PromptCheck
from services.gateway.prompt_texts import PromptText


class ScreenInputs(Step[EncodingContext]):
    """Asks the safety filter about every text that the engine is going to compute; what the cache
    had was checked under the same policy when it was made."""

    name = "screen"

    def __init__(self, check: PromptCheck) -> None:
        self._check = check

    def waits(self, context: EncodingContext) -> bool:
        """Whether there is a filter to ask."""
        return self._check.enabled and bool(context.uncached)

    async def before(self, context: EncodingContext) -> None:
        """Raises ServiceError (PROMPT_BLOCKED). Redaction changes the texts of the context."""
        if not self.waits(context):
            return
        texts = [
            PromptText(
                context.path(index),
                context.texts[index],
                partial(context.texts.__setitem__, index),
            )
            for index in context.uncached
        ]
        if context.query:
            texts.append(PromptText("query", context.query, partial(setattr, context, "query")))
        await self._check(context, texts)
