"""What every service shares: settings, server bootstrap, channels, errors, telemetry, models."""
