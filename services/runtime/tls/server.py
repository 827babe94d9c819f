"""The certificates that a service shows: always the last good ones of its files."""

from __future__ import annotations

import ssl

import grpc

from services.runtime.file_watch import Contents, FileWatch, read_files
from services.runtime.settings import TlsSettings
from services.runtime.telemetry import Metrics
from services.runtime.tls.pem import check_pair, check_trusted, load_pair


class ServerCertificates:
    """New connections get what the files held when they were last whole; connections that are there
    already stay as they are. Raises FilesRefusedError where there is nothing good to begin with.
    """

    def __init__(self, tls: TlsSettings, metrics: Metrics) -> None:
        self._tls = tls
        paths = [tls.certificate, tls.private_key]
        if tls.client_ca is not None:
            paths.append(tls.client_ca)
        contents = read_files(paths)
        self._use(contents)

        async def take(changed: Contents) -> None:
            self._use(changed)

        self._watch = FileWatch("certificate", paths, take, metrics, in_use=contents)
        metrics.read("meshserve_certificate_expiry_seconds", lambda: [((), self.expires_at)])

    def start(self) -> None:
        """Looks for new ones from now on."""
        self._watch.start()

    async def stop(self) -> None:
        """Looks no more."""
        await self._watch.stop()

    def for_grpc(self) -> grpc.ServerCredentials:
        """The credentials of a gRPC server, which asks for the certificates at each handshake."""
        given = self._for_grpc

        def fetch() -> grpc.ServerCertificateConfiguration | None:
            nonlocal given
            if given is self._for_grpc:
                return None
            given = self._for_grpc
            return given

        return grpc.dynamic_ssl_server_credentials(
            given,
            fetch,  # type: ignore[arg-type]  # None for no change, which its stubs do not know
            require_client_authentication=self._tls.client_ca is not None,
        )

    def for_http(self) -> ssl.SSLContext:
        """A context that hands each handshake on to that of the certificates in use."""
        context = self._new_context(self._contents)

        def hand_on(connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
            connection.context = self._for_http

        context.sni_callback = hand_on
        return context

    def _use(self, contents: Contents) -> None:
        tls = self._tls
        certificate, private_key, *client_ca = contents
        expires_at = check_pair((tls.certificate, certificate), (tls.private_key, private_key))
        if tls.client_ca is not None:
            check_trusted(tls.client_ca, client_ca[0])
        context = self._new_context(contents)
        self.expires_at = expires_at
        self._contents = contents
        self._for_http = context
        self._for_grpc = grpc.ssl_server_certificate_configuration(
            [(private_key, certificate)], root_certificates=client_ca[0] if client_ca else None
        )

    def _new_context(self, contents: Contents) -> ssl.SSLContext:
        tls = self._tls
        certificate, private_key, *client_ca = contents
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        load_pair(context, (tls.certificate, certificate), (tls.private_key, private_key))
        if client_ca:
            context.load_verify_locations(cadata=client_ca[0].decode())
            context.verify_mode = ssl.CERT_REQUIRED
            # Who resumes a session is not asked again for a certificate that is trusted now.
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
        return context
