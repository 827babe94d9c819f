"""The RPCs of the safety filter: checks what comes in, works off the event loop, answers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import grpc

from meshserve.v1 import safety_pb2, safety_pb2_grpc, types_pb2
from services.runtime.errors import Reason, ServiceError, invalid_field
from services.runtime.multiplex import SessionHost
from services.runtime.settings import SafetySettings
from services.runtime.telemetry import Metrics
from services.safety.completion_session import CompletionSession
from services.safety.messages import action_to_proto, verdict_to_proto
from services.safety.policies_in_force import PoliciesInForce
from services.safety.records import Records
from services.safety.session import PromptCheck, check_texts
from services.safety.verdict import Action

# Shorter prompts take less time than the way to a thread and back.
INLINE_BYTES = 2048
# Longer ones have a thread of their own, so that short ones never wait for them all.
LARGE_PROMPT_BYTES = 1 << 18


class SafetyServicer(safety_pb2_grpc.SafetyServiceServicer):
    """Answers by the policies that it is given."""

    def __init__(
        self,
        settings: SafetySettings,
        policies: PoliciesInForce,
        metrics: Metrics,
        draining: asyncio.Event,
    ) -> None:
        self._settings = settings
        self._policies = policies
        self._records = Records(metrics)
        self._draining = draining
        self._short = ThreadPoolExecutor(settings.workers, thread_name_prefix="check")
        self._long = ThreadPoolExecutor(1, thread_name_prefix="check-long")

    def close(self) -> None:
        """Ends the threads."""
        self._short.shutdown(wait=False, cancel_futures=True)
        self._long.shutdown(wait=False, cancel_futures=True)

    async def CheckPrompt(  # noqa: N802
        self,
        request: safety_pb2.CheckPromptRequest,
        context: grpc.aio.ServicerContext[
            safety_pb2.CheckPromptRequest, safety_pb2.CheckPromptResponse
        ],
    ) -> safety_pb2.CheckPromptResponse:
        """A verdict on the texts of a prompt."""
        policy = self._policies.find(request.policy)
        if not request.texts:
            raise invalid_field("texts", "at least one text is needed")
        for index, text in enumerate(request.texts):
            check_size(text, f"texts[{index}]", self._settings.max_text_bytes)
        size_bytes = request.ByteSize()
        checked = (
            check_texts(policy.prompts, request.texts)
            if size_bytes <= INLINE_BYTES
            else await self._check_in_thread(partial(check_texts, policy.prompts), request.texts)
        )
        verdict = checked.verdict
        self._records.checked("prompt", verdict.action)
        self._records.found("prompt", verdict.findings, tenant=request.tenant)
        return safety_pb2.CheckPromptResponse(
            verdict=verdict_to_proto(verdict, policy.revision),
            redacted_texts=checked.texts if verdict.action is Action.REDACT else (),
        )

    async def CheckCompletion(  # noqa: N802
        self,
        request_iterator: AsyncIterator[safety_pb2.CheckCompletionRequest],
        context: grpc.aio.ServicerContext[
            safety_pb2.CheckCompletionRequest, safety_pb2.CheckCompletionResponse
        ],
    ) -> AsyncIterator[safety_pb2.CheckCompletionResponse]:
        """Text of many completions, released as it is decided."""
        host: SessionHost[
            safety_pb2.CheckCompletionRequest,
            safety_pb2.CompletionInput,
            safety_pb2.CompletionOutput,
        ] = SessionHost(
            inputs_of=lambda request: request.inputs,
            open_session=self._open_session,
            failed=_failed_output,
            draining=self._draining,
        )
        async for outputs in host.serve(request_iterator):
            yield safety_pb2.CheckCompletionResponse(outputs=outputs)

    async def GetPolicy(  # noqa: N802
        self,
        request: safety_pb2.GetPolicyRequest,
        context: grpc.aio.ServicerContext[
            safety_pb2.GetPolicyRequest, safety_pb2.GetPolicyResponse
        ],
    ) -> safety_pb2.GetPolicyResponse:
        """What a policy is."""
        found = self._policies.find(request.policy)
        return safety_pb2.GetPolicyResponse(
            policy=found.policy.name,
            revision=found.revision,
            categories=[
                safety_pb2.PolicyCategory(
                    name=name,
                    prompt_action=action_to_proto(category.prompt),
                    completion_action=action_to_proto(category.completion),
                    threshold=category.threshold,
                )
                for name, category in sorted(found.policy.categories.items())
            ],
        )

    def _open_session(self, opening: safety_pb2.CompletionInput) -> CompletionSession:
        policy = self._policies.find(opening.open.policy)
        limit = self._settings.max_text_bytes
        check_size(opening.open.released_text, "inputs.open.released_text", limit)
        return CompletionSession(opening, policy, self._records)

    async def _check_in_thread(
        self, check: partial[PromptCheck], texts: Sequence[str]
    ) -> PromptCheck:
        abandoned = threading.Event()
        size = sum(map(len, texts))
        executor = self._long if size > LARGE_PROMPT_BYTES else self._short
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(executor, check, list(texts), abandoned.is_set)
        finally:
            # A caller that goes away must not leave its work behind.
            abandoned.set()


def check_size(text: str, path: str, limit: int) -> None:
    """Raises ServiceError PROMPT_TOO_LONG for a text of more than `limit` bytes of UTF-8."""
    size_bytes = len(text) if text.isascii() else len(text.encode())
    if size_bytes > limit:
        problem = f"has {size_bytes} bytes, more than the {limit} that are taken"
        raise ServiceError(
            Reason.PROMPT_TOO_LONG,
            f"{path} {problem}",
            field_violations=[(path, problem)],
            metadata={"limit_bytes": str(limit), "size_bytes": str(size_bytes)},
        )


def _failed_output(session_id: int, status: types_pb2.SessionStatus) -> safety_pb2.CompletionOutput:
    return safety_pb2.CompletionOutput(session_id=session_id, finished=True, error=status)
