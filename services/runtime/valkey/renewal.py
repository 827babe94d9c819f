"""The client that the settings ask for, whose URL and password may come from files."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, quote, urlsplit, urlunsplit

from services.runtime.file_watch import Contents, FilesRefusedError, FileWatch, read_files
from services.runtime.settings import ValkeySettings
from services.runtime.telemetry import Metrics
from services.runtime.valkey.client import ValkeyClient, connect
from services.runtime.valkey.errors import ValkeyError, ValkeyUrlError, redacted

# Options of a URL that name files: certificates, which may be renewed.
_TLS_FILES = ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile")


def connect_as_set(settings: ValkeySettings, metrics: Metrics) -> ValkeyClient:
    """A client that goes on with another URL or password when the files of `settings` have changed,
    once it has been `start`ed.

    What they hold is used as soon as the server accepts it; until then the client keeps what it
    has. So a new password may be in the file before the server knows it, and the other way round
    for as long as no new connection is needed. Raises ValkeyUrlError.
    """
    files = [path for path in (settings.url_file, settings.password_file) if path is not None]

    def url_of(contents: Contents) -> str:
        texts = dict(zip(files, contents, strict=False))
        return _url(settings, texts)

    try:
        contents = read_files(files)
        url = url_of(contents)
        client = connect(url)
        files_of_url = _tls_files(url)
        if not files and not files_of_url:
            return client
        paths = (*files, *files_of_url)
        in_use = (*contents, *read_files(files_of_url))
    except FilesRefusedError as error:
        raise ValkeyUrlError(str(error)) from error

    async def take(changed: Contents) -> None:
        try:
            await client.use(url_of(changed))
        except (ValkeyUrlError, ValkeyError) as error:
            raise FilesRefusedError(str(error)) from error

    client.renewal = FileWatch("valkey", paths, take, metrics, in_use=in_use)
    return client


def _url(settings: ValkeySettings, contents: dict[Path, bytes]) -> str:
    url = settings.effective_url
    if settings.url_file is not None:
        url = _line(settings.url_file, contents[settings.url_file])
    if settings.password_file is None:
        return url
    password = _line(settings.password_file, contents[settings.password_file])
    try:
        parts = urlsplit(url)
    except ValueError:
        # Its text would repeat what may be a password.
        raise ValkeyUrlError("the URL of the Redis-protocol server cannot be read") from None
    user, _, host = parts.netloc.rpartition("@")
    if ":" in user:
        raise ValkeyUrlError(f"{redacted(url)}: has a password, and so has valkey.password_file")
    netloc = f"{user}:{quote(password, safe='')}@{host}"
    return urlunsplit(parts._replace(netloc=netloc))


def _line(path: Path, contents: bytes) -> str:
    """The one line that a file holds."""
    try:
        text = contents.decode().strip()
    except UnicodeDecodeError as error:
        raise ValkeyUrlError(f"{path}: is no text: {error.reason}") from None
    if not text or len(text.splitlines()) != 1:
        raise ValkeyUrlError(f"{path}: expected one line")
    return text


def _tls_files(url: str) -> list[Path]:
    options = parse_qs(urlsplit(url).query)
    return [Path(options[name][-1]) for name in _TLS_FILES if name in options]
