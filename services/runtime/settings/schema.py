"""What can be configured, with the defaults; docs/configuration.md is generated from it."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

SERVICE_NAMES = ("gateway", "tokenizer", "engine", "cache", "safety")
DEMO_MODEL = "smollm2-135m"

# Above any sensible value, and below what timers and gRPC's 32-bit options can hold.
MAX_SECONDS = 1e6
MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(gt=0, le=MAX_INT64)]
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]
UNIX_SOCKET = ("unix:", "unix-abstract:")


class Section(BaseModel):
    """A part of the file: immutable once read, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def split_address(address: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, `[IPV6]:PORT`. Raises ValueError for anything else."""
    host, separator, port = address.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    is_port = port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535
    is_host = bool(bare) and not set(bare) & set("/[] ") and (":" in bare) == (bare != host)
    if not separator or not is_port or not is_host:
        raise ValueError(f"{address!r} is not HOST:PORT")
    return bare, int(port)


def is_loopback(address: str) -> bool:
    """Whether an address can be reached from this machine alone."""
    if address.startswith(UNIX_SOCKET):
        return True
    host, _ = split_address(address)
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class TlsSettings(Section):
    """Certificates in PEM files."""

    certificate: Path = Field(description="Certificate chain of this service.")
    private_key: Path = Field(description="Private key of the certificate.")
    ca: Path | None = Field(
        None,
        description="CA that other services trust this one by. Default: the certificate itself.",
    )
    client_ca: Path | None = Field(
        None, description="When set, clients must present a certificate that this CA signed."
    )


class ServerSettings(Section):
    """What every service has."""

    listen: str = Field(description="Address of the gRPC port, `HOST:PORT`.")
    metrics_listen: str | None = Field(
        description="Address of the Prometheus port, `HOST:PORT`; null serves no metrics."
    )
    target: str | None = Field(
        None,
        description="gRPC target under which other services find this one, for example "
        "`dns:///tokenizer:50052`; all addresses that the name has are used. Default: `listen`.",
    )
    max_message_bytes: Annotated[int, Field(gt=0, le=MAX_INT32)] = Field(
        64 * 2**20, description="Largest message taken or sent, in bytes."
    )
    drain_timeout_s: Seconds = Field(
        30.0, description="Longest wait for calls in flight at shutdown, in seconds."
    )
    tls: TlsSettings | None = Field(None, description="TLS of the gRPC port. Default: none.")

    @field_validator("listen")
    @classmethod
    def _listen_has_a_port(cls, value: str) -> str:
        if not value.startswith(UNIX_SOCKET):
            split_address(value)
        return value

    @field_validator("metrics_listen")
    @classmethod
    def _metrics_listen_has_a_port(cls, value: str | None) -> str | None:
        if value is not None:
            split_address(value)
        return value

    @property
    def effective_target(self) -> str:
        """The target, or the listening address turned into one."""
        if self.target is not None:
            return self.target
        if self.listen.startswith(UNIX_SOCKET):
            return self.listen
        host, port = split_address(self.listen)
        if host in ("0.0.0.0", "::"):
            host = "127.0.0.1" if host == "0.0.0.0" else "::1"
        return f"dns:///[{host}]:{port}" if ":" in host else f"dns:///{host}:{port}"


class SamplingDefaults(Section):
    """How tokens are drawn for requests that leave it open."""

    temperature: Annotated[float, Field(ge=0, le=100)] | None = Field(
        None, description="Divides the logits; 0 is greedy choice."
    )
    top_p: Fraction | None = Field(
        None, description="Keeps the smallest set of tokens whose probabilities reach this sum."
    )
    top_k: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Keeps this many of the likeliest tokens; 0 keeps all."
    )
    min_p: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Drops tokens less likely than this share of the likeliest one."
    )
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = Field(
        None, description="Divides or multiplies logits of tokens seen so far; 1 does nothing."
    )


class ModelSettings(Section):
    """One model that the mesh serves."""

    source: str = Field(
        description="A name from the catalogue, a local directory, a `.gguf` file or a hub id "
        "(`org/name` or `org/name@revision`)."
    )
    aliases: tuple[str, ...] = Field((), description="Other names that requests may use.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Precision of the weights as they run."
    )
    context_tokens: Positive | None = Field(
        None, description="Largest number of prompt and completion tokens. Default: the model's."
    )
    sampling: SamplingDefaults = Field(
        default_factory=lambda: SamplingDefaults.model_validate({}),
        description="Sampling of requests that leave it open. What is not set here comes from the "
        "catalogue or the model's own generation configuration.",
    )
    engine_target: str | None = Field(
        None, description="gRPC target of the engines that run it. Default: `engine.target`."
    )


class ApiKeySettings(Section):
    """One API key. The file holds its digest, never the key."""

    name: str = Field(description="Tenant that the key belongs to; shown in logs and metrics.")
    sha256: str = Field(
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of the key in hex, as `printf %s KEY | sha256sum` prints it.",
    )
    models: tuple[str, ...] = Field((), description="Models it may use. Default: all.")
    requests_per_minute: Positive | None = Field(
        None, description="Requests per minute. Default: `gateway.rate_limit`."
    )


class AuthSettings(Section):
    """Who may call."""

    mode: Literal["auto", "required", "off"] = Field(
        "auto",
        description="`auto` asks for a key unless the gateway listens on loopback alone.",
    )
    keys: tuple[ApiKeySettings, ...] = Field((), description="The keys.")


class RateLimitSettings(Section):
    """How often a tenant may call; kept in Valkey, so it holds over all gateway replicas."""

    requests_per_minute: Positive | None = Field(
        None, description="Requests per minute and tenant. Default: no limit."
    )
    burst: Positive = Field(20, description="Requests that may come at once.")
    when_unavailable: Literal["allow", "refuse"] = Field(
        "allow", description="What happens to requests while Valkey cannot be reached."
    )


class GatewaySettings(ServerSettings):
    """The public edge."""

    listen: str = "127.0.0.1:50051"
    metrics_listen: str | None = "127.0.0.1:9451"
    auth: AuthSettings = Field(default_factory=AuthSettings, description="Who may call.")
    rate_limit: RateLimitSettings = Field(
        default_factory=RateLimitSettings, description="How often a tenant may call."
    )
    default_timeout_s: Seconds = Field(
        300.0, description="Deadline of requests that bring none, in seconds."
    )
    max_prompt_bytes: Positive = Field(
        8 * 2**20, description="Largest prompt, all messages together, in bytes of UTF-8."
    )
    default_max_tokens: Positive | None = Field(
        None,
        description="Completion tokens of requests that set no `max_tokens`. Default: what the "
        "context leaves.",
    )
    max_active_requests: Positive = Field(
        1024, description="Requests in flight in one gateway before it refuses more."
    )


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


class EngineSettings(ServerSettings):
    """The engine service."""

    listen: str = "127.0.0.1:50053"
    metrics_listen: str | None = "127.0.0.1:9453"
    model: str | None = Field(
        None, description="Model that this engine runs. Default: the first of `models`."
    )
    device: str = Field(
        "auto", description="`auto` (CUDA when there is a card), `cpu` or `cuda:N`."
    )
    threads: Positive | None = Field(
        None, description="Compute threads on a CPU. Default: one per core."
    )
    block_tokens: Literal[8, 16, 32, 64, 128] = Field(
        16, description="Tokens in a block of the KV cache."
    )
    kv_cache_bytes: Positive | None = Field(
        None, description="Size of the KV cache in bytes. Default: from free memory."
    )
    kv_cache_memory_fraction: Fraction = Field(
        0.5, description="Share of the memory left beside the weights that the KV cache may take."
    )
    max_running_sequences: Positive = Field(64, description="Sequences computed in one step.")
    max_batch_tokens: Positive = Field(
        512, description="Tokens computed in one step; long prompts are computed in chunks of it."
    )
    max_waiting_sequences: Positive = Field(
        1024, description="Sequences that may wait before requests are refused."
    )
    stall_timeout_s: Seconds = Field(
        5.0, description="A core silent for longer is not healthy, in seconds."
    )
    restart_stalled_after_s: Seconds = Field(
        60.0, description="A core silent for longer is restarted, in seconds."
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
    embedded_port: Annotated[int, Field(gt=0, le=65535)] = Field(
        50056, description="Loopback port of the embedded Valkey."
    )
    embedded_max_bytes: Positive = Field(
        256 * 2**20, description="Memory of the embedded Valkey, in bytes."
    )

    @property
    def effective_url(self) -> str:
        """The URL, or that of the embedded server."""
        return self.url or f"redis://127.0.0.1:{self.embedded_port}/0"


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
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="Least severe log records written."
    )
    log_format: Literal["json", "text"] = Field("json", description="Form of log records.")


def _default_models() -> dict[str, ModelSettings]:
    return {DEMO_MODEL: ModelSettings.model_validate({"source": DEMO_MODEL})}


class Settings(Section):
    """The whole file."""

    models: dict[str, ModelSettings] = Field(
        default_factory=_default_models, description="Models by name; the first is the default."
    )
    model_cache: Path | None = Field(
        None,
        description="Where pulled models are kept. Default: `$MESHSERVE_CACHE`, or `meshserve` in "
        "the user's cache directory.",
    )
    gateway: GatewaySettings = Field(default_factory=lambda: GatewaySettings())
    tokenizer: TokenizerSettings = Field(default_factory=lambda: TokenizerSettings())
    engine: EngineSettings = Field(default_factory=lambda: EngineSettings())
    cache: CacheSettings = Field(default_factory=lambda: CacheSettings())
    safety: SafetySettings = Field(default_factory=lambda: SafetySettings())
    valkey: ValkeySettings = Field(default_factory=lambda: ValkeySettings())
    telemetry: TelemetrySettings = Field(default_factory=lambda: TelemetrySettings())

    @model_validator(mode="after")
    def _models_are_consistent(self) -> Self:
        if not self.models:
            raise ValueError("models: at least one model is needed")
        owner: dict[str, str] = {}
        for name, model in self.models.items():
            for alias in (name, *model.aliases):
                if alias in owner:
                    raise ValueError(
                        f"models: the name {alias!r} is given to {owner[alias]!r} and to {name!r}"
                    )
                owner[alias] = name
        if self.engine.model is not None and self.engine.model not in self.models:
            raise ValueError(f"engine.model: {self.engine.model!r} is not among models")
        digests: dict[str, str] = {}
        for key in self.gateway.auth.keys:
            if key.sha256 in digests:
                raise ValueError(
                    f"gateway.auth.keys: {digests[key.sha256]!r} and {key.name!r} have the same key"
                )
            digests[key.sha256] = key.name
            for model_name in key.models:
                if model_name not in owner:
                    raise ValueError(
                        f"gateway.auth.keys: key {key.name!r} names the unknown model "
                        f"{model_name!r}"
                    )
        return self

    @property
    def default_model(self) -> str:
        """The model of requests that name none."""
        return next(iter(self.models))

    @property
    def engine_model(self) -> str:
        """The model that an engine process runs."""
        return self.engine.model or self.default_model

    def server(self, service: str) -> ServerSettings:
        """The section of a service by its name."""
        section = getattr(self, service)
        assert isinstance(section, ServerSettings)
        return section
