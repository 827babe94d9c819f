"""`meshserve up` over fake services: `python fake_mesh.py STATE_DIR PORT... [-- FLAGS...]`.

The flags go to the last service.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from meshserve.cli.output import lasting_console
from meshserve.supervisor.mesh import Mesh, UpOptions
from meshserve.supervisor.probes import ValkeyProbe
from meshserve.supervisor.restarts import RestartLimits
from meshserve.supervisor.spec import ProcessSpec
from meshserve.supervisor.statedir import RunningMesh, ServiceEntry, StateDir

FAKE_SERVICE = Path(__file__).with_name("fake_service.py")


def fake_spec(name: str, port: int, *flags: str, stage: int = 0, **settings: float) -> ProcessSpec:
    """A spec of a fake service."""
    return ProcessSpec(
        name=name,
        command=(sys.executable, str(FAKE_SERVICE), "--port", str(port), "--name", name, *flags),
        probe=ValkeyProbe("127.0.0.1", port),
        environment=dict(os.environ),
        stage=stage,
        **settings,
    )


async def run(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    state_path, *ports = arguments[:split]
    flags = arguments[split + 1 :]
    specs = [
        fake_spec(f"s{index}", int(port), *(flags if port == ports[-1] else ()), stop_timeout_s=60)
        for index, port in enumerate(ports)
    ]
    state = StateDir(Path(state_path))
    state.acquire()
    gateway = ServiceEntry("gateway", "127.0.0.1:1")
    mesh = Mesh(
        specs,
        RunningMesh(os.getpid(), gateway, (gateway,)),
        state,
        lasting_console(),
        UpOptions(
            show_logs=bool(os.environ.get("FAKE_MESH_LOGS")),
            greet=False,
            limits=RestartLimits(first_delay_s=0.05, max_crashes=2),
            reaper_grace_s=0.5,
        ),
    )
    try:
        return await mesh.run()
    finally:
        state.release()


if __name__ == "__main__":
    sys.exit(asyncio.run(run(sys.argv[1:])))
