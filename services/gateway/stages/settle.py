"""Usage counted, for the metrics and the trace."""

from __future__ import annotations

import time

from meshserve.v1 import types_pb2
from services.gateway.context import RequestContext
from services.gateway.events import ChoiceEnd
from services.gateway.pipeline import Stage
from services.gateway.usage import cost, total_usage
from services.runtime.errors import ServiceError
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics, exemplar_of


class Settle(Stage):
    """Counts on the way out; a cached answer costs no tokens."""

    name = "settle"
    on_replay = True

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._currency = settings.gateway.currency
        self._prices = {
            name: model.price for name, model in settings.models.items() if model.price is not None
        }
        self._prompt_tokens = metrics.counter("meshserve_gateway_prompt_tokens")
        self._completion_tokens = metrics.counter("meshserve_gateway_completion_tokens")
        self._cached_prompt_tokens = metrics.counter("meshserve_gateway_cached_prompt_tokens")
        self._cached = metrics.counter("meshserve_gateway_cached_responses")
        self._cached_tokens = metrics.counter("meshserve_gateway_cached_completion_tokens")
        self._cost = metrics.counter("meshserve_gateway_cost")
        # Begun at nothing, so that the very first one is seen to have been added.
        unchecked = metrics.counter("meshserve_gateway_unchecked_requests")
        self._unchecked = {name: unchecked.labels(name) for name in settings.models}
        self._first_token = metrics.histogram("meshserve_gateway_time_to_first_token_seconds")
        self._intervals = metrics.distributions("meshserve_gateway_inter_token_latency_seconds")
        self._per_token = metrics.histogram("meshserve_gateway_time_per_output_token_seconds")

    async def before(self, context: RequestContext) -> None:
        """Says where the pauses of the stream are counted."""
        if context.streaming and context.cached_answer is None:
            context.text_intervals = self._intervals.labels(context.served.name)

    def after(self, context: RequestContext, error: ServiceError | None) -> None:
        """Counts what was used, also of a request that failed on the way."""
        model, tenant, span = context.served.name, context.tenant.name, context.span
        cached = context.cached_answer is not None
        usage = total_usage(context)
        span.set_attribute("meshserve.cached", cached)
        span.set_attribute("gen_ai.response.model", model)
        span.set_attribute("gen_ai.usage.input_tokens", usage.prompt_tokens)
        span.set_attribute("gen_ai.usage.cache_read.input_tokens", usage.cached_prompt_tokens)
        span.set_attribute("gen_ai.usage.output_tokens", usage.completion_tokens)
        span.set_attribute(
            "gen_ai.response.finish_reasons",
            [
                types_pb2.FinishReason.Name(event.finish_reason)
                .removeprefix("FINISH_REASON_")
                .lower()
                for event in context.events
                if isinstance(event, ChoiceEnd)
            ],
        )
        if cached:
            self._cached.labels(model, tenant).inc()
            self._cached_tokens.labels(model, tenant).inc(usage.completion_tokens)
        else:
            self._prompt_tokens.labels(model, tenant).inc(usage.prompt_tokens)
            self._cached_prompt_tokens.labels(model, tenant).inc(usage.cached_prompt_tokens)
            self._completion_tokens.labels(model, tenant).inc(usage.completion_tokens)
            price = self._prices.get(model)
            if price is not None:
                self._cost.labels(model, tenant, self._currency).inc(cost(usage, price))
        if context.unchecked:
            self._unchecked[model].inc()
        if context.first_text_at is None:
            return
        first_s = context.first_text_at - context.arrived_at
        span.set_attribute("gen_ai.response.time_to_first_chunk", first_s)
        exemplar = exemplar_of(span)
        self._first_token.labels(model).observe(first_s, exemplar)
        if not cached and error is None and usage.completion_tokens > 1:
            rest_s = time.perf_counter() - context.first_text_at
            self._per_token.labels(model).observe(rest_s / (usage.completion_tokens - 1), exemplar)
