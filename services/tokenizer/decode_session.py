"""One completion on a shared StreamDecode stream: token ids in, text out, a span around it."""

from __future__ import annotations

from opentelemetry.trace import SpanKind
from prometheus_client import Counter, Gauge

from meshserve.v1 import tokenizer_pb2
from services.runtime.errors import Reason, ServiceError, invalid_field
from services.runtime.telemetry import get_tracer
from services.runtime.telemetry.tracing import context_of, mark_failed
from services.tokenizer.detokenizer import IncrementalDecoder
from services.tokenizer.errors import UnknownTokenIdError
from services.tokenizer.model_tokenizer import ModelTokenizer

SPAN_NAME = "decode session"
# Decoding runs on the event loop, and this many tokens take it some tens of milliseconds.
MAX_TOKENS_PER_INPUT = 1 << 20


class DecodeSession:
    """Turns the inputs of one session into its outputs; see `DecodeInput` in the contract.

    Args:
        opening: the first input; it has `open` set.
        tokenizer: the tokenizer of the model that it names.
        decoded_tokens: counts tokens.
        sessions: counts open sessions.

    Raises ServiceError INVALID_FIELD if it resumes with a token id that does not exist.
    """

    def __init__(
        self,
        opening: tokenizer_pb2.DecodeInput,
        tokenizer: ModelTokenizer,
        decoded_tokens: Counter,
        sessions: Gauge,
    ) -> None:
        given = opening.open
        self.finished = False
        self._session_id = opening.session_id
        self._decoder = IncrementalDecoder(
            tokenizer.detokenizer, keep_special_tokens=given.keep_special_tokens
        )
        if given.decoded_token_ids:
            # Their text went out on the lost stream; only what they leave open matters.
            self._feed(list(given.decoded_token_ids), "inputs.open.decoded_token_ids")
        self._decoded_tokens = decoded_tokens
        self._sessions = sessions
        self._messages = 0
        self._tokens = 0
        sessions.inc()
        self._span = get_tracer().start_span(
            SPAN_NAME, context=context_of(given.trace), kind=SpanKind.SERVER
        )

    def feed(self, message: tokenizer_pb2.DecodeInput) -> tokenizer_pb2.DecodeOutput | None:
        """The answer to one input, if it brings tokens or ends the session.

        Raises ServiceError INVALID_FIELD for a token id that the vocabulary does not have.
        """
        self._messages += 1
        token_ids = list(message.token_ids)
        if not token_ids and not message.finish:
            return None
        text = self._feed(token_ids, "inputs.token_ids") if token_ids else ""
        self._tokens += len(token_ids)
        self._decoded_tokens.inc(len(token_ids))
        if message.finish:
            text += self._decoder.finish()
            self.finished = True
        return tokenizer_pb2.DecodeOutput(
            session_id=self._session_id,
            text=text,
            decoded_tokens=self._decoder.decoded_tokens,
            finished=self.finished,
        )

    def close(self, error: ServiceError | None) -> None:
        """Ends the span."""
        self._sessions.dec()
        span = self._span
        cancelled = error is not None and error.reason is Reason.CANCELLED
        span.set_attribute("meshserve.session.messages", self._messages)
        span.set_attribute("meshserve.session.tokens", self._tokens)
        span.set_attribute("meshserve.session.cancelled", cancelled)
        if error is not None and not cancelled:
            mark_failed(span, error)
        span.end()

    def _feed(self, token_ids: list[int], path: str) -> str:
        if len(token_ids) > MAX_TOKENS_PER_INPUT:
            raise invalid_field(path, f"has more than {MAX_TOKENS_PER_INPUT} tokens")
        try:
            return self._decoder.feed(token_ids)
        except UnknownTokenIdError as error:
            raise invalid_field(f"{path}[{error.position}]", str(error)) from None
