"""Requests that wait for their model to wake: known by their ids, so that another call can abort
them."""

from __future__ import annotations

import asyncio

from services.engine.hosted_model import HostedModel
from services.engine.validation import check_request_id
from services.runtime.errors import Reason, ServiceError


class WaitingRequests:
    """Those of one engine."""

    def __init__(self) -> None:
        self._aborts: dict[str, asyncio.Future[None]] = {}

    async def wait(self, request_id: str, model: HostedModel) -> None:
        """Returns once the model is awake; at once where it is not asleep.

        Raises:
            ServiceError: it could not be loaded, another call aborted the request, or its id is
                not valid or that of another that waits.
        """
        if not model.is_asleep:
            return
        check_request_id(request_id)
        if request_id in self._aborts:
            raise ServiceError(Reason.REQUEST_ID_IN_USE, "a request with this id is in flight")
        abort = self._aborts[request_id] = asyncio.get_running_loop().create_future()
        try:
            # Again where it has fallen asleep before this request had its turn.
            while model.is_asleep:
                await self._wake(model, abort)
        finally:
            del self._aborts[request_id]

    async def _wake(self, model: HostedModel, abort: asyncio.Future[None]) -> None:
        waking = asyncio.ensure_future(model.wake())
        try:
            await asyncio.wait((waking, abort), return_when=asyncio.FIRST_COMPLETED)
            if abort.done():
                raise ServiceError(Reason.ABORTED, "the request was aborted by another call")
            waking.result()
        finally:
            waking.cancel()

    def abort(self, request_id: str) -> bool:
        """Ends the wait of a request. Returns whether there was one."""
        abort = self._aborts.get(request_id)
        if abort is None or abort.done():
            return False
        abort.set_result(None)
        return True
