"""Whether a process of the mesh can do its work now."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request

from meshserve.errors import ConfigurationError
from meshserve.health import Health, HealthChecker
from meshserve.supervisor.spec import ProbeError
from meshserve.transport import TLS, Endpoint, make_endpoint

PROBE_TIMEOUT_S = 3.0


class GrpcProbe:
    """Asks a service's own grpc.health.v1."""

    def __init__(self, target: str, tls: TLS | bool = False) -> None:
        self._target = target
        self._tls = tls
        self._checker: HealthChecker | None = None

    async def __call__(self) -> None:
        if self._checker is None:  # a channel needs the running event loop
            self._checker = HealthChecker(self._endpoint())
        health = await self._checker.check(timeout_s=PROBE_TIMEOUT_S)
        if health is Health.SERVING:
            return
        if health is Health.UNREACHABLE and self._tls:
            # The certificates that it was trusted by may have been renewed.
            await self.close()
        raise ProbeError(f"is {health}", answered=health is Health.NOT_SERVING)

    async def close(self) -> None:
        """Closes the connection."""
        if self._checker is not None:
            checker, self._checker = self._checker, None
            await checker.close()

    def _endpoint(self) -> Endpoint:
        try:
            return make_endpoint(
                self._target, api_key="", timeout=None, tls=self._tls, metadata=None
            )
        except ConfigurationError as error:
            raise ProbeError(str(error), answered=False) from error


class ValkeyProbe:
    """PING over the Redis protocol to a server on this machine."""

    def __init__(self, host: str, port: int) -> None:
        self._host = host
        self._port = port

    async def __call__(self) -> None:
        try:
            async with asyncio.timeout(PROBE_TIMEOUT_S):
                answer = await self._ping()
        except TimeoutError:
            raise ProbeError("is silent", answered=False) from None
        except OSError:
            raise ProbeError("is unreachable", answered=False) from None
        if not answer.startswith(b"+PONG"):
            text = answer.decode("utf-8", "replace").strip()
            raise ProbeError(f"answers {text!r} to PING", answered=True)

    async def _ping(self) -> bytes:
        reader, writer = await asyncio.open_connection(self._host, self._port)
        try:
            writer.write(b"PING\r\n")
            await writer.drain()
            return await reader.readline()
        finally:
            writer.close()


class PageProbe:
    """Asks a server of pages whether it is healthy."""

    """Asks the page whether it can be shown."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def __call__(self) -> None:
        problem = await asyncio.to_thread(page_problem, self._url)
        if problem:
            raise ProbeError(problem, answered=False)


def page_problem(url: str) -> str:
    """Why the page cannot be shown now; empty if it can."""
    # Not through a proxy: it is on this machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"{url}/healthz", timeout=PROBE_TIMEOUT_S):
            return ""
    except urllib.error.HTTPError as error:
        return f"answers {error.code}"
    except OSError:
        return "is unreachable"
