"""The engine's tokens, turned into text, with stop strings found and cut."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator

from opentelemetry.trace import Span

from meshserve.v1 import engine_pb2, tokenizer_pb2, types_pb2
from services.gateway.best_of import likeliest
from services.gateway.context import RequestContext
from services.gateway.events import ChoiceEnd, Event, TextDelta
from services.gateway.field_paths import renamed_fields
from services.gateway.models import ModelDirectory
from services.gateway.peers import DecodePool
from services.gateway.pipeline import Stage, first_error
from services.gateway.sessions import Session
from services.gateway.stop_strings import StopMatch, StopStringMatcher
from services.runtime.errors import Reason, ServiceError
from services.runtime.telemetry.tracing import in_span, trace_context_of

# Fields of the engine's request that go by another name in ours.
ENGINE_FIELDS = {
    "prompt": "input",
    "stop_sequences": "stopping.stop_strings",
    "logprobs": "output.logprobs",
    "prompt_logprobs": "output.prompt_logprobs",
}


# The engine takes ids of 256 characters; 128 are the caller's.
MAX_TENANT_CHARS = 127


class Generate(Stage):
    """Source of the events. Leaving its stream aborts the request in the engine."""

    name = "generate"

    def __init__(self, pool: DecodePool, models: ModelDirectory) -> None:
        self._pool = pool
        self._models = models

    async def before(self, context: RequestContext) -> None:
        """Waits for an engine where the model's run only while they are asked for. Raises
        ServiceError (UNAVAILABLE)."""
        context.model = await self._models.with_engine(context.served.name)

    def stream(
        self, context: RequestContext, events: AsyncGenerator[Event], span: Span
    ) -> AsyncGenerator[Event]:
        """Raises ServiceError. Ends once every choice has ended."""
        drawn = self._generate(context, span)
        return drawn if context.drawn == context.choices else likeliest(context, drawn)

    async def _generate(self, context: RequestContext, span: Span) -> AsyncGenerator[Event]:
        trace = trace_context_of(span)
        with in_span(span):
            call = context.served.engine_calls.generate(
                engine_request(context),
                self._models.eligible(context.served.name, context.request.adapter),
            )
        choices = [_Choice(context, self._pool, index, trace) for index in range(context.drawn)]
        unended = len(choices)
        begun = False
        try:
            async with call:
                with renamed_fields(ENGINE_FIELDS):
                    async for output in call:
                        if output.chunk.HasField("prompt_logprobs"):
                            context.prompt_logprobs = output.chunk.prompt_logprobs
                        if not begun:
                            begun = True
                            for delta in output.chunk.deltas:
                                context.engine_timings[delta.index] = delta.timings
                            for event in _beginning(choices, context):
                                yield event
                        for complete in output.completes:
                            context.engine_timings[complete.index] = complete.timings
                        for event in await _events(output, choices):
                            if isinstance(event, ChoiceEnd):
                                unended -= 1
                                # A stop string that only the text shows: the engine would go on,
                                # and a slow reader must not keep it from being told.
                                if not unended and not all(each.engine_is_done for each in choices):
                                    call.cancel()
                                    yield event
                                    return
                                if not choices[event.index].engine_is_done:
                                    call.abort([event.index])
                            yield event
            if unended:
                raise ServiceError(
                    Reason.INTERNAL, "the engine's stream ended before its choices did"
                )
        finally:
            for choice in choices:
                choice.cancel()


def engine_request(context: RequestContext) -> engine_pb2.EngineServiceGenerateRequest:
    """What the engine is asked for a request that has been tokenized."""
    source = context.request
    request = engine_pb2.EngineServiceGenerateRequest(
        model=source.model,
        # Ids are the callers' own: two tenants may choose the same.
        request_id=f"{context.tenant.name[:MAX_TENANT_CHARS]}/{context.request_id}",
        prompt=types_pb2.TokenIds(ids=context.prompt_token_ids),
        sampling=source.sampling,
        stopping=source.stopping,
        stop_sequences=[types_pb2.TokenIds(ids=ids) for ids in context.stop_sequences],
        priority=source.priority,
        cache_salt=context.tenant.name.encode(),
        adapter=source.adapter,
        tenant=context.tenant.name,
    )
    # Text is the gateway's; the engine gets the token side of it.
    del request.stopping.stop_strings[:]
    request.stopping.max_tokens = context.max_tokens
    if source.HasField("constraint"):
        request.constraint.CopyFrom(source.constraint)
    if context.drawn > context.choices:
        request.sampling.n = context.drawn
        request.sampling.ClearField("best_of")
        request.logprobs = 0
    if source.output.HasField("logprobs"):
        request.logprobs = source.output.logprobs
        if source.output.echo:
            request.prompt_logprobs = source.output.logprobs
    if source.output.HasField("prompt_logprobs"):
        request.prompt_logprobs = source.output.prompt_logprobs
    return request


def _beginning(choices: list[_Choice], context: RequestContext) -> Iterator[Event]:
    """What comes with the first word of the engine: the prompt has been read, so it counts."""
    for index, choice in enumerate(choices):
        context.usages[index] = choice.usage
        if context.request.output.echo:
            yield TextDelta(index, context.request.text)


async def _events(output: engine_pb2.GenerationOutput, choices: list[_Choice]) -> list[Event]:
    events: list[Event] = []
    ends = {complete.index: complete for complete in output.completes}
    deltas = [delta for delta in output.chunk.deltas if not choices[delta.index].ended]
    if len(deltas) == 1:
        (delta,) = deltas
        events = await choices[delta.index].feed(delta, ends.get(delta.index))
    elif deltas:
        # Side by side, so that all choices go in one message to the tokenizer.
        try:
            async with asyncio.TaskGroup() as group:
                fed = [
                    group.create_task(choices[delta.index].feed(delta, ends.get(delta.index)))
                    for delta in deltas
                ]
        except BaseExceptionGroup as failures:
            raise first_error(failures) from None
        events = [event for task in fed for event in task.result()]
    for complete in output.completes:
        choice = choices[complete.index]
        choice.engine_is_done = True
        if not choice.ended:
            events += await choice.finish(complete)
    return events


def _mark_last(events: list[Event]) -> None:
    """Says of the last text of a choice that its end follows."""
    if len(events) > 1 and isinstance(events[-1], ChoiceEnd):
        before = events[-2]
        if isinstance(before, TextDelta):
            before.is_last = True


class _Choice:
    """One completion: its decode session, its stop matcher, its count."""

    def __init__(
        self,
        context: RequestContext,
        pool: DecodePool,
        index: int,
        trace: types_pb2.TraceContext,
    ) -> None:
        self.ended = False
        self.engine_is_done = False
        self._context = context
        self._index = index
        self._trace = trace
        request = context.request
        self._output = request.output
        self._stopping = request.stopping
        self._matcher = StopStringMatcher(
            list(request.stopping.stop_strings),
            include_stop=request.stopping.include_stop_in_text,
        )
        self._decoded: list[int] = []
        self.usage = types_pb2.Usage(prompt_tokens=len(context.prompt_token_ids))
        self._session: Session[tokenizer_pb2.DecodeInput, tokenizer_pb2.DecodeOutput] = Session(
            pool, self._message, lambda sid: tokenizer_pb2.DecodeInput(session_id=sid, cancel=True)
        )

    async def feed(
        self, delta: engine_pb2.TokenDelta, complete: engine_pb2.TokenComplete | None
    ) -> list[Event]:
        """The events of the tokens that were added, and of the end where it came with them."""
        events: list[Event] = []
        parts = self._parts(len(delta.token_ids))
        for part in parts:
            if self.ended:
                break
            may_stop = self.usage.completion_tokens + part.stop - part.start >= (
                self._stopping.min_tokens
            )
            token_ids = list(delta.token_ids[part])
            positions = list(delta.logprobs.positions[part])
            finish = complete is not None and part is parts[-1]
            events += await self._feed(token_ids, positions, may_stop, finish=finish)
        if complete is not None and not self.ended:
            events += self._end(complete)
        if complete is not None:
            _mark_last(events)
        return events

    def _parts(self, tokens: int) -> list[slice]:
        """How a delta is taken: whole, or by the token where text may end the choice, so that what
        is counted does not depend on how many tokens happened to come together."""
        if self._stopping.stop_strings:
            return [slice(position, position + 1) for position in range(tokens)]
        return [slice(0, tokens)]

    async def finish(self, complete: engine_pb2.TokenComplete) -> list[Event]:
        """The last text and the end."""
        output = await self._session.exchange(((), True))
        events = self._match(output.text, [], [], may_stop=self._may_stop())
        if not self.ended:
            events += self._end(complete)
        _mark_last(events)
        return events

    def _end(self, complete: engine_pb2.TokenComplete) -> list[Event]:
        self.ended = True
        events: list[Event] = []
        usage = self.usage
        usage.cached_prompt_tokens = complete.usage.cached_prompt_tokens
        held = self._matcher.flush()
        matched: types_pb2.MatchedStop | None = None
        if complete.HasField("stop_token_id"):
            if complete.stop_token_id in self._stopping.stop_token_ids:
                matched = types_pb2.MatchedStop(token_id=complete.stop_token_id)
        elif complete.HasField("stop_sequence_index"):
            # The tokens of a stop string came without its text matching: special tokens that the
            # text leaves out, or a spelling with other spaces. The engine's word stands.
            matched = types_pb2.MatchedStop(
                text=self._stopping.stop_strings[complete.stop_sequence_index]
            )
        if held:
            events.append(TextDelta(self._index, held))
        events.append(ChoiceEnd(self._index, complete.finish_reason, matched, usage))
        return events

    def cancel(self) -> None:
        """Gives the session up if it is not over."""
        self._session.cancel()

    def _may_stop(self) -> bool:
        return self.usage.completion_tokens >= self._stopping.min_tokens

    async def _feed(
        self,
        token_ids: list[int],
        positions: list[types_pb2.PositionLogprobs],
        may_stop: bool,
        *,
        finish: bool,
    ) -> list[Event]:
        output = await self._session.exchange((token_ids, finish))
        self._decoded += token_ids
        self.usage.completion_tokens += len(token_ids)
        return self._match(output.text, token_ids, positions, may_stop=may_stop)

    def _match(
        self,
        text: str,
        token_ids: list[int],
        positions: list[types_pb2.PositionLogprobs],
        *,
        may_stop: bool,
    ) -> list[Event]:
        found = self._matcher.feed(text, may_stop=may_stop)
        passed = found.text if isinstance(found, StopMatch) else found
        delta = TextDelta(self._index, passed)
        if self._output.token_ids:
            delta.token_ids = token_ids
        if positions:
            delta.logprobs = types_pb2.Logprobs(positions=positions)
        events: list[Event] = []
        if delta.text or delta.token_ids or delta.logprobs is not None:
            events.append(delta)
        if isinstance(found, StopMatch):
            self.ended = True
            matched = types_pb2.MatchedStop(text=found.stop)
            events.append(ChoiceEnd(self._index, types_pb2.FINISH_REASON_STOP, matched, self.usage))
        return events

    def _message(
        self, session_id: int, payload: tuple[list[int], bool], opening: bool
    ) -> tokenizer_pb2.DecodeInput:
        token_ids, finish = payload
        message = tokenizer_pb2.DecodeInput(
            session_id=session_id, token_ids=token_ids, finish=finish
        )
        if opening:
            message.open.model = self._context.request.model
            message.open.keep_special_tokens = self._output.keep_special_tokens
            message.open.trace.CopyFrom(self._trace)
            message.open.decoded_token_ids.extend(self._decoded)
        return message
