"""Draws docs/images/top.svg: `meshserve top` beside a mesh with a second engine, under load.

python docs/top_picture.py
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import io
import random
import re
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from meshserve.cli.connection import Connection  # noqa: E402
from meshserve.cli.top_feed import watch  # noqa: E402
from meshserve.cli.top_format import UNICODE  # noqa: E402
from meshserve.cli.top_screen import Screen  # noqa: E402
from meshserve.errors import MeshServeError  # noqa: E402
from tests.support.mesh import Mesh  # noqa: E402
from tests.support.ports import free_ports  # noqa: E402
from tests.support.process import ServiceProcess  # noqa: E402

WIDTH, HEIGHT = 150, 32
CALLERS = 8
WATCHED_S = 25.0
PICTURE = ROOT / "docs" / "images" / "top.svg"


def key(name: str, **more: Any) -> dict[str, Any]:
    """An API key that is the name of its tenant."""
    return {"name": name, "sha256": hashlib.sha256(name.encode()).hexdigest(), **more}


OPERATOR = key("operations", operator=True)
TENANTS = [key("acme"), key("globex", requests_per_minute=240), key("initech")]
# The mesh is on this machine; a picture of it does not depend on rich's web fonts.
FONTS = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def call(mesh: Mesh, number: int, stop: threading.Event) -> None:
    """Somebody who asks one thing after another."""
    chosen = random.Random(number)
    beginning = "You are a helpful assistant. Answer in a few words. " * 4
    with mesh.client(api_key=TENANTS[number % len(TENANTS)]["name"]) as client:
        while not stop.is_set():
            question = chosen.choice(["Hello!", f"Tell me about number {chosen.random()}."])
            greedy = chosen.random() < 0.3
            with suppress(MeshServeError):
                client.stream_chat(
                    beginning + question,
                    temperature=0 if greedy else 1,
                    max_tokens=chosen.randint(10, 90),
                ).collect()
            stop.wait(chosen.random())


async def watched(target: str) -> Screen:
    """The screen after a while."""
    screen = Screen(target, 0.5, UNICODE)
    with suppress(TimeoutError):
        async with asyncio.timeout(WATCHED_S):
            async for mesh in watch(Connection(target, OPERATOR["name"], None, False), 0.5):
                screen.take(mesh)
    return screen


def main() -> None:
    """Draws it."""
    folder = Path(tempfile.mkdtemp())
    first, second, metrics_port = free_ports(3)
    mesh = Mesh(
        folder,
        {
            "engine": {
                "target": f"dns:///127.0.0.1:{first},127.0.0.1:{second}",
                "threads": 1,
                "kv_cache_bytes": 24 * 2**20,
            },
            "gateway": {"auth": {"mode": "required", "keys": [*TENANTS, OPERATOR]}},
            "models": {
                "smollm2-135m": {"dtype": "bfloat16", "price": {"prompt": 0.1, "completion": 0.4}}
            },
        },
    )
    mesh.ports["engine"] = first
    mesh.settings["engine"]["listen"] = f"127.0.0.1:{first}"
    other = copy.deepcopy(mesh.settings)
    other["engine"] |= {
        "listen": f"127.0.0.1:{second}",
        "metrics_listen": f"127.0.0.1:{metrics_port}",
    }
    stop = threading.Event()
    with mesh, ServiceProcess("engine", folder / "second", other) as engine:
        engine.wait_until_healthy()
        callers = [
            threading.Thread(target=call, args=(mesh, number, stop)) for number in range(CALLERS)
        ]
        for caller in callers:
            caller.start()
        screen = asyncio.run(watched(mesh.target))
        stop.set()
        for caller in callers:
            caller.join()
    console = Console(
        file=io.StringIO(), record=True, width=WIDTH, height=HEIGHT,
        force_terminal=True, color_system="truecolor",
    )  # fmt: skip
    console.print(screen.render(WIDTH, HEIGHT), end="")
    PICTURE.write_text(FONTS.sub("", console.export_svg(title="meshserve top")), encoding="utf-8")


if __name__ == "__main__":
    main()
