"""A whole gateway in this process, between a scripted engine, a tokenizer of words and bytes, and
the real safety filter: requests go over real gRPC, and what the engine says is up to the test."""

from __future__ import annotations

import asyncio
import codecs
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Self

import grpc

from meshserve.v1 import (
    cache_pb2,
    cache_pb2_grpc,
    engine_pb2,
    engine_pb2_grpc,
    gateway_pb2,
    gateway_pb2_grpc,
    tokenizer_pb2,
    tokenizer_pb2_grpc,
    types_pb2,
)
from services.gateway.service import GatewayService
from services.runtime.errors import Reason, ServiceError, to_session_status
from services.runtime.health import HealthMonitor
from services.runtime.monitor import Monitor
from services.runtime.multiplex import SessionHost
from services.runtime.server_calls import CallInterceptor
from services.runtime.settings import Settings
from services.runtime.telemetry import Metrics
from services.runtime.tls import ServerCertificates
from services.safety.service import SafetyService
from tests.support.waiting import until

WORDS = ("STOP", "one", "two", " three", "END", "4111 1111", " 1111 1111", "bad", "ger")
POLICY = """
categories:
  blocked: {prompt: block, completion: block, terms: [stop here]}
  hidden: {prompt: redact, completion: redact, detectors: [credit_card], terms: [badger]}
"""
MODEL = "scripted"

EngineRequest = engine_pb2.EngineServiceGenerateRequest
EngineResponse = engine_pb2.EngineServiceGenerateResponse
Script = Callable[[EngineRequest], AsyncIterator[EngineResponse]]


def encode(text: str) -> list[int]:
    """Ids of a text: 256 and above are WORDS, below are bytes."""
    ids: list[int] = []
    while text:
        for number, word in enumerate(WORDS):
            if text.startswith(word):
                ids.append(256 + number)
                text = text[len(word) :]
                break
        else:
            ids += text[0].encode()
            text = text[1:]
    return ids


def token_bytes(token_id: int) -> bytes:
    return WORDS[token_id - 256].encode() if token_id >= 256 else bytes([token_id])


def chunk(*deltas: tuple[int, Iterable[int]], logprobs: bool = False) -> EngineResponse:
    """Tokens that were added to choices; the log-probability of a token is minus its id."""
    message = EngineResponse()
    for index, token_ids in deltas:
        delta = message.chunk.deltas.add(index=index, token_ids=token_ids)
        if logprobs:
            delta.logprobs.positions.extend(
                types_pb2.PositionLogprobs(
                    chosen=types_pb2.TokenLogprob(token_id=each, logprob=-each)
                )
                for each in delta.token_ids
            )
    return message


def complete(
    index: int = 0,
    reason: types_pb2.FinishReason.ValueType = types_pb2.FINISH_REASON_LENGTH,
    **fields: Any,
) -> EngineResponse:
    return EngineResponse(
        complete=engine_pb2.TokenComplete(index=index, finish_reason=reason, **fields)
    )


def says(*texts: str) -> Script:
    """An engine that says the same to everyone: each text is one message to all choices."""

    async def script(request: EngineRequest) -> AsyncIterator[EngineResponse]:
        choices = request.sampling.n or 1
        for text in texts:
            yield chunk(
                *((index, encode(text)) for index in range(choices)),
                logprobs=request.HasField("logprobs"),
            )
        for index in range(choices):
            yield complete(index)

    return script


class _DecodeSession:
    def __init__(self, opening: tokenizer_pb2.DecodeInput) -> None:
        self.finished = False
        self._id = opening.session_id
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._tokens = 0
        self._take(opening.open.decoded_token_ids, False)

    def feed(self, message: tokenizer_pb2.DecodeInput) -> tokenizer_pb2.DecodeOutput | None:
        if not message.token_ids and not message.finish:
            return None
        self.finished = message.finish
        return tokenizer_pb2.DecodeOutput(
            session_id=self._id,
            text=self._take(message.token_ids, message.finish),
            decoded_tokens=self._tokens,
            finished=self.finished,
        )

    def close(self, error: Exception | None) -> None: ...

    def _take(self, token_ids: Iterable[int], final: bool) -> str:
        ids = list(token_ids)
        self._tokens += len(ids)
        return self._decoder.decode(b"".join(map(token_bytes, ids)), final)


class Tokenizer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Knows WORDS and bytes. What is encoded waits until `may_encode` is set, as it is at first."""

    def __init__(self) -> None:
        self.encoded: list[str] = []
        self.exchanges = 0
        self.may_encode = asyncio.Event()
        self.may_encode.set()

    async def Encode(self, request: Any, context: Any) -> Any:
        self.encoded += request.texts
        await self.may_encode.wait()
        return tokenizer_pb2.EncodeResponse(
            encoded=[tokenizer_pb2.EncodedText(token_ids=encode(text)) for text in request.texts]
        )

    async def EncodeInputs(self, request: Any, context: Any) -> Any:
        self.encoded += request.texts
        await self.may_encode.wait()
        inputs = [engine_pb2.EncoderInput(token_ids=encode(text)) for text in request.texts]
        return tokenizer_pb2.EncodeInputsResponse(inputs=inputs)

    async def Decode(self, request: Any, context: Any) -> Any:
        texts = [
            b"".join(map(token_bytes, each.ids)).decode(errors="replace")
            for each in request.sequences
        ]
        return tokenizer_pb2.DecodeResponse(texts=texts)

    async def ApplyChatTemplate(self, request: Any, context: Any) -> Any:
        text = "".join(message.content + "\n" for message in request.conversation.messages)
        text += str(request.conversation.tools or "")
        self.encoded.append(text)
        await self.may_encode.wait()
        return tokenizer_pb2.ApplyChatTemplateResponse(token_ids=encode(text))

    async def StreamDecode(self, requests: Any, context: Any) -> AsyncIterator[Any]:
        host: SessionHost[Any, Any, Any] = SessionHost(
            inputs_of=lambda request: request.inputs,
            open_session=_DecodeSession,
            failed=lambda session_id, status: tokenizer_pb2.DecodeOutput(
                session_id=session_id, finished=True, error=status
            ),
            draining=asyncio.Event(),
        )
        async for outputs in host.serve(requests):
            self.exchanges += len(outputs)
            yield tokenizer_pb2.StreamDecodeResponse(outputs=outputs)

    async def GetTokenizerInfo(self, request: Any, context: Any) -> Any:
        return tokenizer_pb2.GetTokenizerInfoResponse(
            model=MODEL, vocabulary_size=256 + len(WORDS), has_chat_template=True, revision="1"
        )


class Engine(engine_pb2_grpc.EngineServiceServicer):
    """Plays `script`; `left` counts the generations that were left before it had ended."""

    def __init__(self) -> None:
        self.script: Script = says("one", "two")
        self.replica_id = uuid.uuid4().hex
        self.requests: list[EngineRequest] = []
        self.left = 0
        self.active = 0
        self.calls_ended = asyncio.Event()
        self.capabilities = [types_pb2.MODEL_CAPABILITY_GENERATE, types_pb2.MODEL_CAPABILITY_CHAT]
        # Fails at once where there is a failure, else waits until `may_embed` is set, as it is at
        # first.
        self.embed_calls = 0
        self.embedded: list[list[int]] = []
        self.may_embed = asyncio.Event()
        self.may_embed.set()
        self.embed_failure: ServiceError | None = None

    async def Embed(self, request: Any, context: Any) -> Any:
        """The vector of an input: how many tokens it has, and the first."""
        self.embed_calls += 1
        if self.embed_failure is not None:
            raise self.embed_failure
        self.active += 1
        try:
            await self.may_embed.wait()
        finally:
            self.active -= 1
        inputs = [list(each.token_ids) for each in request.inputs]
        self.embedded += inputs
        return engine_pb2.EngineServiceEmbedResponse(
            embeddings=[types_pb2.Embedding(values=[len(ids), ids[0]]) for ids in inputs]
        )

    async def GenerateMany(
        self, requests: AsyncIterator[engine_pb2.GenerateManyRequest], context: Any
    ) -> AsyncIterator[engine_pb2.GenerateManyResponse]:
        yield engine_pb2.GenerateManyResponse(replica_id=self.replica_id)
        said: asyncio.Queue[engine_pb2.GenerationOutput | None] = asyncio.Queue()
        playing: dict[int, asyncio.Task[None]] = {}

        async def read() -> None:
            async for request in requests:
                for message in request.inputs:
                    if message.HasField("open"):
                        play = self._play(message.session_id, message.open.request, said)
                        playing[message.session_id] = asyncio.create_task(play)
                    elif message.cancel:
                        playing[message.session_id].cancel()
            said.put_nowait(None)

        reading = asyncio.create_task(read())
        try:
            while (output := await said.get()) is not None:
                yield engine_pb2.GenerateManyResponse(outputs=[output])
        finally:
            for task in (reading, *playing.values()):
                task.cancel()

    async def _play(
        self,
        session_id: int,
        request: EngineRequest,
        said: asyncio.Queue[engine_pb2.GenerationOutput | None],
    ) -> None:
        self.requests.append(request)
        self.active += 1
        played = False
        output = engine_pb2.GenerationOutput
        try:
            async for response in self.script(request):
                said.put_nowait(
                    output(session_id=session_id, chunk=response.chunk)
                    if response.HasField("chunk")
                    else output(session_id=session_id, completes=[response.complete])
                )
                await asyncio.sleep(0)
            said.put_nowait(output(session_id=session_id, finished=True))
            played = True
        except ServiceError as error:
            status = to_session_status(error)
            said.put_nowait(output(session_id=session_id, finished=True, error=status))
        finally:
            self.left += not played
            self.active -= 1
            self.calls_ended.set()

    async def WatchLoad(
        self, request: engine_pb2.WatchLoadRequest, context: Any
    ) -> AsyncIterator[engine_pb2.WatchLoadResponse]:
        while True:
            yield engine_pb2.WatchLoadResponse(running_sequences=self.active)
            await asyncio.sleep(request.interval_ms / 1000)

    async def GetModelInfo(self, request: Any, context: Any) -> Any:
        return engine_pb2.GetModelInfoResponse(
            model=MODEL,
            context_tokens=4096,
            vocabulary_size=256 + len(WORDS),
            capabilities=self.capabilities,
            embedding_size=2,
        )


class Cache(cache_pb2_grpc.CacheServiceServicer):
    """Keeps answers and leases in memory. While `may_answer` is not set it hangs."""

    def __init__(self) -> None:
        self.answers: dict[bytes, cache_pb2.CachedAnswer] = {}
        self.leases: dict[bytes, str] = {}
        self.look_ups: list[cache_pb2.LookUpRequest] = []
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.refuses_stores = False
        self.vectors: dict[bytes, cache_pb2.CachedEmbedding] = {}

    async def LookUpEmbeddings(self, request: Any, context: Any) -> Any:
        await self.may_answer.wait()
        none = cache_pb2.CachedEmbedding()
        return cache_pb2.LookUpEmbeddingsResponse(
            embeddings=[self.vectors.get(each, none) for each in request.requests]
        )

    async def StoreEmbeddings(self, request: Any, context: Any) -> Any:
        await self.may_answer.wait()
        self.vectors |= dict(zip(request.requests, request.embeddings, strict=True))
        return cache_pb2.StoreEmbeddingsResponse(stored=len(request.requests))

    async def LookUp(self, request: Any, context: Any) -> Any:
        self.look_ups.append(request)
        await self.may_answer.wait()
        key, response = request.key.SerializeToString(), cache_pb2.LookUpResponse
        give_up_at = time.monotonic() + request.wait.ToMilliseconds() / 1000
        while key in self.leases and time.monotonic() < give_up_at:
            await asyncio.sleep(0.005)
        if key in self.answers:
            return response(outcome=response.OUTCOME_HIT, answer=self.answers[key])
        if key in self.leases:
            return response(outcome=response.OUTCOME_PENDING)
        if not request.HasField("lease_ttl"):
            return response(outcome=response.OUTCOME_MISS)
        self.leases[key] = f"lease {len(self.look_ups)}"
        return response(
            outcome=response.OUTCOME_MISS, lease=cache_pb2.Lease(token=self.leases[key])
        )

    async def Store(self, request: Any, context: Any) -> Any:
        await self.may_answer.wait()
        if self.refuses_stores:
            raise ServiceError(Reason.INVALID_FIELD, "no")
        key = request.key.SerializeToString()
        assert self.leases.pop(key, "") == request.lease_token
        self.answers[key] = request.answer
        return cache_pb2.StoreResponse(stored=True)

    async def ReleaseLease(self, request: Any, context: Any) -> Any:
        key = request.key.SerializeToString()
        released = self.leases.get(key) == request.lease_token
        if released:
            del self.leases[key]
        return cache_pb2.ReleaseLeaseResponse(released=released)


class ScriptedMesh:
    """Enter it to start; `stub` calls the gateway."""

    def __init__(self, folder: Path, **sections: dict[str, Any]) -> None:
        self.tokenizer = Tokenizer()
        self.engine = Engine()
        self.cache = Cache()
        self.gateway_metrics = Metrics("gateway")
        self._folder = folder
        self._sections = sections
        self._stack = AsyncExitStack()
        self._servers: dict[str, grpc.aio.Server] = {}
        self._ports: dict[str, int] = {}
        self._safety: SafetyService

    async def __aenter__(self) -> Self:
        policy = self._folder / "policy.yaml"
        policy.write_text(POLICY)
        safety = SafetyService(
            Settings.model_validate({"safety": {"policies": {"default": policy}}}),
            Metrics("safety"),
        )
        await safety.start()
        self._safety = safety
        for name in ("tokenizer", "engine", "safety", "cache"):
            await self.start(name)
        sections: dict[str, dict[str, Any]] = {
            name: {"target": f"ipv4:127.0.0.1:{self._ports[name]}"} for name in self._ports
        }
        sections["cache"]["enabled"] = False
        sections["gateway"] = {"http_listen": None}
        for name, section in self._sections.items():
            sections[name] = {**sections.get(name, {}), **section}
        settings = Settings.model_validate(
            {"models": {MODEL: {"source": MODEL, "aliases": ["alias"]}}, **sections}
        )
        gateway = GatewayService(settings, self.gateway_metrics)
        if settings.gateway.tls is not None:
            gateway.certificates = ServerCertificates(settings.gateway.tls, self.gateway_metrics)
        health = HealthMonitor(gateway.grpc_services, gateway.probe, self.gateway_metrics)
        gateway.monitor = Monitor(health, self.gateway_metrics, gateway.draining)
        await gateway.start()
        server = grpc.aio.server(interceptors=[CallInterceptor(self.gateway_metrics)])
        gateway.register(server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self.gateway = gateway
        self.http_url = f"http://{settings.gateway.http_listen}"
        self.channel = channel
        self.stub = gateway_pb2_grpc.InferenceServiceStub(channel)
        self._stack.push_async_callback(self.stop_all)
        self._stack.push_async_callback(gateway.stop)
        self._stack.push_async_callback(until, self._is_idle)
        self._stack.push_async_callback(server.stop, 0)
        self._stack.push_async_callback(channel.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    def _is_idle(self) -> bool:
        """Whether the gateway holds nothing at any replica, as it must after its last call."""
        channels = self.gateway._peers.channels
        return not any(replica.in_flight for each in channels for replica in each.replicas)

    async def start(self, name: str, port: int | None = None) -> None:
        """A replica of a peer, on the port that it had before."""
        server = grpc.aio.server(
            interceptors=[CallInterceptor(Metrics(name))], options=[("grpc.so_reuseport", 0)]
        )
        if name == "tokenizer":
            tokenizer_pb2_grpc.add_TokenizerServiceServicer_to_server(self.tokenizer, server)
        elif name == "engine":
            engine_pb2_grpc.add_EngineServiceServicer_to_server(self.engine, server)
        elif name == "cache":
            cache_pb2_grpc.add_CacheServiceServicer_to_server(self.cache, server)
        else:
            self._safety.register(server)
        port = self._ports.get(name, 0) if port is None else port
        self._ports[name] = server.add_insecure_port(f"127.0.0.1:{port}")
        await server.start()
        self._servers[name] = server

    async def kill(self, name: str) -> None:
        """Ends a peer with everything in flight."""
        await self._servers.pop(name).stop(0)

    async def stop_all(self) -> None:
        for name in list(self._servers):
            await self.kill(name)
        await self._safety.stop()

    async def generate(self, text: str = "hello", **fields: Any) -> gateway_pb2.GenerateResponse:
        return await self.stub.Generate(generation(text, **fields), timeout=20)

    async def stream(
        self, text: str = "hello", **fields: Any
    ) -> list[gateway_pb2.StreamGenerateResponse]:
        request = gateway_pb2.StreamGenerateRequest(request=generation(text, **fields))
        return [message async for message in self.stub.StreamGenerate(request, timeout=20)]

    def count(self, name: str, **labels: str) -> float:
        return self.gateway_metrics.registry.get_sample_value(name, labels) or 0.0


def generation(text: str = "hello", **fields: Any) -> gateway_pb2.GenerateRequest:
    """A request; fields of sampling, stopping and output go by their own names."""
    request = gateway_pb2.GenerateRequest(text=text)
    for name, value in fields.items():
        for part in (request.sampling, request.stopping, request.output, request):
            if name in part.DESCRIPTOR.fields_by_name:
                field = part.DESCRIPTOR.fields_by_name[name]
                if field.is_repeated:
                    getattr(part, name).extend(value)
                else:
                    setattr(part, name, value)
                break
        else:
            raise KeyError(name)
    return request
