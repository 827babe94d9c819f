"""The gateway, where the addresses of names are up to a test: they are in the JSON file NAMES_FILE.

NAMES_FILE=names.json python -m tests.fakes.gateway_with_names --config FILE
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from services.gateway.service import GatewayService
from services.runtime import names
from services.runtime.server import run


async def resolve(host: str) -> Sequence[str]:
    """What the file has; a name that is not in it has no address."""
    addresses: dict[str, list[str]] = json.loads(Path(os.environ["NAMES_FILE"]).read_text())
    return addresses.get(host, [])


if __name__ == "__main__":
    names.resolve = resolve
    run(GatewayService, GatewayService.name)
