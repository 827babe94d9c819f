"""Makes sequences of the requests that arrive, or says why they are refused."""

from __future__ import annotations

from collections.abc import Mapping

from services.engine.core.adapters.identity import LoadedAdapter
from services.engine.core.adapters.loaded import Adapters
from services.engine.core.admission import AdmissionLimits, QueueLimits
from services.engine.core.clock import now_ns
from services.engine.core.constraints.compilation import Compiler
from services.engine.core.errors import (
    AdapterNotFoundError,
    DuplicateSequenceError,
    InvalidSequenceError,
)
from services.engine.core.messages import SequenceRequest
from services.engine.core.sequence import Sequence


class Arrivals:
    """Numbers sequences in the order in which they arrive; it keeps none of them."""

    def __init__(
        self,
        limits: AdmissionLimits,
        queue_limits: QueueLimits,
        eos_token_ids: tuple[int, ...],
        compiler: Compiler | None,
        adapters: Adapters | None,
    ) -> None:
        """As Scheduler."""
        self._limits = limits
        self._queue_limits = queue_limits
        self._eos_token_ids = eos_token_ids
        self._compiler = compiler
        self._adapters = adapters
        self._arrivals = 0

    def sequences_of(
        self,
        requests: list[SequenceRequest],
        live: Mapping[int, Sequence],
        waiting: tuple[int, int],
        *,
        continuing: bool,
    ) -> list[Sequence]:
        """The sequences of a request, whose rules are being compiled from now on.

        live: those there are, by their ids. waiting: how many sequences wait, and their tokens.
        Raises what `Scheduler.add` raises, but for DrainingError.
        """
        if self._compiler is None and any(request.constraint for request in requests):
            raise InvalidSequenceError("outputs of this engine follow no rules")
        max_tokens = [self._limits.max_output_tokens(request) for request in requests]
        ids = {request.sequence_id for request in requests}
        if len(ids) < len(requests) or not ids.isdisjoint(live):
            raise DuplicateSequenceError("a sequence id is in use already")
        queued_ns = now_ns()
        arrived: list[Sequence] = []
        for request, max_output_tokens in zip(requests, max_tokens, strict=True):
            sequence = Sequence(
                request,
                arrival=self._arrivals + len(arrived),
                eos_token_ids=self._eos_token_ids,
                max_tokens=max_output_tokens,
                queued_ns=queued_ns,
                adapter=self._adapter(request.adapter, continuing=continuing),
            )
            sequence.fork_of = next((each for each in arrived if each.may_fork(request)), None)
            arrived.append(sequence)
        num_tokens = sum(each.num_tokens for each in arrived if each.fork_of is None)
        self._queue_limits.check(waiting, (len(arrived), num_tokens))
        self._arrivals += len(arrived)
        for sequence in arrived:
            if (rule := sequence.request.constraint) is not None and self._compiler is not None:
                sequence.compilation = self._compiler.compile(rule)
        return arrived

    def _adapter(self, name: str, *, continuing: bool) -> LoadedAdapter | None:
        if not name:
            return None
        if self._adapters is None:
            raise AdapterNotFoundError("this model runs without adapters")
        return self._adapters.find(name, continuing=continuing)
