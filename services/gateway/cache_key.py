"""What decides an answer, in canonical bytes."""

from __future__ import annotations

from meshserve.v1 import cache_pb2, gateway_pb2, types_pb2

# Raised when the meaning of the bytes changes, so that old answers are not found any more.
KEY_VERSION = 1


def is_deterministic(request: gateway_pb2.GenerateRequest) -> bool:
    """Whether equal requests have equal answers: greedy choice, or a seed.

    What a plugin does is nobody's word but its own.
    """
    sampling = request.sampling
    if sampling.logits_processors:
        return False
    if sampling.HasField("seed"):
        return True
    if sampling.HasField("top_k") and sampling.top_k == 1:
        return True
    return sampling.HasField("temperature") and sampling.temperature == 0


def cache_key(
    request: gateway_pb2.GenerateRequest,
    *,
    tenant: str,
    model_revision: str,
    policy_revision: str,
) -> cache_pb2.CacheKey:
    """The key of a request whose defaults have been filled in.

    Tenants never share answers: the time that an answer takes would tell what others asked.
    """
    deciding = gateway_pb2.GenerateRequest()
    deciding.CopyFrom(request)
    for field in ("model", "request_id", "priority", "cache_control"):
        deciding.ClearField(field)
    if _is_greedy(deciding.sampling):
        _forget_sampling(deciding.sampling)
    # Lists whose order does not matter.
    for ids in (
        deciding.stopping.stop_token_ids,
        deciding.sampling.allowed_token_ids,
        deciding.sampling.banned_token_ids,
    ):
        ids.sort()
    canonical = b"\0".join(
        [
            str(KEY_VERSION).encode(),
            model_revision.encode(),
            policy_revision.encode(),
            deciding.SerializeToString(deterministic=True),
        ]
    )
    return cache_pb2.CacheKey(scope=tenant, model=request.model, request=canonical)


def _is_greedy(sampling: types_pb2.SamplingParams) -> bool:
    return sampling.HasField("temperature") and sampling.temperature == 0


def _forget_sampling(sampling: types_pb2.SamplingParams) -> None:
    """Greedy choice does not depend on what only shapes a draw."""
    for field in ("seed", "top_p", "top_k", "min_p"):
        sampling.ClearField(field)
