"""What a request to an encoder may say, checked before anything is done for it."""

from __future__ import annotations

from meshserve.v1 import gateway_pb2, types_pb2
from services.gateway.validation import Violations, check_request_id, raise_violations
from services.runtime.errors import Reason, ServiceError

MAX_INPUTS = 16384


def validate_encoding(
    request: gateway_pb2.EmbedRequest | gateway_pb2.ClassifyRequest | gateway_pb2.ScoreRequest,
    texts_field: str,
    max_prompt_bytes: int,
) -> None:
    """Raises ServiceError with every field that is wrong."""
    texts = getattr(request, texts_field)
    violations: Violations = check_request_id(request.request_id)
    if not 1 <= len(texts) <= MAX_INPUTS:
        violations.append((texts_field, f"between 1 and {MAX_INPUTS} of them, not {len(texts)}"))
    violations += [
        (f"{texts_field}[{index}]", "must not be empty")
        for index, text in enumerate(texts)
        if not text
    ]
    if request.truncation not in types_pb2.TruncationPolicy.values():
        violations.append(("truncation", "must be a policy that the contract has"))
    if isinstance(request, gateway_pb2.ScoreRequest) and not request.query:
        violations.append(("query", "must not be empty"))
    if isinstance(request, gateway_pb2.EmbedRequest):
        violations += _check_embedding(request)
    raise_violations(violations)
    # The whole message is at least as large as its texts, and known without encoding them again.
    size = request.ByteSize()
    if size > max_prompt_bytes:
        raise ServiceError(
            Reason.PROMPT_TOO_LONG,
            f"the texts have {size} bytes; at most {max_prompt_bytes} are taken in one request",
            field_violations=[(texts_field, f"at most {max_prompt_bytes} bytes together")],
            metadata={"limit_bytes": str(max_prompt_bytes), "prompt_bytes": str(size)},
        )


def _check_embedding(request: gateway_pb2.EmbedRequest) -> Violations:
    violations: Violations = []
    if request.pooling not in types_pb2.Pooling.values():
        violations.append(("pooling", "must be a way of pooling that the contract has"))
    if request.HasField("dimensions") and request.dimensions == 0:
        violations.append(("dimensions", "must be at least 1"))
    control = request.cache_control
    if control.HasField("ttl_s") and control.ttl_s == 0:
        violations.append(("cache_control.ttl_s", "must be at least 1"))
    return violations
