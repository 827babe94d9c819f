"""What all sections of the file are made of: strictness, ranges, and what every server has."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator

from services.runtime.settings.addresses import UNIX_SOCKET, split_address
from services.runtime.settings.targets import parse_target

# Above any sensible value, and below what timers and gRPC's 32-bit options can hold.
MAX_SECONDS = 1e6
MAX_INT32 = 2**31 - 1
MAX_INT64 = 2**63 - 1

Fraction = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[int, Field(gt=0, le=MAX_INT64)]
Seconds = Annotated[float, Field(gt=0, le=MAX_SECONDS)]


def _checked_target(value: str) -> str:
    parse_target(value)
    return value


TargetText = Annotated[str, AfterValidator(_checked_target)]


class Section(BaseModel):
    """A part of the file: immutable once read, and unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
    target: TargetText | None = Field(
        None,
        description="Target under which other services find all replicas of this one, for example "
        "`dns:///tokenizer:50052`. Default: `listen`.",
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
