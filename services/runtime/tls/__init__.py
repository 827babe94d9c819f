"""TLS between services and at the edge, with certificates that may be renewed at any time."""

from services.runtime.tls.client import ClientCredentials
from services.runtime.tls.server import ServerCertificates

__all__ = ["ClientCredentials", "ServerCertificates"]
