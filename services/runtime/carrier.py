"""Short calls to one service that travel together on one stream, the caller's side."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from meshserve.v1 import calls_pb2, types_pb2
from services.runtime.errors import Reason, ServiceError, from_session_status
from services.runtime.exchanges import ExchangeStream, SessionPool, StreamLostError
from services.runtime.replicas import Replica, ReplicaSet
from services.runtime.response_streams import ResponseStream

log = logging.getLogger(__name__)

# Longer calls take so long to answer that they are better balanced over the replicas one by one,
# and would keep the others on the stream waiting.
MAX_REQUEST_BYTES = 1 << 14
# How long calls go their own ways after the stream was lost, until it is tried again.
PAUSE_S = 1.0


class Carrier:
    """Carries calls as long as there is a stream; whoever calls has another way.

    Args:
        peer: the service's name.
        replicas: of the service.
        open_stream: opens a standing stream of CarryCalls to a replica.
    """

    def __init__(
        self,
        peer: str,
        replicas: ReplicaSet,
        open_stream: Callable[[Replica], ResponseStream],
    ) -> None:
        self._peer = peer
        self._pool: SessionPool[calls_pb2.CarriedRequest, calls_pb2.CarriedResponse] = SessionPool(
            peer,
            replicas,
            open_stream=open_stream,
            make_request=lambda inputs: calls_pb2.CarryCallsRequest(inputs=inputs),
            outputs_of=lambda response: response.outputs,
        )

    async def call(
        self,
        replica: Replica,
        method: str,
        request: bytes,
        metadata: tuple[tuple[str, str], ...],
        timeout_s: float | None,
    ) -> bytes | None:
        """The serialized response; None where the call has to go its own way after all: what was
        said of it on the stream, if anything, is not known.

        Raises ServiceError.
        """
        if len(request) > MAX_REQUEST_BYTES:
            return None
        stream = self._pool.stream_to(replica, PAUSE_S)
        if stream is None:
            return None
        message = calls_pb2.CarriedRequest(
            session_id=self._pool.new_session_id(),
            method=method,
            request=request,
            trace=types_pb2.TraceContext(**dict(metadata)),
        )
        if timeout_s is not None:
            message.timeout_ms = max(1, round(timeout_s * 1000))
        try:
            output = await stream.exchange(message.session_id, message, timeout_s)
        except StreamLostError:
            log.info("calls to the %s service are not carried for now", self._peer)
            return None
        except TimeoutError:
            _give_up(stream, message.session_id)
            raise ServiceError(
                Reason.DEADLINE_EXCEEDED, "the deadline passed", metadata={"service": self._peer}
            ) from None
        except asyncio.CancelledError:
            _give_up(stream, message.session_id)
            raise
        if not output.HasField("error"):
            return output.response
        error = from_session_status(output.error, peer=self._peer)
        if error.reason is not Reason.DRAINING:
            raise error
        replica.pause()
        return None

    def close(self) -> None:
        """Ends the streams."""
        self._pool.close()


def _give_up(
    stream: ExchangeStream[calls_pb2.CarriedRequest, calls_pb2.CarriedResponse], session_id: int
) -> None:
    if not stream.lost:
        stream.send(calls_pb2.CarriedRequest(session_id=session_id, cancel=True))
