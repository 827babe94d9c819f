"""From the core's deltas to the contract's messages."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from meshserve.v1 import engine_pb2, types_pb2
from services.engine.core.messages import Delta, Finish, FinishReason, Timing, TokenLogprobs

_FINISH_REASONS = {
    FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    FinishReason.ABORTED: types_pb2.FINISH_REASON_ABORTED,
}
_FAILURES = (FinishReason.ABORTED, FinishReason.ERROR)


class ResponseBuilder:
    """Turns what has accrued for one request into messages: a chunk, then a complete per end."""

    def __init__(self, choices: Mapping[int, int], prompt: list[int]) -> None:
        """`choices` maps sequence ids to choice indices; `prompt` are token ids."""
        self._choices = choices
        self._prompt = prompt
        self._completion_tokens = dict.fromkeys(choices, 0)

    def add_tokens(self, chunk: engine_pb2.TokenChunk, deltas: list[Delta]) -> None:
        """Adds the tokens of `deltas` to an empty chunk, one entry for each choice."""
        by_sequence: dict[int, list[Delta]] = {}
        for delta in deltas:
            if delta.prompt_logprobs is not None:
                chunk.prompt_logprobs.positions.extend(
                    map(_position, self._prompt[1:], delta.prompt_logprobs)
                )
                chunk.prompt_logprobs.SetInParent()
            if delta.token_ids:
                by_sequence.setdefault(delta.sequence_id, []).append(delta)
        for sequence_id, added in by_sequence.items():
            token_ids = [token_id for delta in added for token_id in delta.token_ids]
            self._completion_tokens[sequence_id] += len(token_ids)
            token_delta = chunk.deltas.add(index=self._choices[sequence_id], token_ids=token_ids)
            for delta in added:
                if delta.timing is not None and delta.finish is None:
                    token_delta.timings.CopyFrom(_timings(delta.timing))
                if delta.logprobs:
                    token_delta.logprobs.positions.extend(
                        map(_position, delta.token_ids, delta.logprobs)
                    )

    def completes(
        self, deltas: list[Delta], withdrawn: Collection[int] = ()
    ) -> Iterator[engine_pb2.TokenComplete]:
        """The ends in `deltas` that are no failures; call it after `add_tokens`.

        That a sequence was aborted is none if its id is among `withdrawn`.
        """
        for delta in deltas:
            if delta.finish is None or delta.timing is None:
                continue
            reason = delta.finish.reason
            is_wanted = reason is FinishReason.ABORTED and delta.sequence_id in withdrawn
            if reason not in _FAILURES or is_wanted:
                yield self._complete(delta.sequence_id, delta.finish, delta.timing)

    def _complete(
        self, sequence_id: int, finish: Finish, timing: Timing
    ) -> engine_pb2.TokenComplete:
        return engine_pb2.TokenComplete(
            index=self._choices[sequence_id],
            finish_reason=_FINISH_REASONS[finish.reason],
            stop_token_id=finish.stop_token_id,
            stop_sequence_index=finish.stop_sequence_index,
            usage=types_pb2.Usage(
                prompt_tokens=len(self._prompt),
                completion_tokens=self._completion_tokens[sequence_id],
                cached_prompt_tokens=timing.cached_prompt_tokens,
            ),
            timings=_timings(timing),
        )


def _timings(timing: Timing) -> engine_pb2.EngineTimings:
    return engine_pb2.EngineTimings(
        queued_time_unix_ns=timing.queued_ns,
        scheduled_time_unix_ns=timing.prefill_start_ns,
        first_token_time_unix_ns=timing.first_token_ns,
        finished_time_unix_ns=timing.finished_ns,
        preemptions=timing.preemptions,
        steps=timing.steps,
    )


def _position(token_id: int, logprobs: TokenLogprobs) -> types_pb2.PositionLogprobs:
    return types_pb2.PositionLogprobs(
        chosen=types_pb2.TokenLogprob(token_id=token_id, logprob=logprobs.logprob),
        top=[
            types_pb2.TokenLogprob(token_id=top_id, logprob=top_logprob)
            for top_id, top_logprob in zip(
                logprobs.top_token_ids, logprobs.top_logprobs, strict=True
            )
        ],
    )
