"""Whom a client trusts and what it shows: always the last good certificates of its files."""

from __future__ import annotations

from collections.abc import Callable

import grpc

from services.runtime.file_watch import Contents, FileWatch, read_files
from services.runtime.settings import TlsSettings
from services.runtime.telemetry import Metrics
from services.runtime.tls.pem import check_pair, check_trusted


class ClientCredentials:
    """The credentials of connections to a service. Raises FilesRefusedError where there are none to
    begin with. Needs a running event loop.

    Args:
        what: the files hold, as the label of metrics.
        peer: the TLS settings of the service.
        own: those of the caller, for a service that asks for a certificate.

    Attributes:
        current: what the next connection is made with.
    """

    current: grpc.ChannelCredentials

    def __init__(
        self, what: str, peer: TlsSettings, own: TlsSettings | None, metrics: Metrics
    ) -> None:
        self._trusted = peer.ca or peer.certificate
        self._own = own if peer.client_ca else None
        self._listeners: list[Callable[[], None]] = []
        paths = [self._trusted]
        if self._own is not None:
            paths += [self._own.certificate, self._own.private_key]
        contents = read_files(paths)
        self._use(contents)
        self._watch = FileWatch(what, paths, self._take, metrics, in_use=contents)
        self._watch.start()

    async def close(self) -> None:
        """Looks for new files no more."""
        await self._watch.stop()

    def when_renewed(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Has somebody called whenever `current` is another one; returns what ends that."""
        self._listeners.append(listener)
        return lambda: self._listeners.remove(listener)

    async def _take(self, contents: Contents) -> None:
        self._use(contents)
        for listener in list(self._listeners):
            listener()

    def _use(self, contents: Contents) -> None:
        trusted, *pair = contents
        check_trusted(self._trusted, trusted)
        if self._own is None:
            self.current = grpc.ssl_channel_credentials(root_certificates=trusted)
            return
        certificate, private_key = pair
        check_pair((self._own.certificate, certificate), (self._own.private_key, private_key))
        self.current = grpc.ssl_channel_credentials(
            root_certificates=trusted, private_key=private_key, certificate_chain=certificate
        )
