"""The engine as a service of the mesh: its models, its server, its health, its end."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from meshserve.v1 import engine_pb2, engine_pb2_grpc
from services.engine.core.model_config import SparseAttention
from services.engine.core.settings import BatcherSettings, CoreSettings
from services.engine.core_client import CoreClient
from services.engine.core_process import CORE_COMMAND
from services.engine.hosted_model import HostedModel, State
from services.engine.hosting import Hosting
from services.engine.metrics import StepMetrics, read_models
from services.engine.servicer import EngineServicer
from services.runtime.modelfiles import (
    CATALOGUE,
    ModelFileError,
    ModelStoreError,
    locate,
    locate_adapter,
)
from services.runtime.modelfiles.fields import read_json
from services.runtime.server import Service, StartupError
from services.runtime.settings import ModelSettings, Settings
from services.runtime.telemetry import Metrics

# Where steps take a millisecond or two, the front is woken for several of them at once.
_EVENT_HOLD_MS = 5.0
# How architectures are called that generate.
_DECODERS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin")


class EngineService(Service):
    """Hosts one model or several. NOT_SERVING while none of them could take a request."""

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
        self._core_command = core_command
        self._models = Hosting([self._host(name) for name in settings.engine_models])
        read_models(metrics, self._models)
        self._servicer = EngineServicer(
            self._models,
            metrics,
            max_inputs=settings.engine.batcher.max_waiting_sequences,
            draining=self.draining,
            model_cache=settings.model_cache,
        )

    def register(self, server: grpc.aio.Server) -> None:
        """Adds the engine's RPCs."""
        engine_pb2_grpc.add_EngineServiceServicer_to_server(self._servicer, server)

    async def start(self) -> None:
        """Loads the models that are to be there from the start, and waits for them. Of several some
        may fail, and can be loaded later. Raises StartupError where all do."""
        at_start = [
            model
            for model in self._models.models
            if self.settings.models[model.name].load == "at_start"
        ]
        await self._models.start([model.name for model in at_start])
        failed = [model for model in at_start if model.state is State.FAILED]
        if not failed or len(failed) < len(self._models.models):
            return
        raise self._start_error(failed)

    async def probe(self) -> None:
        """Raises while no model could take a request, for a core starts or its step loop hangs."""
        self._models.check_health()

    async def drain(self) -> None:
        """Waits for the requests in flight, and aborts those that take too long."""
        # What is cut off needs a moment to tell its caller so before the server ends.
        margin_s = min(3.0, self.settings.engine.drain_timeout_s / 4)
        await self._models.drain(self.settings.engine.drain_timeout_s - margin_s)

    async def stop(self) -> None:
        """Ends the cores."""
        await self._models.close()

    def _host(self, name: str) -> HostedModel:
        settings, metrics = self.settings, self.metrics
        model, engine = settings.models[name], settings.engine
        client = CoreClient(
            None,
            stall_timeout_s=engine.stall_timeout_s,
            restart_stalled_after_s=engine.restart_stalled_after_s,
            longest_interval_s=engine.stream_interval_ms / 1000,
            command=self._core_command,
            on_step=StepMetrics(metrics, name).observe,
            on_restart=metrics.counter("meshserve_engine_core_restarts").labels(name).inc,
        )
        return HostedModel(
            name,
            client,
            lambda: core_settings(settings, name, self._waiting(name)),
            aliases=model.aliases,
            state=State.SLEEPING if model.load == "on_request" else State.UNLOADED,
            sleep_after_s=model.sleep_after_s,
            on_loaded=metrics.histogram("meshserve_engine_load_duration_seconds")
            .labels(name)
            .observe,
        )

    def _waiting(self, name: str) -> list[str]:
        """The other models that are not in memory."""
        return [
            model.name
            for model in self._models.models
            if model.name != name and model.state not in (State.READY, State.DRAINING)
        ]

    def _start_error(self, failed: list[HostedModel]) -> StartupError:
        if len(failed) == 1:
            (model,) = failed
            return StartupError(model.problem, model.way_out)
        problems = "; ".join(f"{model.name}: {model.problem}" for model in failed)
        return StartupError(
            f"none of the models can be loaded: {problems}",
            "check models and engine in the settings, and the log above",
        )


def weight_bytes(settings: Settings, name: str) -> int:
    """About what a model's weights take: the size of its files. 0 where it is not here."""
    try:
        path = locate(settings.models[name].source, settings.model_cache)
    except ModelStoreError:
        return 0
    files = path.glob("*") if path.is_dir() else [path]
    sizes = dict.fromkeys(_WEIGHT_SUFFIXES, 0)
    for file in files:
        if file.suffix in sizes:
            sizes[file.suffix] += file.stat().st_size
    # A folder may have the same weights in several formats.
    return max(sizes.values())


def generates(settings: Settings, name: str) -> bool:
    """Whether a model needs a KV cache, as far as its files tell; not if they are not here."""
    try:
        path = locate(settings.models[name].source, settings.model_cache)
        if not path.is_dir():
            return path.exists()
        architectures = read_json(path / "config.json").get("architectures")
    except (ModelStoreError, ModelFileError):
        return False
    is_decoder = isinstance(architectures, list) and str(*architectures[:1]).endswith(_DECODERS)
    # With modules it makes embeddings.
    return is_decoder and not (path / "modules.json").exists()


def core_settings(settings: Settings, name: str, waiting: Sequence[str] = ()) -> CoreSettings:
    """What the core of a model is told, from the settings of the mesh. `waiting` are other models
    of the engine that are not in memory now.

    Raises:
        StartupError: the model is not on this machine, or limits contradict each other.
    """
    engine = settings.engine
    model = settings.models[name]
    # Of a chosen size; 0: by what is left.
    cache_bytes = {
        each: settings.models[each].kv_cache_bytes or engine.kv_cache_bytes or 0
        for each in (name, *waiting)
    }
    try:
        model_path = locate(model.source, settings.model_cache)
        draft_model = engine.speculation.draft_model
        draft_model_path = (
            None if draft_model is None else str(locate(draft_model, settings.model_cache))
        )
        adapters = {
            adapter: str(locate_adapter(source, settings.model_cache))
            for adapter, source in model.adapters.items()
        }
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
            tensor_parallel=engine.tensor_parallel,
            pipeline_parallel=engine.pipeline_parallel,
            cpu_kernels=engine.cpu_kernels,
            block_size=engine.block_tokens,
            kv_cache_memory_bytes=cache_bytes[name] or None,
            kv_cache_memory_fraction=engine.kv_cache_memory_fraction,
            memory_share=1 / len(settings.engine_models),
            waiting_models=len(waiting),
            waiting_caches=sum(
                not cache_bytes[each] and generates(settings, each) for each in waiting
            ),
            waiting_weights_bytes=sum(weight_bytes(settings, each) for each in waiting),
            waiting_cache_bytes=sum(cache_bytes[each] for each in waiting),
            max_context_tokens=model.context_tokens,
            sparse_attention=_sparse_attention(model),
            max_batch_tokens=engine.max_batch_tokens,
            max_running_sequences=engine.max_running_sequences,
            max_waiting_sequences=engine.max_waiting_sequences,
            max_waiting_tokens=engine.max_waiting_tokens,
            step_latency_target_ms=engine.step_latency_target_ms,
            plan_ahead=engine.plan_ahead,
            excluded_kernels=engine.excluded_kernels,
            swap_memory_bytes=engine.swap_bytes,
            cuda_graphs=engine.cuda_graphs,
            prefix_cache=engine.prefix_cache,
            speculation=engine.speculation.method,
            draft_model_path=draft_model_path,
            adapters=adapters,
            max_adapters=engine.max_adapters,
            max_adapter_rank=engine.max_adapter_rank,
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


def _sparse_attention(model: ModelSettings) -> SparseAttention | None:
    chosen = model.sparse_attention
    return None if chosen is None else SparseAttention(chosen.window, chosen.global_tokens)


def _sampling_defaults(model: ModelSettings) -> dict[str, float]:
    """What the settings say, over what the catalogue recommends for its own models."""
    known = CATALOGUE.get(model.source)
    recommended = dict(known.sampling) if known is not None else {}
    return recommended | model.sampling.model_dump(exclude_none=True)
