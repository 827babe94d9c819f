"""The models that one engine hosts, by their names, and what they do together."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from services.engine.core.messages import Load, ModelFacts
from services.engine.hosted_model import HostedModel, State
from services.engine.refusals import draining_error
from services.runtime.errors import Reason, ServiceError

log = logging.getLogger(__name__)

_TAKES_REQUESTS = (State.READY, State.SLEEPING, State.WAKING)


class Hosting:
    """All models of an engine, in the order of the settings.

    Attributes:
        models: at least one.
        is_draining: whether it takes nothing new, for good.
    """

    def __init__(self, models: Sequence[HostedModel]) -> None:
        self.models = tuple(models)
        self.is_draining = False
        self._by_name = {
            name: model for model in self.models for name in (model.name, *model.aliases)
        }

    def find(self, name: str) -> HostedModel:
        """The model behind a name or an alias; the first for "".

        Raises:
            ServiceError: this engine has no such model.
        """
        model = self._by_name.get(name) if name else self.models[0]
        if model is None:
            raise ServiceError(
                Reason.MODEL_NOT_FOUND,
                "this engine does not run the model",
                metadata={"served": ", ".join(each.name for each in self.models)},
            )
        return model

    def find_able(self, name: str, is_able: Callable[[ModelFacts], bool]) -> HostedModel:
        """The same; for "" the first that takes requests and is able, or of which that is not known
        before it has been in memory."""
        if name or len(self.models) == 1:
            return self.find(name)
        takes = [model for model in self.models if model.state in _TAKES_REQUESTS]
        able = [model for model in takes if (facts := model.client.facts) and is_able(facts)]
        unknown = [model for model in takes if model.client.facts is None]
        return (*able, *unknown, self.models[0])[0]

    async def start(self, names: Sequence[str]) -> None:
        """Loads some of the models, one after another: each finds the memory that those before it
        have left. Those that cannot be loaded are FAILED afterwards."""
        for name in names:
            try:
                await self.find(name).load()
            except ServiceError:
                continue  # the model's log has said why

    def check_health(self) -> None:
        """Raises ServiceError where a model is unwell and no other could take a request.

        What an operator has unloaded is not unwell, and one that sleeps could.
        """
        unwell = draining_error() if self.is_draining else None
        for model in self.models:
            if model.state in (State.READY, State.FAILED):
                try:
                    model.check_ready()
                except ServiceError as error:
                    unwell = unwell or error
                    continue
            if model.state in _TAKES_REQUESTS and not self.is_draining:
                return
        if unwell is not None:
            raise unwell

    def load(self) -> Load:
        """What all cores do together; of times and flags the largest."""
        if len(self.models) == 1:
            return self.models[0].client.load
        loads = [model.client.load for model in self.models]
        return Load(
            **{
                field: (max if field in ("last_step_us", "draining") else sum)(
                    getattr(load, field) for load in loads
                )
                for field in Load.__struct_fields__
            }
        )

    async def drain(self, timeout_s: float) -> None:
        """Takes nothing new, and waits until what is in flight has ended; it is aborted after
        `timeout_s`."""
        self.is_draining = True
        await asyncio.gather(*(model.drain(timeout_s) for model in self.models))

    async def close(self) -> None:
        """Ends all cores."""
        await asyncio.gather(*(model.close() for model in self.models))
