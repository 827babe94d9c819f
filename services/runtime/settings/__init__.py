"""The one YAML file that configures the mesh: its schema and how it is read."""

from services.runtime.settings.load import SettingsError, load_settings, parse_settings
from services.runtime.settings.schema import (
    ApiKeySettings,
    AuthSettings,
    CacheSettings,
    EngineSettings,
    GatewaySettings,
    ModelSettings,
    RateLimitSettings,
    SafetySettings,
    ServerSettings,
    Settings,
    TelemetrySettings,
    TlsSettings,
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
    "RateLimitSettings",
    "SafetySettings",
    "ServerSettings",
    "Settings",
    "SettingsError",
    "TelemetrySettings",
    "TlsSettings",
    "TokenizerSettings",
    "ValkeySettings",
    "load_settings",
    "parse_settings",
]
