"""From the contract's request to the core's, or INVALID_ARGUMENT with the path of the field."""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Container, Iterable, Iterator

from google.protobuf import json_format
from msgspec.structs import replace

from meshserve.v1 import engine_pb2, types_pb2
from services.engine.core.logits_processors import processor_names
from services.engine.core.messages import (
    Constraint,
    ModelFacts,
    Sampling,
    SequenceRequest,
    Stopping,
)
from services.engine.refusals import adapter_not_found_error
from services.runtime.errors import Reason, ServiceError, invalid_field

MAX_REQUEST_ID_CHARS = 256
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_PRIORITY = 100
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGITS_PROCESSORS = 8

# Nor is a repetition penalty used, but a model may have one by default.
_NOT_WITH_BEAMS = (
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "allowed_token_ids",
    "banned_token_ids",
    "logits_processors",
)
MAX_STOP_SEQUENCES = 1024
MAX_STOP_SEQUENCE_TOKENS = 1024
MAX_CONSTRAINT_BYTES = 256 * 1024


def sequence_requests(
    request: engine_pb2.EngineServiceGenerateRequest,
    facts: ModelFacts,
    next_sequence_id: Callable[[], int],
    adapters: Container[str] = (),
) -> list[SequenceRequest]:
    """One sequence per choice that `request` asks for. adapters: those that are loaded.

    Raises:
        ServiceError: INVALID_FIELD, PROMPT_TOO_LONG, ADAPTER_NOT_FOUND or CAPABILITY_MISSING.
    """
    check_request_id(request.request_id)
    _check_capabilities(request)
    if request.adapter and request.adapter not in adapters:
        raise adapter_not_found_error("the model has no adapter of this name")
    prompt = list(request.prompt.ids)
    if not prompt:
        raise invalid_field("prompt", "at least one token is needed")
    _check_token_ids("prompt.ids", prompt, facts)
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        raise invalid_field("priority", f"must lie in [-{MAX_PRIORITY}, {MAX_PRIORITY}]")
    sampling = _sampling(request, facts)
    # The prompt is scored once, by the choice that computes it for all.
    further = replace(sampling, prompt_logprobs=None)
    stopping = _stopping(request, facts)
    _check_length(len(prompt), stopping.max_tokens, facts)
    constraint = _constraint(request.constraint)
    received_ns = time.time_ns()
    return [
        SequenceRequest(
            sequence_id=next_sequence_id(),
            prompt_token_ids=prompt,
            sampling=further if index else sampling,
            stopping=stopping,
            choice_index=index,
            priority=request.priority,
            request_id=request.request_id,
            received_ns=received_ns,
            tenant=request.tenant,
            cache_salt=request.cache_salt,
            constraint=constraint,
            adapter=request.adapter,
        )
        for index in range(_choices(request.sampling))
    ]


def default_sampling(facts: ModelFacts) -> types_pb2.SamplingParams:
    """The model's own sampling defaults; fields it has none for are absent."""
    params = types_pb2.SamplingParams()
    for name, value in facts.default_sampling.items():
        setattr(params, name, int(value) if name == "top_k" else value)
    return params


def missing_capability(capability: str, description: str) -> ServiceError:
    """UNIMPLEMENTED, naming what this model or server cannot do."""
    return ServiceError(Reason.CAPABILITY_MISSING, description, metadata={"capability": capability})


def check_request_id(request_id: str) -> None:
    """Raise INVALID_FIELD for an id that is missing or too long."""
    if not request_id:
        raise invalid_field("request_id", "required")
    if len(request_id) > MAX_REQUEST_ID_CHARS:
        raise invalid_field("request_id", f"at most {MAX_REQUEST_ID_CHARS} characters")


def _check_capabilities(request: engine_pb2.EngineServiceGenerateRequest) -> None:
    sampling = request.sampling
    if sampling.HasField("best_of") and sampling.best_of != _choices(sampling):
        raise missing_capability("best_of", "this engine draws no more choices than it returns")


def _choices(sampling: types_pb2.SamplingParams) -> int:
    if not sampling.HasField("n"):
        return 1
    if not 1 <= sampling.n <= MAX_CHOICES:
        raise invalid_field("sampling.n", f"must lie in [1, {MAX_CHOICES}]")
    return sampling.n


def _sampling(request: engine_pb2.EngineServiceGenerateRequest, facts: ModelFacts) -> Sampling:
    params = request.sampling
    own = facts.default_sampling
    for token_id, bias in params.logit_bias.items():
        _check_range("sampling.logit_bias", bias, -100, 100)
        _check_token_ids("sampling.logit_bias", (token_id,), facts)
    _check_token_ids("sampling.allowed_token_ids", params.allowed_token_ids, facts)
    _check_token_ids("sampling.banned_token_ids", params.banned_token_ids, facts)
    banned = frozenset(params.banned_token_ids)
    if params.allowed_token_ids and banned.issuperset(params.allowed_token_ids):
        raise invalid_field("sampling.allowed_token_ids", "every one of them is banned")
    if len(banned) >= facts.vocab_size:
        raise invalid_field("sampling.banned_token_ids", "no token is left")
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(request, name) > MAX_LOGPROBS:
            raise invalid_field(name, f"must lie in [0, {MAX_LOGPROBS}]")
    return Sampling(
        temperature=_number(params, "temperature", own.get("temperature", 1.0), 0, 100),
        top_k=params.top_k if params.HasField("top_k") else int(own.get("top_k", 0)),
        top_p=_number(params, "top_p", own.get("top_p", 1.0), 0, 1, open_below=True),
        min_p=_number(params, "min_p", own.get("min_p", 0.0), 0, 1),
        seed=params.seed if params.HasField("seed") else secrets.randbits(64),
        repetition_penalty=_number(
            params,
            "repetition_penalty",
            own.get("repetition_penalty", 1.0),
            0,
            10,
            open_below=True,
        ),
        presence_penalty=_number(params, "presence_penalty", 0.0, -2, 2),
        frequency_penalty=_number(params, "frequency_penalty", 0.0, -2, 2),
        logit_bias=dict(params.logit_bias),
        allowed_token_ids=tuple(dict.fromkeys(params.allowed_token_ids)),
        banned_token_ids=tuple(banned),
        logprobs=request.logprobs if request.HasField("logprobs") else None,
        prompt_logprobs=request.prompt_logprobs if request.HasField("prompt_logprobs") else None,
        logits_processors=tuple(_logits_processors(params)),
        beam_width=_beam_width(request),
        length_penalty=_number(params, "length_penalty", 1.0, -10, 10),
        early_stopping=params.early_stopping,
    )


def _beam_width(request: engine_pb2.EngineServiceGenerateRequest) -> int:
    params = request.sampling
    if not params.HasField("beam_width"):
        for name in ("length_penalty", "early_stopping"):
            if getattr(params, name):
                raise invalid_field(f"sampling.{name}", "means something with beam_width only")
        return 0
    if not 1 <= params.beam_width <= MAX_CHOICES:
        raise invalid_field("sampling.beam_width", f"must lie in [1, {MAX_CHOICES}]")
    if _choices(params) > params.beam_width:
        raise invalid_field("sampling.n", "at most as many as beam_width")
    # Beams are ranked by the model's own log-probabilities.
    for name in _NOT_WITH_BEAMS:
        if getattr(params, name):
            raise invalid_field(f"sampling.{name}", "does not go together with beam_width")
    if request.HasField("prompt_logprobs"):
        raise invalid_field("prompt_logprobs", "does not go together with sampling.beam_width")
    if request.constraint.WhichOneof("constraint") is not None:
        raise invalid_field("constraint", "does not go together with sampling.beam_width")
    return params.beam_width


def _logits_processors(params: types_pb2.SamplingParams) -> Iterator[tuple[str, str]]:
    if len(params.logits_processors) > MAX_LOGITS_PROCESSORS:
        raise invalid_field("sampling.logits_processors", f"at most {MAX_LOGITS_PROCESSORS}")
    for index, processor in enumerate(params.logits_processors):
        path = f"sampling.logits_processors[{index}]"
        if processor.name not in processor_names():
            known = ", ".join(sorted(processor_names())) or "none"
            raise invalid_field(f"{path}.name", f"this engine has: {known}")
        try:
            arguments = json.dumps(json_format.MessageToDict(processor.arguments), sort_keys=True)
        except (ValueError, json_format.Error):
            raise invalid_field(f"{path}.arguments", "must be JSON") from None
        yield processor.name, arguments


def _stopping(request: engine_pb2.EngineServiceGenerateRequest, facts: ModelFacts) -> Stopping:
    criteria = request.stopping
    if criteria.stop_strings:
        raise invalid_field(
            "stopping.stop_strings", "the engine sees no text; send stop_sequences instead"
        )
    max_tokens = criteria.max_tokens if criteria.HasField("max_tokens") else None
    if max_tokens == 0:
        raise invalid_field("stopping.max_tokens", "must be at least 1")
    if max_tokens is not None and criteria.min_tokens > max_tokens:
        raise invalid_field("stopping.min_tokens", "must not exceed max_tokens")
    if len(criteria.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        raise invalid_field("stopping.stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS}")
    _check_token_ids("stopping.stop_token_ids", criteria.stop_token_ids, facts)
    if len(request.stop_sequences) > MAX_STOP_SEQUENCES:
        raise invalid_field("stop_sequences", f"at most {MAX_STOP_SEQUENCES}")
    for index, stop in enumerate(request.stop_sequences):
        path = f"stop_sequences[{index}].ids"
        if not 1 <= len(stop.ids) <= MAX_STOP_SEQUENCE_TOKENS:
            raise invalid_field(path, f"between 1 and {MAX_STOP_SEQUENCE_TOKENS} tokens")
        _check_token_ids(path, stop.ids, facts)
    return Stopping(
        max_tokens=max_tokens,
        min_tokens=criteria.min_tokens,
        ignore_eos=criteria.ignore_eos,
        stop_token_ids=tuple(criteria.stop_token_ids),
        stop_sequences=tuple(tuple(stop.ids) for stop in request.stop_sequences),
    )


def _constraint(given: types_pb2.OutputConstraint) -> Constraint | None:
    kind = given.WhichOneof("constraint")
    if kind is None:
        return None
    if given.ByteSize() > MAX_CONSTRAINT_BYTES:
        raise invalid_field(f"constraint.{kind}", f"at most {MAX_CONSTRAINT_BYTES} bytes")
    if kind == "choice":
        if not given.choice.values:
            raise invalid_field("constraint.choice.values", "at least one is needed")
        return Constraint(kind, json.dumps([*given.choice.values]))
    return Constraint(kind, getattr(given, kind))


def _check_length(prompt_tokens: int, max_tokens: int | None, facts: ModelFacts) -> None:
    limit = facts.max_context_tokens
    needed = prompt_tokens + (1 if max_tokens is None else max_tokens)
    if needed <= limit:
        return
    path = "prompt" if prompt_tokens >= limit else "stopping.max_tokens"
    raise ServiceError(
        Reason.PROMPT_TOO_LONG,
        f"{prompt_tokens} prompt tokens and {needed - prompt_tokens} completion tokens exceed the "
        f"context of {limit} tokens",
        field_violations=[(path, f"prompt and completion must not exceed {limit} tokens")],
        metadata={
            "context_tokens": str(limit),
            "prompt_tokens": str(prompt_tokens),
            "completion_tokens": str(needed - prompt_tokens),
        },
    )


def _number(
    params: types_pb2.SamplingParams,
    name: str,
    default: float,
    low: float,
    high: float,
    *,
    open_below: bool = False,
) -> float:
    if not params.HasField(name):  # type: ignore[arg-type]
        return default
    value = float(getattr(params, name))
    _check_range(f"sampling.{name}", value, low, high, open_below=open_below)
    return value


def _check_range(
    path: str, value: float, low: float, high: float, *, open_below: bool = False
) -> None:
    # A NaN fails every comparison, so it must be asked about first.
    if math.isnan(value) or not low <= value <= high or (open_below and value == low):
        bracket = "(" if open_below else "["
        raise invalid_field(path, f"must lie in {bracket}{low}, {high}]")


def _check_token_ids(path: str, token_ids: Iterable[int], facts: ModelFacts) -> None:
    largest = max(token_ids, default=0)
    if largest >= facts.vocab_size:
        raise invalid_field(path, f"token ids must lie in [0, {facts.vocab_size})")
