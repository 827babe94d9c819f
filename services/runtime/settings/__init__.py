"""The one YAML file that configures the mesh: its schema and how it is read."""

from services.runtime.settings.addresses import is_loopback, split_address
from services.runtime.settings.gateway import (
    ApiKeySettings,
    AuthSettings,
    GatewaySettings,
    RateLimitSettings,
)
from services.runtime.settings.load import (
    SettingsError,
    load_settings,
    parse_keys,
    parse_settings,
)
from services.runtime.settings.models import ModelSettings, PriceSettings, SamplingDefaults
from services.runtime.settings.schema import Settings
from services.runtime.settings.section import ServerSettings, TlsSettings
from services.runtime.settings.services import (
    CacheSettings,
    EngineSettings,
    PhoenixSettings,
    SafetySettings,
    TelemetrySettings,
    TokenizerSettings,
    ValkeySettings,
)

__all__ = [
    "ApiKeySettings",
    "AuthSettings",
    "CacheSettings",
    "EngineSettings",
    "GatewaySettings",
    "ModelSettings",
    "PhoenixSettings",
    "PriceSettings",
    "RateLimitSettings",
    "SafetySettings",
    "SamplingDefaults",
    "ServerSettings",
    "Settings",
    "SettingsError",
    "TelemetrySettings",
    "TlsSettings",
    "TokenizerSettings",
    "ValkeySettings",
    "is_loopback",
    "load_settings",
    "parse_keys",
    "parse_settings",
    "split_address",
]
