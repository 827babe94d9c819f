"""Which web pages may call: those that the gateway served itself.

Where no API key is asked for, a page of anyone's could otherwise talk to the mesh of whoever looks
at it. It would have to name another host (DNS rebinding) or come from another site.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from aiohttp import web

from services.runtime.errors import Reason, ServiceError

_OWN_SITES = ("same-origin", "none")


def check_origin(request: web.Request) -> None:
    """Raises ServiceError (ORIGIN_NOT_ALLOWED) for a call that another site's page makes."""
    site = request.headers.get("sec-fetch-site")
    origin = request.headers.get("origin")
    if site is not None:
        is_own = site in _OWN_SITES
    else:
        is_own = origin is None or urlsplit(origin).netloc == request.host
    if not is_own:
        raise ServiceError(Reason.ORIGIN_NOT_ALLOWED, "a page of another site may not call")


def check_host(request: web.Request) -> None:
    """Raises ServiceError (ORIGIN_NOT_ALLOWED) for a name that anyone could have pointed here."""
    host = urlsplit(f"//{request.host}").hostname or ""
    if not _is_ours(host):
        raise ServiceError(
            Reason.ORIGIN_NOT_ALLOWED,
            "without API keys the gateway answers to localhost and to addresses only",
        )


def _is_ours(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
