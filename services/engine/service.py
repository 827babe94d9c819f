"""The engine as a service of the mesh: its core, its server, its health, its end."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from meshserve.v1 import engine_pb2, engine_pb2_grpc
from services.engine.core.settings import BatcherSettings, CoreSettings
from services.engine.core_client import CoreClient, CoreStartError
from services.engine.core_process import CORE_COMMAND
from services.engine.metrics import StepMetrics, read_core
from services.engine.servicer import EngineServicer
from services.runtime.modelfiles import CATALOGUE, ModelStoreError, locate
from services.runtime.server import Service, StartupError
from services.runtime.settings import ModelSettings, Settings
from services.runtime.telemetry import Metrics

# Where steps take a millisecond or two, the front is woken for several of them at once.
_EVENT_HOLD_MS = 5.0


class EngineService(Service):
    """Runs one model. NOT_SERVING while its core starts, hangs or drains."""

    name = "engine"
    grpc_services = (engine_pb2.DESCRIPTOR.services_by_name["EngineService"].full_name,)

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        *,
        core_command: Sequence[str] = CORE_COMMAND,
    ) -> None:
        super().__init__(settings, metrics)
        model_name = settings.engine_model
        self._client = CoreClient(
            core_settings(settings),
            stall_timeout_s=settings.engine.stall_timeout_s,
            restart_stalled_after_s=settings.engine.restart_stalled_after_s,
            longest_interval_s=settings.engine.stream_interval_ms / 1000,
            command=core_command,
            on_step=StepMetrics(metrics, model_name).observe,
            on_restart=metrics.counter("meshserve_engine_core_restarts").labels(model_name).inc,
        )
        read_core(metrics, model_name, self._client)
        self._servicer = EngineServicer(
            self._client,
            metrics,
            model=model_name,
            aliases=settings.models[model_name].aliases,
            max_inputs=settings.engine.batcher.max_waiting_sequences,
            draining=self.draining,
        )

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the engine's RPCs."""
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Starts the core and waits until it has loaded the model. Raises StartupError."""
        try:
            await self._client.start()
        except CoreStartError as error:
            raise StartupError(
                f"the engine core cannot start: {error}",
                "check models and engine in the settings, and the log above",
            ) from None

    async def probe(self) -> None:
        """Raises while the core could not take a request or its step loop does not turn."""
        self._client.check_health()

    async def drain(self) -> None:
        """Waits for the requests in flight, and aborts those that take too long."""
        # What is cut off needs a moment to tell its caller so before the server ends.
        margin_s = min(3.0, self.settings.engine.drain_timeout_s / 4)
        await self._client.drain(self.settings.engine.drain_timeout_s - margin_s)

    async def stop(self) -> None:
        """Ends the core."""
        await self._client.close()


def core_settings(settings: Settings) -> CoreSettings:
    """What the core is told, from the settings of the mesh.

    Raises:
        StartupError: the model is not on this machine, or limits contradict each other.
    """
    engine = settings.engine
    model = settings.models[settings.engine_model]
    try:
        model_path = locate(model.source, settings.model_cache)
        draft_model = engine.speculation.draft_model
        draft_model_path = (
            None if draft_model is None else str(locate(draft_model, settings.model_cache))
        )
    except ModelStoreError as error:
        raise StartupError(error.problem, error.way_out) from None
    try:
        return CoreSettings(
            model_path=str(model_path),
            device=engine.device,
            dtype=model.dtype,
            weights=model.weights,
            allow_pickled=model.allow_pickled,
            kv_cache_format=engine.kv_cache_format,
            threads=engine.threads,
            cpu_kernels=engine.cpu_kernels,
            block_size=engine.block_tokens,
            kv_cache_memory_bytes=engine.kv_cache_bytes,
            kv_cache_memory_fraction=engine.kv_cache_memory_fraction,
            max_context_tokens=model.context_tokens,
            max_batch_tokens=engine.max_batch_tokens,
            max_running_sequences=engine.max_running_sequences,
            max_waiting_sequences=engine.max_waiting_sequences,
            max_waiting_tokens=engine.max_waiting_tokens,
            step_latency_target_ms=engine.step_latency_target_ms,
            plan_ahead=engine.plan_ahead,
            prefix_cache=engine.prefix_cache,
            speculation=engine.speculation.method,
            draft_model_path=draft_model_path,
            event_hold_ms=min(_EVENT_HOLD_MS, engine.stream_interval_ms / 2),
            default_sampling=_sampling_defaults(model),
            batcher=BatcherSettings(
                max_sequences=engine.batcher.max_sequences,
                max_tokens=engine.batcher.max_tokens,
                longest_wait_ms=engine.batcher.longest_wait_ms,
                preferred_sizes=engine.batcher.preferred_sizes,
                max_waiting_sequences=engine.batcher.max_waiting_sequences,
            ),
        )
    except ValueError as error:
        raise StartupError(str(error), "mend the engine section of the settings") from None


def _sampling_defaults(model: ModelSettings) -> dict[str, float]:
    """What the settings say, over what the catalogue recommends for its own models."""
    known = CATALOGUE.get(model.source)
    recommended = dict(known.sampling) if known is not None else {}
    return recommended | model.sampling.model_dump(exclude_none=True)
