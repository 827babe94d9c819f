"""What a request may say, checked before anything is done for it."""

from __future__ import annotations

import math

from google.protobuf.message import Message

from meshserve.v1 import gateway_pb2, types_pb2
from services.runtime.errors import Reason, ServiceError

MAX_REQUEST_ID_CHARS = 128
MAX_STOP_STRINGS = 64
MAX_STOP_STRING_BYTES = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_CHOICES = 128
MAX_LOGPROBS = 20
MAX_PRIORITY = 100
MAX_MESSAGES = 10_000
MAX_TOOLS = 128
MAX_CONSTRAINT_BYTES = 256 * 1024

# field: (lowest, highest, whether the lowest itself is allowed)
_SAMPLING_RANGES: dict[str, tuple[float, float, bool]] = {
    "temperature": (0, 100, True),
    "top_p": (0, 1, False),
    "min_p": (0, 1, True),
    "repetition_penalty": (0, 10, False),
    "presence_penalty": (-2, 2, True),
    "frequency_penalty": (-2, 2, True),
    "n": (1, MAX_CHOICES, True),
    "best_of": (1, MAX_CHOICES, True),
    "beam_width": (1, MAX_CHOICES, True),
    "length_penalty": (-10, 10, True),
}

Violations = list[tuple[str, str]]


def validate(request: gateway_pb2.GenerateRequest, max_prompt_bytes: int) -> None:
    """Raises ServiceError with every field that is wrong."""
    violations: Violations = []
    violations += check_request_id(request.request_id)
    violations += _check_input(request)
    violations += _check_sampling(request.sampling)
    violations += _check_stopping(request.stopping)
    violations += _check_rest(request)
    raise_violations(violations)
    size = prompt_bytes(request)
    if size > max_prompt_bytes:
        field = str(request.WhichOneof("input"))
        raise ServiceError(
            Reason.PROMPT_TOO_LONG,
            f"the prompt has {size} bytes; at most {max_prompt_bytes} are taken",
            field_violations=[(field, f"at most {max_prompt_bytes} bytes")],
            metadata={"limit_bytes": str(max_prompt_bytes), "prompt_bytes": str(size)},
        )


def raise_violations(violations: Violations) -> None:
    """Raises ServiceError (INVALID_FIELD) if there is any violation."""
    if violations:
        path, description = violations[0]
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        raise ServiceError(
            Reason.INVALID_FIELD,
            f"{path}: {description}{more}",
            field_violations=violations,
        )


def check_conversation(conversation: types_pb2.Conversation) -> Violations:
    """What is wrong with a conversation."""
    messages = conversation.messages
    if not messages:
        return [("conversation.messages", "at least one message is needed")]
    violations: Violations = []
    if len(messages) > MAX_MESSAGES:
        violations.append(("conversation.messages", f"at most {MAX_MESSAGES} messages"))
    if len(conversation.tools) > MAX_TOOLS:
        violations.append(("conversation.tools", f"at most {MAX_TOOLS} tools"))
    known = set(types_pb2.Role.values()) - {types_pb2.ROLE_UNSPECIFIED}
    for position, message in enumerate(messages):
        if message.role not in known:
            violations.append(
                (f"conversation.messages[{position}].role", "must be a role that the contract has")
            )
    for position, tool in enumerate(conversation.tools):
        if not tool.name:
            violations.append((f"conversation.tools[{position}].name", "is needed"))
    return violations


def prompt_bytes(request: gateway_pb2.GenerateRequest | gateway_pb2.CountTokensRequest) -> int:
    """Size of the prompt in bytes, all messages and tools together."""
    kind = request.WhichOneof("input")
    if kind is None:
        return 0
    if kind == "text":
        return len(request.text.encode())
    part: Message = getattr(request, kind)
    return part.ByteSize()


def check_request_id(request_id: str) -> Violations:
    """What is wrong with the id that a caller chose."""
    if len(request_id) > MAX_REQUEST_ID_CHARS:
        return [("request_id", f"at most {MAX_REQUEST_ID_CHARS} characters")]
    if not all("!" <= character <= "~" for character in request_id):
        return [("request_id", "visible ASCII characters only")]
    return []


def _check_input(request: gateway_pb2.GenerateRequest) -> Violations:
    kind = request.WhichOneof("input")
    if kind is None:
        return [("input", "one of text, conversation and token_ids is needed")]
    if kind == "text" and not request.text:
        return [("text", "must not be empty")]
    if kind == "token_ids" and not request.token_ids.ids:
        return [("token_ids.ids", "must not be empty")]
    return check_conversation(request.conversation) if kind == "conversation" else []


def _check_sampling(sampling: types_pb2.SamplingParams) -> Violations:
    violations: Violations = []
    for name, (lowest, highest, inclusive) in _SAMPLING_RANGES.items():
        if not sampling.HasField(name):  # type: ignore[arg-type]
            continue
        value = getattr(sampling, name)
        fits = lowest <= value <= highest if inclusive else lowest < value <= highest
        if not fits:  # NaN never fits
            opening = "[" if inclusive else "("
            violations.append(
                (f"sampling.{name}", f"must lie in {opening}{lowest}, {highest}], not {value:g}")
            )
    for token_id, bias in sampling.logit_bias.items():
        if not (math.isfinite(bias) and -100 <= bias <= 100):
            violations.append((f"sampling.logit_bias[{token_id}]", "must lie in [-100, 100]"))
    if sampling.HasField("best_of") and sampling.best_of < max(1, sampling.n):
        violations.append(("sampling.best_of", "must not be less than n"))
    if sampling.HasField("beam_width"):
        violations += [
            (f"sampling.{name}", "does not go together with beam_width")
            for name in ("best_of", "repetition_penalty")
            if sampling.HasField(name)
        ]
    return violations


def _check_stopping(stopping: types_pb2.StoppingCriteria) -> Violations:
    violations: Violations = []
    if stopping.HasField("max_tokens") and stopping.max_tokens == 0:
        violations.append(("stopping.max_tokens", "must be at least 1"))
    if stopping.HasField("max_tokens") and stopping.min_tokens > stopping.max_tokens:
        violations.append(("stopping.min_tokens", "must not be more than max_tokens"))
    if len(stopping.stop_token_ids) > MAX_STOP_TOKEN_IDS:
        violations.append(("stopping.stop_token_ids", f"at most {MAX_STOP_TOKEN_IDS} ids"))
    if len(stopping.stop_strings) > MAX_STOP_STRINGS:
        violations.append(("stopping.stop_strings", f"at most {MAX_STOP_STRINGS} strings"))
        return violations
    for position, stop in enumerate(stopping.stop_strings):
        if not stop:
            violations.append((f"stopping.stop_strings[{position}]", "must not be empty"))
        elif len(stop.encode()) > MAX_STOP_STRING_BYTES:
            violations.append(
                (f"stopping.stop_strings[{position}]", f"at most {MAX_STOP_STRING_BYTES} bytes")
            )
    return violations


def _check_rest(request: gateway_pb2.GenerateRequest) -> Violations:
    violations: Violations = []
    if not -MAX_PRIORITY <= request.priority <= MAX_PRIORITY:
        violations.append(("priority", f"must lie in [-{MAX_PRIORITY}, {MAX_PRIORITY}]"))
    for name in ("logprobs", "prompt_logprobs"):
        if getattr(request.output, name) > MAX_LOGPROBS:
            violations.append((f"output.{name}", f"at most {MAX_LOGPROBS}"))
    if request.output.echo and request.WhichOneof("input") != "text":
        violations.append(("output.echo", "only a text can be repeated"))
    if request.truncation not in types_pb2.TruncationPolicy.values():
        violations.append(("truncation", "must be a policy that the contract has"))
    kind = request.constraint.WhichOneof("constraint")
    if kind == "choice" and not request.constraint.choice.values:
        violations.append(("constraint.choice.values", "at least one is needed"))
    if request.constraint.ByteSize() > MAX_CONSTRAINT_BYTES:
        violations.append(("constraint", f"at most {MAX_CONSTRAINT_BYTES} bytes"))
    control = request.cache_control
    if control.HasField("ttl_s") and control.ttl_s == 0:
        violations.append(("cache_control.ttl_s", "must be at least 1"))
    return violations
