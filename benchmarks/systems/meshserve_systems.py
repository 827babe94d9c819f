"""MeshServe itself: the whole mesh through its gateway, and the engine core alone."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.metadata import version
from typing import Any

import meshserve
from benchmarks.core_process import CoreProcess
from benchmarks.load import BenchmarkError, Run, run_workload
from benchmarks.local_mesh import LocalMesh
from benchmarks.workloads import Request, Workload
from services.runtime.modelfiles import locate

KV_CACHE_BYTES = 1 << 30
MAX_SEQUENCES = 64


class MeshClient:
    """The project's own client library, over gRPC, with token ids for a prompt."""

    def __init__(self, client: meshserve.AsyncClient) -> None:
        self._client = client

    async def generate(self, request: Request, arrived: Callable[[], None]) -> int:
        """See `load.Client`."""
        try:
            async with self._client.stream_generate(
                list(request.prompt_token_ids),
                max_tokens=request.output_tokens,
                temperature=0,
                # The demo model's default would be another task than the peers have.
                repetition_penalty=1.0,
                ignore_eos=True,
                cache=False,
            ) as stream:
                async for _ in stream:
                    arrived()
                answer = await stream.collect()
        except meshserve.MeshServeError as error:
            raise BenchmarkError(str(error)) from error
        return answer.usage.completion_tokens


@asynccontextmanager
async def mesh_client(target: str) -> AsyncIterator[MeshClient]:
    """A client of a running mesh, connected."""
    async with meshserve.AsyncClient(target, timeout=600) as client:
        await client.models()
        yield MeshClient(client)


class RunningMesh:
    """A mesh that serves."""

    def __init__(self, mesh: LocalMesh) -> None:
        self._mesh = mesh
        self.pid = mesh.pid

    def first_token(self, request: Request) -> None:
        """See RunningSystem."""
        self.run(Workload("start", 1, (request,)))

    def run(self, workload: Workload) -> Run:
        """See RunningSystem."""

        async def run() -> Run:
            async with mesh_client(self._mesh.target) as client:
                return await run_workload(client, workload)

        try:
            return asyncio.run(run())
        except* BenchmarkError as errors:
            raise BenchmarkError(str(errors.exceptions[0])) from errors


class Mesh:
    """`meshserve up`, every stage of the request path switched on, asked over gRPC.

    Args:
        name: see System.
        title: see System.
        model: name, path or hub id.
        model_settings: laid over the model's section of the configuration.
        engine_settings: laid over the engine's.
    """

    def __init__(
        self,
        name: str,
        title: str,
        model: str,
        model_settings: dict[str, Any] | None = None,
        engine_settings: dict[str, Any] | None = None,
    ) -> None:
        self.name = name
        self.title = title
        self._settings: dict[str, Any] = {
            "models": {"bench": {"source": model, **(model_settings or {})}},
            "engine": {
                "max_running_sequences": MAX_SEQUENCES,
                "kv_cache_bytes": KV_CACHE_BYTES,
                **(engine_settings or {}),
            },
        }

    def missing(self) -> str | None:
        """See System: the project's own environment is the one that runs."""
        return None

    def describe(self) -> dict[str, Any]:
        """See System."""
        return {
            "title": self.title,
            "versions": {"meshserve": version("meshserve")},
            "settings": self._settings,
        }

    @contextmanager
    def start(self) -> Iterator[RunningMesh]:
        """See System."""
        with LocalMesh(self._settings) as mesh:
            yield RunningMesh(mesh)


class Core:
    """The engine core in a process of its own, driven by a script: no gRPC, no client.

    Args:
        name: see System.
        title: see System.
        model: name, path or hub id.
        settings: laid over those of the core.
    """

    def __init__(
        self, name: str, title: str, model: str, settings: dict[str, Any] | None = None
    ) -> None:
        self.name = name
        self.title = title
        self._model = model
        self._settings = {
            "max_running_sequences": MAX_SEQUENCES,
            "kv_cache_memory_bytes": KV_CACHE_BYTES,
            **(settings or {}),
        }
        self._computes_in = ""

    def missing(self) -> str | None:
        """See System."""
        return None

    def describe(self) -> dict[str, Any]:
        """See System."""
        return {
            "title": self.title,
            "versions": {"meshserve": version("meshserve")},
            "settings": {"model": self._model, **self._settings},
            "computes_in": self._computes_in,
        }

    @contextmanager
    def start(self) -> Iterator[CoreProcess]:
        """See System."""
        settings = {"model_path": str(locate(self._model)), **self._settings}
        with CoreProcess(settings) as core:
            self._computes_in = core.description
            yield core
