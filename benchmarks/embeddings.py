"""Embeddings of 1,000 short texts: an engine, the mesh, and sentence-transformers, in turns.

    python -m benchmarks.peers
    python -m benchmarks.embeddings

All run on this machine, on the same weights (MiniLM of the catalogue), one after the other in each
round, and are idle meanwhile. The engine gets token ids, so what it needs is what computing and
its gRPC take; the mesh and sentence-transformers get texts. The texts are passages of the Python
language reference.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import psutil

from benchmarks.local_mesh import LocalMesh, free_ports
from benchmarks.machine import describe_machine
from benchmarks.peers.environments import SENTENCE_TRANSFORMERS
from benchmarks.prompts import english_text
from meshserve.v1 import engine_pb2, engine_pb2_grpc, gateway_pb2, gateway_pb2_grpc
from services.runtime.modelfiles import locate
from services.tokenizer.model_tokenizer import load_model_tokenizer

MODEL = "all-minilm-l6-v2"
WORKER = Path(__file__).parent / "peers" / "sentence_transformers_worker.py"
START_TIMEOUT_S = 120.0

Vectors = npt.NDArray[np.float32]
Encode = Callable[[], tuple[float, Vectors]]
"""Encodes all texts; returns the seconds that it took, and the vectors."""


@dataclass(frozen=True, slots=True)
class System:
    """Something that encodes, in the process `pid` and those below it."""

    encode: Encode
    pid: int

    def processor_seconds(self) -> float:
        """What it has taken of the processors so far."""
        process = psutil.Process(self.pid)
        times = [each.cpu_times() for each in (process, *process.children(recursive=True))]
        return sum(each.user + each.system for each in times)


def short_texts(count: int, words: tuple[int, int], seed: int = 0) -> list[str]:
    """Passages of whole words, their numbers drawn evenly from a range, both ends included."""
    draw = random.Random(seed)
    all_words = re.findall(r"[A-Za-z][\w'-]*[,.]?", english_text())
    texts = []
    for _ in range(count):
        length = draw.randint(*words)
        start = draw.randrange(len(all_words) - length)
        texts.append(" ".join(all_words[start : start + length]))
    return texts


def parts_of(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Runs of at most `size`."""
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def sentence_transformers(texts: list[str], batch_size: int) -> Iterator[System]:
    """A process of its own, in an environment of its own."""
    with tempfile.TemporaryDirectory() as directory:
        texts_file, vectors_file = Path(directory) / "texts.json", Path(directory) / "vectors"
        texts_file.write_text(json.dumps(texts), encoding="utf-8")
        command = [
            *(str(SENTENCE_TRANSFORMERS.program("python")), str(WORKER)),
            *("--model", str(locate(MODEL)), "--batch-size", str(batch_size)),
            *("--texts", str(texts_file), "--vectors", str(vectors_file)),
        ]
        with subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            stdin, stdout = process.stdin, process.stdout
            assert stdin is not None
            assert stdout is not None
            json.loads(stdout.readline())
            vectors = np.fromfile(vectors_file, "<f4").reshape(len(texts), -1)

            def encode() -> tuple[float, Vectors]:
                stdin.write("\n")
                stdin.flush()
                return json.loads(stdout.readline())["seconds"], vectors

            yield System(encode, process.pid)
            stdin.close()


@contextmanager
def engine(texts: list[str], request_texts: int, settings: dict[str, Any]) -> Iterator[System]:
    """An engine by itself, which gets token ids."""
    tokenizer = load_model_tokenizer(locate(MODEL))
    inputs = [
        engine_pb2.EncoderInput(token_ids=encoded.token_ids)
        for encoded in tokenizer.encode_batch(texts)
    ]
    requests = [
        engine_pb2.EngineServiceEmbedRequest(request_id=f"r{number}", inputs=part)
        for number, part in enumerate(parts_of(inputs, request_texts))
    ]
    (port,) = free_ports(1)
    document = {
        "models": {MODEL: {"source": MODEL, **settings}},
        "engine": {"listen": f"127.0.0.1:{port}", "metrics_listen": None, "device": "cpu"},
    }
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "meshserve.json"
        config.write_text(json.dumps(document), encoding="utf-8")
        process = subprocess.Popen(
            [sys.executable, "-m", "services.engine", "--config", str(config)],
            stderr=subprocess.DEVNULL,
        )
        try:

            def encode() -> tuple[float, Vectors]:
                return asyncio.run(
                    _call_all(
                        f"127.0.0.1:{port}",
                        lambda channel: engine_pb2_grpc.EngineServiceStub(channel).Embed,
                        requests,
                    )
                )

            _until_ready(encode, process)
            yield System(encode, process.pid)
        finally:
            process.terminate()
            process.wait()


@contextmanager
def mesh(texts: list[str], request_texts: int, settings: dict[str, Any]) -> Iterator[System]:
    """`meshserve up` with the model, asked by gRPC; its response cache is off."""
    requests = [gateway_pb2.EmbedRequest(texts=part) for part in parts_of(texts, request_texts)]
    document = {"models": {MODEL: {"source": MODEL, **settings}}, "cache": {"enabled": False}}
    with LocalMesh(document) as local:

        def encode() -> tuple[float, Vectors]:
            return asyncio.run(
                _call_all(
                    local.target,
                    lambda channel: gateway_pb2_grpc.InferenceServiceStub(channel).Embed,
                    requests,
                )
            )

        encode()
        yield System(encode, local.pid)


async def _call_all(
    target: str, method: Callable[[Any], Any], requests: Sequence[Any]
) -> tuple[float, Vectors]:
    """Make all calls at the same time, on a channel that is connected before."""
    options = [("grpc.max_receive_message_length", 64 << 20)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        await asyncio.wait_for(channel.channel_ready(), START_TIMEOUT_S)
        call = method(channel)
        started = time.perf_counter()
        responses = await asyncio.gather(*(call(request) for request in requests))
        seconds = time.perf_counter() - started
    rows = [embedding.values for response in responses for embedding in response.embeddings]
    return seconds, np.array(rows, np.float32)


def _until_ready(encode: Encode, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            encode()
        except (grpc.RpcError, TimeoutError):
            time.sleep(0.2)
        else:
            return
    raise RuntimeError("the engine did not start")


def least_cosine(found: Vectors, expected: Vectors) -> float:
    """Of each text's two vectors."""
    products = (found * expected).sum(-1)
    return float(
        (products / np.linalg.norm(found, axis=-1) / np.linalg.norm(expected, axis=-1)).min()
    )


def main() -> None:
    """Print a table of rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=1000)
    parser.add_argument("--words", type=int, nargs=2, default=(5, 20))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--request-texts", type=int, default=250, help="texts in one request")
    parser.add_argument("--batch-size", type=int, default=32, help="of sentence-transformers")
    parser.add_argument("--systems", nargs="+", default=["engine", "mesh"])
    parser.add_argument("--weights", nargs="+", default=["bfloat16", "int8"])
    parser.add_argument("--json", type=Path, help="also write the figures here")
    arguments = parser.parse_args()
    texts = short_texts(arguments.texts, tuple(arguments.words))
    tokens = sum(
        len(each.token_ids) for each in load_model_tokenizer(locate(MODEL)).encode_batch(texts)
    )
    print(f"{len(texts)} texts, {tokens} tokens; {describe_machine()['processor']}")
    made = {"engine": engine, "mesh": mesh}
    seconds: dict[str, list[float]] = {}
    processor: dict[str, list[float]] = {}
    vectors: dict[str, Vectors] = {}
    with ExitStack() as stack:
        systems: dict[str, System] = {
            "sentence-transformers": stack.enter_context(
                sentence_transformers(texts, arguments.batch_size)
            )
        }
        for name in arguments.systems:
            for weights in arguments.weights:
                systems[f"{name}, {weights}"] = stack.enter_context(
                    made[name](texts, arguments.request_texts, {"weights": weights})
                )
        for _ in range(arguments.rounds):
            for name, system in systems.items():
                before = system.processor_seconds()
                taken, vectors[name] = system.encode()
                seconds.setdefault(name, []).append(taken)
                processor.setdefault(name, []).append(system.processor_seconds() - before)
    reference = "sentence-transformers"
    rates = {name: len(texts) / statistics.median(taken) for name, taken in seconds.items()}
    cosines = {name: least_cosine(found, vectors[reference]) for name, found in vectors.items()}
    print(
        f"{'':24} {'texts/s':>8} {'range':>15} {'ratio':>6} {'processor s':>12} {'cosine >=':>10}"
    )
    for name, taken in seconds.items():
        spread = f"{len(texts) / max(taken):.0f}-{len(texts) / min(taken):.0f}"
        ratio = rates[name] / rates[reference]
        print(
            f"{name:24} {rates[name]:8.0f} {spread:>15} {ratio:6.2f} "
            f"{statistics.median(processor[name]):12.2f} {cosines[name]:10.6f}"
        )
    if arguments.json is not None:
        figures = {
            "texts": len(texts),
            "tokens": tokens,
            "seconds": seconds,
            "processor_seconds": processor,
            "cosines": cosines,
        }
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
