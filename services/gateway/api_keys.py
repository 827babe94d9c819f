"""The API keys in force: those of the settings, and those of a file that may change."""

from __future__ import annotations

from pathlib import Path

from services.gateway.stages.authenticate import Authenticator
from services.runtime.file_watch import Contents, FilesRefusedError, FileWatch, read_files
from services.runtime.server import StartupError
from services.runtime.settings import Settings, SettingsError, parse_keys
from services.runtime.telemetry import Metrics


class ApiKeys:
    """Has an authenticator know the keys, from the start and whenever the file has changed.

    Attributes:
        settings: with the keys in force as their `gateway.auth.keys`.
    """

    def __init__(self, settings: Settings, authenticator: Authenticator, metrics: Metrics) -> None:
        """Raises StartupError."""
        self._configured = settings
        self._authenticator = authenticator
        self.settings = settings
        self._watch: FileWatch | None = None
        path = settings.gateway.auth.keys_file
        if path is not None:
            try:
                contents = read_files([path])
                self._use(path, contents)
            except FilesRefusedError as error:
                raise StartupError(
                    f"the API keys cannot be used: {error}", "mend gateway.auth.keys_file"
                ) from error

            async def take(changed: Contents) -> None:
                self._use(path, changed)

            self._watch = FileWatch("api_keys", [path], take, metrics, in_use=contents)

    def start(self) -> None:
        """Looks for changes from now on."""
        if self._watch is not None:
            self._watch.start()

    async def stop(self) -> None:
        """Looks no more."""
        if self._watch is not None:
            await self._watch.stop()

    def _use(self, path: Path, contents: Contents) -> None:
        try:
            added = parse_keys(contents[0], self._configured, source=str(path))
        except SettingsError as error:
            raise FilesRefusedError(str(error)) from error
        gateway = self._configured.gateway
        keys = (*gateway.auth.keys, *added)
        auth = gateway.auth.model_copy(update={"keys": keys})
        self.settings = self._configured.model_copy(
            update={"gateway": gateway.model_copy(update={"auth": auth})}
        )
        self._authenticator.use(keys)
