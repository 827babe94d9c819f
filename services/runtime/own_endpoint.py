"""How a service is reached from its own machine, by its settings."""

from __future__ import annotations

from services.runtime.health_check import Endpoint
from services.runtime.settings import ServerSettings
from services.runtime.settings.targets import parse_target


def own_endpoint(section: ServerSettings) -> Endpoint:
    """Where this replica listens, not its `target`, which stands for others too or is known to
    peers alone. Its certificate is for that name, though."""
    address = section.model_copy(update={"target": None}).effective_target.removeprefix("dns:///")
    tls = section.tls
    if tls is None:
        return Endpoint(address)
    is_shown = tls.client_ca is not None
    names = parse_target(section.target).names if section.target is not None else ()
    return Endpoint(
        address,
        tls=True,
        ca=str((tls.ca or tls.certificate).absolute()),
        certificate=str(tls.certificate.absolute()) if is_shown else "",
        private_key=str(tls.private_key.absolute()) if is_shown else "",
        server_name=names[0].host if names else "",
    )
