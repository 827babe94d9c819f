"""The peers, each in the configuration that measured best on two cores."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from benchmarks.local_mesh import free_ports
from benchmarks.peers import environments, models
from benchmarks.systems.base import RunningSystem
from benchmarks.systems.http_client import LlamaCppCompletions, VLLMCompletions, http_clients
from benchmarks.systems.openvino_client import openvino_clients
from benchmarks.systems.server_process import ClientFactory, ServerProcess

THREADS = 2
KV_CACHE_GIB = 1
MAX_SEQUENCES = 64
MAX_CONTEXT_TOKENS = 8192
SERVED_NAME = "bench"
LLAMACPP_SLOTS = 32
LLAMACPP_SLOT_TOKENS = 4352


@dataclass(frozen=True, slots=True)
class Launch:
    """A command to start on a port, and how to talk to what it starts."""

    command: list[str]
    clients: ClientFactory
    environment: dict[str, str] = field(default_factory=dict)


class Peer:
    """A system out of an environment of its own."""

    def __init__(self, name: str, title: str, environment: environments.Environment) -> None:
        self.name = name
        self.title = title
        self._environment = environment

    def launch(self, port: int) -> Launch:
        """How to start it on a port."""
        raise NotImplementedError

    def missing(self) -> str | None:
        """See System."""
        if not self._environment.is_ready() or not models.are_ready():
            return "not installed: run `python -m benchmarks.peers`"
        return None

    def describe(self) -> dict[str, Any]:
        """See System; the port is left out, for it differs from start to start."""
        launch = self.launch(port=0)
        return {
            "title": self.title,
            "versions": self._environment.versions(),
            "command": [models.without_home(word) for word in launch.command],
            "environment": {
                name: models.without_home(value) for name, value in launch.environment.items()
            },
        }

    def start(self) -> AbstractContextManager[RunningSystem]:
        """See System."""
        launch = self.launch(free_ports(1)[0])
        return ServerProcess(launch.command, launch.environment, launch.clients)


class VLLM(Peer):
    """vLLM's OpenAI server, its CPU build."""

    def __init__(self) -> None:
        super().__init__("vllm", "vLLM (bf16)", environments.VLLM)

    def launch(self, port: int) -> Launch:
        """See Peer."""
        return Launch(
            [
                str(self._environment.program("vllm")),
                "serve",
                str(models.BF16_DIRECTORY),
                f"--served-model-name={SERVED_NAME}",
                "--dtype=bfloat16",
                "--host=127.0.0.1",
                f"--port={port}",
                f"--max-model-len={MAX_CONTEXT_TOKENS}",
                f"--max-num-seqs={MAX_SEQUENCES}",
                "--enable-prefix-caching",
                "--no-enable-log-requests",
                "--disable-uvicorn-access-log",
            ],
            http_clients(port, VLLMCompletions(SERVED_NAME)),
            {
                "VLLM_CPU_KVCACHE_SPACE": str(KV_CACHE_GIB),
                "VLLM_CPU_OMP_THREADS_BIND": f"0-{THREADS - 1}",
                "VLLM_NO_USAGE_STATS": "1",
                "HF_HUB_OFFLINE": "1",
            },
        )


class LlamaCpp(Peer):
    """The llama.cpp server."""

    def __init__(self, precision: str) -> None:
        super().__init__(
            f"llamacpp-{precision}", f"llama.cpp ({precision.upper()})", environments.LLAMACPP
        )
        self._precision = precision

    def launch(self, port: int) -> Launch:
        """See Peer.

        A cache for each slot: in one cache for all, every sequence would attend over the cells of
        all others, masked. Each must hold the longest prompt, so there are fewer slots than others
        have sequences, and more memory. Saving the prompts of idle slots is off, for no workload
        comes back to one.

        Options and values are words of their own: joined by a sign of equality, the server would
        take an underline in a file's name for a hyphen.
        """
        return Launch(
            [
                str(environments.llamacpp_binary("llama-server")),
                "--model",
                str(models.llamacpp_model(self._precision)),
                "--threads",
                str(THREADS),
                "--threads-batch",
                str(THREADS),
                "--parallel",
                str(LLAMACPP_SLOTS),
                "--ctx-size",
                str(LLAMACPP_SLOTS * LLAMACPP_SLOT_TOKENS),
                "--no-kv-unified",
                "--cache-ram",
                "0",
                "--cont-batching",
                "--flash-attn",
                "on",
                "--no-webui",
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
            ],
            http_clients(port, LlamaCppCompletions()),
        )


class OpenVINO(Peer):
    """OpenVINO GenAI's continuous batching, which comes as a library: a small server drives it."""

    def __init__(self, precision: str) -> None:
        super().__init__(
            f"openvino-{precision}", f"OpenVINO GenAI ({precision})", environments.OPENVINO
        )
        self._model = models.openvino_directory(precision)

    def launch(self, port: int) -> Launch:
        """See Peer."""
        return Launch(
            [
                str(self._environment.program("python")),
                str(environments.OPENVINO_SERVER),
                f"--model={self._model}",
                f"--threads={THREADS}",
                f"--cache-gib={KV_CACHE_GIB}",
                f"--max-sequences={MAX_SEQUENCES}",
                "--max-batch-tokens=512",
                f"--port={port}",
            ],
            openvino_clients(port),
        )
