"""How services reach the Redis-protocol server that holds what their replicas share."""

from services.runtime.valkey.client import ValkeyClient, connect
from services.runtime.valkey.embedded import (
    EmbeddedValkey,
    EmbeddedValkeyError,
    embedded_server_command,
)
from services.runtime.valkey.errors import (
    ValkeyError,
    ValkeyRefusedError,
    ValkeyUnavailableError,
    ValkeyUrlError,
)
from services.runtime.valkey.ratelimit import Decision, RateLimiter
from services.runtime.valkey.renewal import connect_as_set
from services.runtime.valkey.script import Script

__all__ = [
    "Decision",
    "EmbeddedValkey",
    "EmbeddedValkeyError",
    "RateLimiter",
    "Script",
    "ValkeyClient",
    "ValkeyError",
    "ValkeyRefusedError",
    "ValkeyUnavailableError",
    "ValkeyUrlError",
    "connect",
    "connect_as_set",
    "embedded_server_command",
]
