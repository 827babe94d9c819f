"""OpenVINO GenAI's continuous batching behind a socket, one line of JSON per message.

Run by the interpreter of OpenVINO's own environment; needs nothing else of this project:

    python openvino_server.py --model DIRECTORY --port 9000

A request is `{"id": 1, "prompt_token_ids": [...], "max_tokens": 16}`; answers are
`{"id": 1, "tokens": 3}` for each step that brought tokens and `{"id": 1, "done": 16}` at the end.
The library ships no server. This one does less than a real one would, so what is measured through
it flatters OpenVINO rather than the other way round.
"""

from __future__ import annotations

import argparse
import json
import queue
import socket
import threading
from typing import Any

import numpy as np
import openvino
import openvino_genai


def main() -> None:
    """Serves until it is killed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache-gib", type=int, default=1)
    parser.add_argument("--max-sequences", type=int, default=64)
    parser.add_argument("--max-batch-tokens", type=int, default=512)
    parser.add_argument("--precision", default="bf16")
    arguments = parser.parse_args()
    scheduler = openvino_genai.SchedulerConfig()
    scheduler.cache_size = arguments.cache_gib
    scheduler.max_num_seqs = arguments.max_sequences
    scheduler.max_num_batched_tokens = arguments.max_batch_tokens
    scheduler.dynamic_split_fuse = True
    scheduler.enable_prefix_caching = True
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        arguments.model,
        scheduler_config=scheduler,
        device="CPU",
        properties={
            "INFERENCE_NUM_THREADS": arguments.threads,
            "INFERENCE_PRECISION_HINT": arguments.precision,
        },
    )
    arrivals: queue.Queue[tuple[socket.socket, dict[str, Any]]] = queue.Queue()
    listener = socket.create_server(("127.0.0.1", arguments.port))
    threading.Thread(target=accept, args=(listener, arrivals), daemon=True).start()
    serve(pipeline, arrivals)


def accept(listener: socket.socket, arrivals: queue.Queue[Any]) -> None:
    """Takes connections, each with a thread that reads its requests."""
    while True:
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=read, args=(connection, arrivals), daemon=True).start()


def read(connection: socket.socket, arrivals: queue.Queue[Any]) -> None:
    """Queues every request of a connection."""
    with connection.makefile("rb") as lines:
        for line in lines:
            arrivals.put((connection, json.loads(line)))


def serve(pipeline: Any, arrivals: queue.Queue[Any]) -> None:
    """The step loop. Requests that arrive during a step join before the next."""
    live: dict[int, tuple[socket.socket, int, Any]] = {}  # by our number: connection, id, handle
    produced: dict[int, int] = {}
    next_number = 0
    while True:
        while not live or not arrivals.empty():
            connection, message = arrivals.get()
            config = openvino_genai.GenerationConfig()
            config.max_new_tokens = message["max_tokens"]
            config.ignore_eos = True
            config.do_sample = False
            prompt = openvino.Tensor(np.array([message["prompt_token_ids"]], dtype=np.int64))
            handle = pipeline.add_request(next_number, prompt, config)
            live[next_number] = (connection, message["id"], handle)
            produced[next_number] = 0
            next_number += 1
        pipeline.step()
        lines: dict[socket.socket, list[dict[str, int]]] = {}
        for number, (connection, identity, handle) in list(live.items()):
            tokens = 0
            while handle.can_read():
                tokens += sum(len(each.generated_ids) for each in handle.read().values())
            said = lines.setdefault(connection, [])
            if tokens:
                produced[number] += tokens
                said.append({"id": identity, "tokens": tokens})
            if handle.get_status() != openvino_genai.GenerationStatus.RUNNING:
                said.append({"id": identity, "done": produced.pop(number)})
                del live[number]
        for connection, messages in lines.items():
            try:
                connection.sendall(b"".join(json.dumps(each).encode() + b"\n" for each in messages))
            except OSError:  # gone; its requests run to their end, as nobody asked otherwise
                continue


if __name__ == "__main__":
    main()
