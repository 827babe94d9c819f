"""Usage of encoders counted, for the metrics and the trace."""

from __future__ import annotations

from meshserve.v1 import types_pb2
from services.gateway.encoding.context import EncodingContext
from services.gateway.pipeline import Step
from services.gateway.usage import cost
from services.runtime.errors import ServiceError
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics


class SettleEncoding(Step[EncodingContext]):
    """Counts on the way out; what the cache had costs no tokens."""

    name = "settle"

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._currency = settings.gateway.currency
        self._prices = {
            name: model.price for name, model in settings.models.items() if model.price is not None
        }
        self._inputs = metrics.counter("meshserve_gateway_inputs")
        self._cached_inputs = metrics.counter("meshserve_gateway_cached_inputs")
        self._prompt_tokens = metrics.counter("meshserve_gateway_prompt_tokens")
        self._cost = metrics.counter("meshserve_gateway_cost")
        self._unchecked = metrics.counter("meshserve_gateway_unchecked_requests")

    async def before(self, context: EncodingContext) -> None:
        """Sets the usage: what every input cost when it was computed."""
        context.usages[0] = types_pb2.Usage(prompt_tokens=sum(context.tokens))

    def after(self, context: EncodingContext, error: ServiceError | None) -> None:
        """Counts what was answered."""
        model, tenant, span = context.served.name, context.tenant.name, context.span
        if context.unchecked:
            self._unchecked.labels(model).inc()
        if error is not None:
            return
        span.set_attribute("meshserve.cached", context.cached)
        span.set_attribute("meshserve.inputs", len(context.texts))
        span.set_attribute("gen_ai.response.model", model)
        span.set_attribute("gen_ai.usage.input_tokens", sum(context.tokens))
        self._inputs.labels(model, tenant, context.operation).inc(len(context.texts))
        self._cached_inputs.labels(model, tenant).inc(len(context.texts) - len(context.uncached))
        computed = types_pb2.Usage(
            prompt_tokens=sum(context.tokens[index] for index in context.uncached)
        )
        self._prompt_tokens.labels(model, tenant).inc(computed.prompt_tokens)
        price = self._prices.get(model)
        if price is not None:
            self._cost.labels(model, tenant, self._currency).inc(cost(computed, price))
