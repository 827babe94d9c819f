"""The one table of error reasons: each with its gRPC code, its meaning and the way out.

docs/errors.md is generated from it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import grpc


class Reason(StrEnum):
    """Stable names of what went wrong; never renamed, never reused."""

    INVALID_FIELD = "INVALID_FIELD"
    MALFORMED_MESSAGE = "MALFORMED_MESSAGE"
    MESSAGE_TOO_LARGE = "MESSAGE_TOO_LARGE"
    PROMPT_TOO_LONG = "PROMPT_TOO_LONG"
    TEMPLATE_ERROR = "TEMPLATE_ERROR"
    PROMPT_BLOCKED = "PROMPT_BLOCKED"
    API_KEY_MISSING = "API_KEY_MISSING"
    API_KEY_INVALID = "API_KEY_INVALID"
    ORIGIN_NOT_ALLOWED = "ORIGIN_NOT_ALLOWED"
    MODEL_NOT_ALLOWED = "MODEL_NOT_ALLOWED"
    NOT_AN_OPERATOR = "NOT_AN_OPERATOR"
    MODEL_NOT_FOUND = "MODEL_NOT_FOUND"
    MODEL_NOT_LOADED = "MODEL_NOT_LOADED"
    MODEL_BUSY = "MODEL_BUSY"
    MODEL_LOADING = "MODEL_LOADING"
    ADAPTER_NOT_FOUND = "ADAPTER_NOT_FOUND"
    ADAPTER_NAME_TAKEN = "ADAPTER_NAME_TAKEN"
    ADAPTER_LIMIT_REACHED = "ADAPTER_LIMIT_REACHED"
    POLICY_NOT_FOUND = "POLICY_NOT_FOUND"
    PATH_NOT_FOUND = "PATH_NOT_FOUND"
    METHOD_NOT_ALLOWED = "METHOD_NOT_ALLOWED"
    REQUEST_ID_IN_USE = "REQUEST_ID_IN_USE"
    CAPABILITY_MISSING = "CAPABILITY_MISSING"
    RATE_LIMITED = "RATE_LIMITED"
    QUEUE_FULL = "QUEUE_FULL"
    LIMIT_REACHED = "LIMIT_REACHED"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    CANCELLED = "CANCELLED"
    ABORTED = "ABORTED"
    DRAINING = "DRAINING"
    SERVICE_UNAVAILABLE = "SERVICE_UNAVAILABLE"
    ENGINE_RESTARTED = "ENGINE_RESTARTED"
    CACHE_BACKEND_UNAVAILABLE = "CACHE_BACKEND_UNAVAILABLE"
    LIMITS_UNAVAILABLE = "LIMITS_UNAVAILABLE"
    HOSTING_UNAVAILABLE = "HOSTING_UNAVAILABLE"
    SEQUENCE_FAILED = "SEQUENCE_FAILED"
    INTERNAL = "INTERNAL"


@dataclass(frozen=True, slots=True)
class ReasonEntry:
    """What a reason means: its gRPC code, for users, and the details beside ErrorInfo."""

    code: grpc.StatusCode
    meaning: str
    remedy: str
    details: tuple[str, ...] = ()


_C = grpc.StatusCode
REASONS: Mapping[Reason, ReasonEntry] = {
    Reason.INVALID_FIELD: ReasonEntry(
        _C.INVALID_ARGUMENT,
        "A field of the request has a value that it may not have.",
        "Mend the fields that BadRequest names.",
        ("BadRequest",),
    ),
    Reason.MALFORMED_MESSAGE: ReasonEntry(
        _C.INVALID_ARGUMENT,
        "The bytes are not a message of the expected type, for example text that is not UTF-8.",
        "Send the message that the contract declares.",
    ),
    Reason.MESSAGE_TOO_LARGE: ReasonEntry(
        _C.RESOURCE_EXHAUSTED,
        "A message is larger than a service takes.",
        "Send less in one message.",
    ),
    Reason.PROMPT_TOO_LONG: ReasonEntry(
        _C.INVALID_ARGUMENT,
        "Prompt and completion together do not fit the model's context, or the prompt is larger "
        "than the service takes.",
        "Shorten the prompt or lower `max_tokens`; metadata tells the limit and the size.",
        ("BadRequest",),
    ),
    Reason.TEMPLATE_ERROR: ReasonEntry(
        _C.INVALID_ARGUMENT,
        "The chat template refused the conversation or failed on it.",
        "Mend the conversation as the template's own message says.",
        ("BadRequest",),
    ),
    Reason.PROMPT_BLOCKED: ReasonEntry(
        _C.INVALID_ARGUMENT,
        "The safety filter blocked the prompt.",
        "Metadata names the categories, and the fields say which texts; their text is never "
        "repeated.",
        ("BadRequest",),
    ),
    Reason.API_KEY_MISSING: ReasonEntry(
        _C.UNAUTHENTICATED,
        "The server asks for an API key and got none.",
        "Send `authorization: Bearer KEY`.",
    ),
    Reason.API_KEY_INVALID: ReasonEntry(
        _C.UNAUTHENTICATED,
        "The API key is not known.",
        "Check the key with who gave it to you.",
    ),
    Reason.ORIGIN_NOT_ALLOWED: ReasonEntry(
        _C.PERMISSION_DENIED,
        "A web page of another site made the call, or it names a host that is not the gateway's.",
        "Open the console under the gateway's own address; under another name, ask for API keys "
        "(`gateway.auth.mode: required`).",
    ),
    Reason.MODEL_NOT_ALLOWED: ReasonEntry(
        _C.PERMISSION_DENIED,
        "The API key may not use this model.",
        "Ask for access, or use a model from `ListModels`.",
    ),
    Reason.NOT_AN_OPERATOR: ReasonEntry(
        _C.PERMISSION_DENIED,
        "Only operators may see what the whole mesh does, and change what it has loaded.",
        "Use a key with `operator: true` in `gateway.auth.keys`.",
    ),
    Reason.MODEL_NOT_FOUND: ReasonEntry(
        _C.NOT_FOUND,
        "No model has this name.",
        "Use a name from `ListModels`; metadata suggests the nearest.",
    ),
    Reason.ADAPTER_NOT_FOUND: ReasonEntry(
        _C.NOT_FOUND,
        "The model has no adapter of this name.",
        "Use an adapter that `GetModel` lists, or have an operator load it; metadata suggests the "
        "nearest.",
    ),
    Reason.ADAPTER_NAME_TAKEN: ReasonEntry(
        _C.ALREADY_EXISTS,
        "The name of the adapter belongs to a model, to another model's adapter, to one that the "
        "settings declare, or to one that was loaded from elsewhere.",
        "Choose another name; metadata names the model that has it.",
    ),
    Reason.ADAPTER_LIMIT_REACHED: ReasonEntry(
        _C.RESOURCE_EXHAUSTED,
        "The engine has as many adapters as it may, or the adapter is larger than it takes.",
        "Unload another one, or raise the setting that metadata names.",
        ("BadRequest",),
    ),
    Reason.MODEL_NOT_LOADED: ReasonEntry(
        _C.FAILED_PRECONDITION,
        "No engine has the model in memory, and none is about to: it was unloaded, it is not "
        "loaded at the start, or it could not be loaded.",
        "Have an operator load it (`meshserve models load`); metadata tells its state.",
    ),
    Reason.MODEL_LOADING: ReasonEntry(
        _C.UNAVAILABLE,
        "The model, or the adapter asked for, is being loaded.",
        "Send the request again after the time in RetryInfo.",
        ("RetryInfo",),
    ),
    Reason.MODEL_BUSY: ReasonEntry(
        _C.FAILED_PRECONDITION,
        "A model that works on requests cannot be put to sleep.",
        "Try again once they have ended, or unload the model, which ends them.",
    ),
    Reason.POLICY_NOT_FOUND: ReasonEntry(
        _C.NOT_FOUND,
        "No safety policy has this name.",
        "Use a policy that the safety service was given.",
    ),
    Reason.PATH_NOT_FOUND: ReasonEntry(
        _C.NOT_FOUND,
        "The HTTP listener serves nothing under this path.",
        "Check the path; docs/console.md lists them.",
    ),
    Reason.METHOD_NOT_ALLOWED: ReasonEntry(
        _C.UNIMPLEMENTED,
        "The path takes another HTTP method.",
        "Use a method that metadata names.",
    ),
    Reason.REQUEST_ID_IN_USE: ReasonEntry(
        _C.ALREADY_EXISTS,
        "A request with this id is in flight.",
        "Choose another `request_id`, or leave it to the server.",
    ),
    Reason.CAPABILITY_MISSING: ReasonEntry(
        _C.UNIMPLEMENTED,
        "The model or this server cannot do what is asked.",
        "Metadata names the capability; `GetModel` lists what a model can do.",
    ),
    Reason.RATE_LIMITED: ReasonEntry(
        _C.RESOURCE_EXHAUSTED,
        "The caller sent more requests than its limit allows.",
        "Wait as long as RetryInfo says.",
        ("QuotaFailure", "RetryInfo"),
    ),
    Reason.QUEUE_FULL: ReasonEntry(
        _C.RESOURCE_EXHAUSTED,
        "The engine's queue is full.",
        "Wait as long as RetryInfo says, or add engine replicas.",
        ("RetryInfo",),
    ),
    Reason.LIMIT_REACHED: ReasonEntry(
        _C.RESOURCE_EXHAUSTED,
        "As many HTTP connections are open, or as many watch, as the gateway takes.",
        "Close what is not needed and try again, or raise the setting that metadata names.",
        ("RetryInfo",),
    ),
    Reason.DEADLINE_EXCEEDED: ReasonEntry(
        _C.DEADLINE_EXCEEDED,
        "The caller's deadline passed before the answer was complete.",
        "Allow more time or ask for less.",
    ),
    Reason.CANCELLED: ReasonEntry(
        _C.CANCELLED,
        "The caller went away.",
        "Nothing to do.",
    ),
    Reason.ABORTED: ReasonEntry(
        _C.ABORTED,
        "The request was aborted by another call.",
        "Send it again if its answer is still wanted.",
    ),
    Reason.DRAINING: ReasonEntry(
        _C.UNAVAILABLE,
        "The replica is shutting down and takes nothing new.",
        "Send the request again; another replica will take it.",
        ("RetryInfo",),
    ),
    Reason.SERVICE_UNAVAILABLE: ReasonEntry(
        _C.UNAVAILABLE,
        "A service that the request needs cannot be reached.",
        "Send the request again after the time in RetryInfo; metadata names the service.",
        ("RetryInfo",),
    ),
    Reason.ENGINE_RESTARTED: ReasonEntry(
        _C.UNAVAILABLE,
        "The engine's core ended, or hung and was ended, while it worked on the request; it is "
        "being restarted.",
        "Send the request again after the time in RetryInfo.",
        ("RetryInfo",),
    ),
    Reason.CACHE_BACKEND_UNAVAILABLE: ReasonEntry(
        _C.UNAVAILABLE,
        "The cache service cannot reach its Redis-protocol server.",
        "The gateway goes on without the cache; check `valkey.url`.",
        ("RetryInfo",),
    ),
    Reason.LIMITS_UNAVAILABLE: ReasonEntry(
        _C.UNAVAILABLE,
        "The gateway cannot reach the Redis-protocol server that holds the limits, and is set to "
        "refuse without them.",
        "Check `valkey.url`, or set `gateway.rate_limit.when_unavailable: allow`.",
        ("RetryInfo",),
    ),
    Reason.HOSTING_UNAVAILABLE: ReasonEntry(
        _C.UNAVAILABLE,
        "The gateway cannot reach the Redis-protocol server that holds what operators have asked "
        "to be loaded. What is loaded stays.",
        "Check `valkey.url`, and send the call again after the time in RetryInfo.",
        ("RetryInfo",),
    ),
    Reason.SEQUENCE_FAILED: ReasonEntry(
        _C.INTERNAL,
        "The model's computation failed for this request alone, for example with NaN logits.",
        "Send it again; if it fails again, report it with its request id.",
    ),
    Reason.INTERNAL: ReasonEntry(
        _C.INTERNAL,
        "A defect in the server.",
        "Report it with its request id; the log has the rest under the same trace id.",
    ),
}
