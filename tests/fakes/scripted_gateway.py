"""A gateway that plays what a test writes, over real gRPC and the real contract."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import grpc

from meshserve.v1 import admin_pb2_grpc, gateway_pb2, gateway_pb2_grpc


class ScriptedGateway(gateway_pb2_grpc.InferenceServiceServicer):
    """Answers each RPC with the handler that a test sets under the RPC's name, `admin.` before
    those of AdminService.

    `requests` and `metadata` hold what came in, in order; `cancelled` is set once a call ended
    before its handler did.
    """

    def __init__(self) -> None:
        self.handlers: dict[str, Callable[[Any, grpc.ServicerContext], Any]] = {}
        self.requests: list[Any] = []
        self.metadata: list[dict[str, Any]] = []
        self.time_remaining: list[float | None] = []
        self.cancelled = threading.Event()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(max_workers=4),
            options=[("grpc.max_receive_message_length", 64 * 2**20)],
        )
        gateway_pb2_grpc.add_InferenceServiceServicer_to_server(self, self._server)
        admin_pb2_grpc.add_AdminServiceServicer_to_server(_Admin(self), self._server)
        self.target = f"127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def on(self, name: str, handler: Callable[[Any, grpc.ServicerContext], Any]) -> None:
        self.handlers[name] = handler

    def answer(self, name: str, response: Any) -> None:
        self.handlers[name] = lambda request, context: response

    def stop(self) -> None:
        self._server.stop(0).wait()

    def _play(self, name: str, request: Any, context: grpc.ServicerContext) -> Any:
        self.requests.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        self.time_remaining.append(context.time_remaining())
        if name not in self.handlers:
            context.abort(grpc.StatusCode.UNIMPLEMENTED, f"no handler for {name}")
        return self.handlers[name](request, context)

    def _stream(self, name: str, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        context.add_callback(self.cancelled.set)
        yield from self._play(name, request, context)

    def Generate(self, request: Any, context: Any) -> Any:
        return self._play("Generate", request, context)

    def Chat(self, request: Any, context: Any) -> Any:
        return self._play("Chat", request, context)

    def CountTokens(self, request: Any, context: Any) -> Any:
        return self._play("CountTokens", request, context)

    def Embed(self, request: Any, context: Any) -> Any:
        return self._play("Embed", request, context)

    def Classify(self, request: Any, context: Any) -> Any:
        return self._play("Classify", request, context)

    def Score(self, request: Any, context: Any) -> Any:
        return self._play("Score", request, context)

    def ListModels(self, request: Any, context: Any) -> Any:
        return self._play("ListModels", request, context)

    def GetModel(self, request: Any, context: Any) -> Any:
        return self._play("GetModel", request, context)

    def StreamGenerate(self, request: Any, context: Any) -> Any:
        return self._stream("StreamGenerate", request, context)

    def StreamChat(self, request: Any, context: Any) -> Any:
        return self._stream("StreamChat", request, context)


class _Admin(admin_pb2_grpc.AdminServiceServicer):
    def __init__(self, gateway: ScriptedGateway) -> None:
        for method in vars(admin_pb2_grpc.AdminServiceServicer):
            if method[0].isupper():
                play = functools.partial(gateway._play, f"admin.{method}")
                setattr(self, method, play)


def capital_of_france() -> list[gateway_pb2.StreamGenerateResponse]:
    """The messages of a stream whose text is "Paris."."""
    response = gateway_pb2.StreamGenerateResponse
    return [
        response(request_id="r1", started={"model": "smollm2-135m", "prompt_tokens": 7}),
        response(
            request_id="r1", chunk={"deltas": [{"index": 0, "text": "Par", "token_ids": [5]}]}
        ),
        response(
            request_id="r1", chunk={"deltas": [{"index": 0, "text": "is.", "token_ids": [9]}]}
        ),
        response(
            request_id="r1",
            complete={
                "index": 0,
                "finish_reason": "FINISH_REASON_STOP",
                "matched_stop": {"text": "\n"},
                "usage": {"prompt_tokens": 7, "completion_tokens": 3, "cached_prompt_tokens": 4},
            },
        ),
    ]
