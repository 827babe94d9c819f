"""The public edge: who may call, how often, how much."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from services.runtime.settings.addresses import is_loopback, split_address
from services.runtime.settings.section import Positive, Seconds, Section, ServerSettings


class ApiKeySettings(Section):
    """One API key. The file holds its digest, never the key."""

    name: str = Field(description="Tenant that the key belongs to; shown in logs and metrics.")
    sha256: str = Field(
        pattern=r"^[0-9a-f]{64}$",
        description="SHA-256 of the key in hex, as `printf %s KEY | sha256sum` prints it.",
    )
    models: tuple[str, ...] = Field(
        (),
        description="Models it may use, each with its adapters, and single adapters as "
        "`MODEL:ADAPTER`. Default: all.",
    )
    requests_per_minute: Positive | None = Field(
        None, description="Requests per minute. Default: `gateway.rate_limit`."
    )
    operator: bool = Field(
        False,
        description="Whether it may see what the whole mesh does, all tenants included: "
        "`meshserve top` and the console's map.",
    )


class AuthSettings(Section):
    """Who may call."""

    mode: Literal["auto", "required", "off"] = Field(
        "auto",
        description="`auto` asks for a key unless the gateway listens on loopback alone. Where "
        "keys are asked for and none is configured, the gateway does not start.",
    )
    keys: tuple[ApiKeySettings, ...] = Field((), description="The keys.")
    keys_file: Path | None = Field(
        None,
        description="File with more keys, a YAML list in the form of `keys`. A change of it takes "
        "effect within seconds, without a restart.",
    )


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
    http_listen: str | None = Field(
        "127.0.0.1:8080",
        description="Address of the HTTP port with the web console, `HOST:PORT`; null serves none.",
    )
    auth: AuthSettings = Field(default_factory=AuthSettings, description="Who may call.")
    rate_limit: RateLimitSettings = Field(
        default_factory=RateLimitSettings, description="How often a tenant may call."
    )
    currency: str = Field(
        "USD", pattern=r"^[A-Z]{3}$", description="Currency of `models.NAME.price`, by ISO 4217."
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

    max_http_connections: Positive = Field(
        1024, description="HTTP connections to one gateway before it refuses more."
    )
    max_watchers: Positive = Field(
        64,
        description="How many may watch one gateway at a time, before it refuses more: "
        "`meshserve top`, and each live view of a console's page. A tenant that is no operator may "
        "take an eighth.",
    )

    @field_validator("http_listen")
    @classmethod
    def _http_listen_has_a_port(cls, value: str | None) -> str | None:
        if value is not None:
            split_address(value)
        return value

    @property
    def is_public(self) -> bool:
        """Whether callers can reach it from other machines."""
        return not all(is_loopback(each) for each in (self.listen, self.http_listen) if each)
