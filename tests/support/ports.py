"""Free loopback ports."""

from __future__ import annotations

import random
import socket

# Below the ports that outgoing connections are given: one of those could take a port between the
# moment it is found free and the moment a service listens on it. A Valkey cluster listens 10,000
# above its port as well, and stays below them too.
_PORTS = range(12_000, 22_000)


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now, all different."""
    found: list[int] = []
    while len(found) < count:
        port = random.choice(_PORTS)
        if port not in found and _is_free(port):
            found.append(port)
    return found


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
