"""The services behind the edge, the store they share, and telemetry."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from services.runtime.settings.section import Fraction, Positive, Seconds, Section, ServerSettings

Port = Annotated[int, Field(gt=0, le=65535)]


class TokenizerSettings(ServerSettings):
    """The tokenizer service."""

    listen: str = "127.0.0.1:50052"
    metrics_listen: str | None = "127.0.0.1:9452"
    workers: Positive = Field(2, description="Threads that encode.")
    max_text_bytes: Positive = Field(
        16 * 2**20, description="Largest text encoded, in bytes of UTF-8."
    )
    allow_request_templates: bool = Field(
        False, description="Whether requests may bring a chat template of their own."
    )
    template_timeout_s: Seconds = Field(
        2.0, description="Longest time a chat template may take, in seconds."
    )
    max_rendered_bytes: Positive = Field(
        32 * 2**20, description="Largest prompt a chat template may render, in bytes."
    )


class SpeculationSettings(Section):
    """Guesses at the next tokens, so that one step computes several; answers stay the same."""

    method: Literal["auto", "ngram", "draft", "off"] = Field(
        "auto",
        description="`ngram` finds what followed the last tokens earlier in the prompt or answer, "
        "`draft` asks a draft model, `auto` is `draft` where a draft model is set, else `ngram`. "
        "Nothing is guessed while it does not pay.",
    )
    draft_model: str | None = Field(
        None,
        description="A small model with the vocabulary of the engine's: a name of the catalogue, a "
        "path or a Hugging Face id.",
    )


class BatcherSettings(Section):
    """How an engine that runs an encoder makes batches, of sequences of similar lengths."""

    max_sequences: Positive = Field(256, description="Sequences computed in one batch.")
    max_tokens: Positive = Field(
        4096,
        description="Tokens computed in one batch, unless one sequence has more. A batch is also "
        "kept within what `step_latency_target_ms` allows.",
    )
    longest_wait_ms: Annotated[float, Field(ge=0, le=60_000)] = Field(
        0.0,
        description="How long a sequence may wait for others that would make a fuller batch, in "
        "milliseconds. Without waiting, batches are made of what comes while another is computed.",
    )
    preferred_sizes: tuple[Positive, ...] = Field(
        (),
        description="Sizes of batches, in sequences, that wait for no further sequences and are "
        "not exceeded unless a larger one of them is reached. Default: none.",
    )
    max_waiting_sequences: Positive = Field(
        16384,
        description="Sequences that may wait before requests are refused, and the most of one "
        "request.",
    )


class EngineSettings(ServerSettings):
    """The engine service."""

    listen: str = "127.0.0.1:50053"
    metrics_listen: str | None = "127.0.0.1:9453"
    model: str | None = Field(
        None,
        description="The one model that this engine hosts. Default: all models whose engines are "
        "at its `target`.",
    )
    device: str = Field(
        "auto", description="`auto` (CUDA when there is a card), `cpu` or `cuda:N`."
    )
    threads: Positive | None = Field(
        None,
        description="Compute threads on a CPU. Default: one per core, within the quota of the "
        "container.",
    )
    tensor_parallel: Positive = Field(
        1,
        description="GPUs that share each layer of the model, each with its part of every matrix "
        "and of the KV cache. Must divide the model's heads and its feed-forward layers.",
    )
    pipeline_parallel: Positive = Field(
        1,
        description="Stages of consecutive layers, each on `tensor_parallel` GPUs: for models that "
        "do not fit otherwise, and for machines that a slow network joins.",
    )
    cpu_kernels: Literal["auto", "amx", "avx512bf16", "avx512", "avx2", "off"] = Field(
        "auto",
        description="Instruction set of the C++ kernels on a CPU: `auto` is the best that the "
        "machine has, `off` is plain torch.",
    )
    block_tokens: Literal[8, 16, 32, 64, 128] = Field(
        16, description="Tokens in a block of the KV cache."
    )
    kv_cache_format: Literal["auto", "int8", "fp8"] = Field(
        "auto",
        description="How keys and values are stored: as the model's dtype, or in 8 bits, which "
        "holds about twice the tokens: `int8` with a scale for each token and head, on a CPU and a "
        "GPU; `fp8` (e4m3) without, on a GPU.",
    )
    kv_cache_bytes: Positive | None = Field(
        None,
        description="Size of the KV cache of each model in bytes. Default: from free memory.",
    )
    kv_cache_memory_fraction: Fraction | None = Field(
        None,
        description="On a GPU: the share of its memory that the engine may take in all, 0.9 by "
        "default; the KV cache gets what weights, the largest step and CUDA graphs leave of it. On "
        "a CPU: the share of the memory left beside the weights that the KV cache may take, 0.5 by "
        "default. The caches of several models take equal parts.",
    )
    max_running_sequences: Positive = Field(64, description="Sequences computed in one step.")
    max_batch_tokens: Positive = Field(
        512, description="Tokens computed in one step; long prompts are computed in chunks of it."
    )
    max_waiting_sequences: Positive = Field(
        1024, description="Sequences that may wait before requests are refused."
    )
    max_waiting_tokens: Positive = Field(
        2**18, description="Tokens of prompts that may wait before requests are refused."
    )
    step_latency_target_ms: Annotated[float, Field(gt=0)] = Field(
        100.0,
        description="Longest time between two tokens of an answer that computing prompts in the "
        "same steps may cause, in milliseconds. Larger favours throughput.",
    )
    plan_ahead: Literal["auto", "on", "off"] = Field(
        "auto",
        description="Whether a step is planned while the one before it is computed, and on a GPU "
        "launched behind it. `auto`: where a GPU computes, or fewer `threads` than there are "
        "processors.",
    )
    excluded_kernels: tuple[str, ...] = Field(
        (),
        description="Implementations that a GPU is not to use, such as `cuda` or `triton`: the "
        "next best computes what they would, which may be `flash-attention-3` or `flashinfer` "
        "where these are installed.",
    )
    swap_bytes: Annotated[int, Field(ge=0)] = Field(
        0,
        description="Memory of the host in which a GPU keeps what sequences have computed that "
        "have to give up their blocks for others, so that they go on where they were. With 0, and "
        "where layers have windows, they compute it again.",
    )
    cuda_graphs: Literal["auto", "off"] = Field(
        "auto",
        description="Whether a GPU's steps that decode are captured as graphs at start-up, which "
        "takes some seconds then and spares the host from launching kernels one by one.",
    )
    prefix_cache: bool = Field(
        True, description="Whether beginnings that prompts have in common are computed once."
    )
    speculation: SpeculationSettings = Field(
        default_factory=lambda: SpeculationSettings(),
        description="What guesses the next tokens of an answer.",
    )
    max_adapters: Annotated[int, Field(ge=0)] = Field(
        8, description="Adapters of each model that may be loaded at the same time; 0: none."
    )
    max_adapter_rank: Positive = Field(64, description="Largest rank of an adapter.")
    batcher: BatcherSettings = Field(
        default_factory=lambda: BatcherSettings.model_validate({}),
        description="Batches of a model that is an encoder.",
    )
    stream_interval_ms: Annotated[int, Field(ge=0, le=1000)] = Field(
        50,
        description="Longest time between two messages of a stream, in milliseconds. With few "
        "sequences the tokens of a stream are sent more often; the first is sent at once. 0 sends "
        "the tokens of every step.",
    )
    stall_timeout_s: Seconds = Field(
        3.0,
        description="A core silent for longer is not healthy, in seconds. Longer for a model whose "
        "largest step a modest machine does not compute in that time.",
    )
    restart_stalled_after_s: Seconds = Field(
        10.0,
        description="A core silent for longer is restarted, in seconds. Longer for a large model, "
        "as above.",
    )


class CacheSettings(ServerSettings):
    """The response cache."""

    listen: str = "127.0.0.1:50054"
    metrics_listen: str | None = "127.0.0.1:9454"
    enabled: bool = Field(True, description="Whether the gateway uses the cache.")
    default_ttl_s: Positive = Field(3600, description="How long an answer is kept, in seconds.")
    max_ttl_s: Positive = Field(
        7 * 86400, description="Longest time that a request may ask for, in seconds."
    )
    max_answer_bytes: Positive = Field(4 * 2**20, description="Largest answer kept, in bytes.")
    compress_over_bytes: Positive = Field(
        4096, description="Answers larger than this are compressed, in bytes."
    )
    lease_s: Seconds = Field(
        30.0, description="How long one caller may compute while equal ones wait, in seconds."
    )


class SafetySettings(ServerSettings):
    """The safety filter."""

    listen: str = "127.0.0.1:50055"
    metrics_listen: str | None = "127.0.0.1:9455"
    enabled: bool = Field(True, description="Whether the gateway asks the safety filter.")
    policies: dict[str, Path] = Field(
        default_factory=dict,
        description="Policy files by name. `default` replaces the policy that ships with the mesh.",
    )
    max_text_bytes: Positive = Field(
        16 * 2**20, description="Largest text checked, in bytes of UTF-8."
    )
    workers: Positive = Field(2, description="Threads that check long prompts.")
    when_unavailable: Literal["refuse", "allow"] = Field(
        "refuse", description="What the gateway does with requests while the filter is away."
    )


class ValkeySettings(Section):
    """The Redis-protocol server that holds what replicas share."""

    url: str | None = Field(
        None,
        description="`redis://`, `rediss://`, `unix://` or `redis+cluster://` URL. Default: the "
        "embedded Valkey that `meshserve up` starts.",
    )
    url_file: Path | None = Field(
        None,
        description="File with that URL. A change of it takes effect within seconds, without a "
        "restart, as soon as the server that it names answers.",
    )
    password_file: Path | None = Field(
        None,
        description="File with the password that goes with the URL, where that has none; it may "
        "change in the same way.",
    )
    embedded_port: Port = Field(50056, description="Loopback port of the embedded Valkey.")
    embedded_max_bytes: Positive = Field(
        256 * 2**20, description="Memory of the embedded Valkey, in bytes."
    )

    @model_validator(mode="after")
    def _one_url(self) -> Self:
        if self.url is not None and self.url_file is not None:
            raise ValueError("url and url_file exclude each other")
        if self.password_file is not None and self.is_embedded:
            raise ValueError("password_file goes with url or url_file")
        return self

    @property
    def is_embedded(self) -> bool:
        """Whether no server is named."""
        return self.url is None and self.url_file is None

    @property
    def effective_url(self) -> str:
        """The URL of the settings themselves, or that of the embedded server."""
        return self.url or f"redis://127.0.0.1:{self.embedded_port}/0"


class PhoenixSettings(Section):
    """Arize Phoenix, which `meshserve up --traces` starts."""

    command: Path | None = Field(
        None,
        description="Its executable. Default: `phoenix` beside MeshServe's own, in the environment "
        "`phoenix` of the cache directory, or on the `PATH`.",
    )
    port: Port = Field(6006, description="Loopback port of its pages.")
    otlp_port: Port = Field(
        4317, description="Port that it takes spans on, on every address of the machine."
    )


class TelemetrySettings(Section):
    """Traces, metrics and logs."""

    otlp_endpoint: str | None = Field(
        None,
        description="OTLP gRPC receiver of traces, for example `http://127.0.0.1:4317`. Default: "
        "traces are not exported.",
    )
    sample_ratio: Annotated[float, Field(ge=0, le=1)] = Field(
        1.0, description="Share of new traces that are recorded; a caller's own choice is kept."
    )
    trace_url: str | None = Field(
        None,
        description="Where a person looks at a trace, with `{trace_id}` in it, for example "
        "`http://localhost:16686/trace/{trace_id}`. The console links to it. Default: no links.",
    )
    openinference: bool = Field(
        False,
        description="Whether spans also carry `openinference.span.kind`, which Phoenix shows; "
        "`meshserve up --traces` sets it.",
    )
    phoenix: PhoenixSettings = Field(
        default_factory=lambda: PhoenixSettings(), description="What `up --traces` starts."
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log records written."
    )
    log_format: Literal["json", "text"] = Field("json", description="Form of log records.")
