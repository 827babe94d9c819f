"""How a mesh that runs does: its services, its replicas, its models, and one answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from meshserve.async_client import AsyncClient
from meshserve.cli.connection import Connection
from meshserve.cli.doctor.findings import Finding, ok, problem, warning
from meshserve.cli.exits import command_error
from meshserve.cli.status import check_services
from meshserve.cli.top_feed import watch
from meshserve.errors import MeshServeError, PermissionDeniedError
from meshserve.health import Health
from meshserve.supervisor.greeting import generates
from meshserve.supervisor.logview import format_line
from meshserve.supervisor.statedir import RunningMesh, StateDir
from meshserve.types import Model
from meshserve.v1 import mesh_pb2, monitor_pb2

CHECK_TIMEOUT_S = 3.0
ANSWER_TIMEOUT_S = 10.0
# One that takes longer for a first token is worth a look.
SLOW_ANSWER_S = 3.0
LAST_LINES = 3
LAST_BYTES = 64 * 2**10


async def services(mesh: RunningMesh, state: StateDir) -> AsyncIterator[Finding]:
    """The health of each service of the mesh on this machine."""
    checked = await check_services(mesh, CHECK_TIMEOUT_S)
    for each in checked:
        if each.health is Health.SERVING:
            continue
        log = state.log_dir / f"{each.name}.log"
        said = "".join(f"\n  {line}" for line in last_lines(each.name, log))
        yield problem(f"the {each.name} at {each.target} is {each.health}{said}", f"see {log}")
    if all(each.health is Health.SERVING for each in checked):
        yield ok(f"all {len(checked)} services are serving")


def last_lines(name: str, log: Path) -> list[str]:
    """The end of a log, as a person reads it."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LAST_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return [format_line(name, line).plain for line in lines if line.strip()][-LAST_LINES:]


async def gateway(connection: Connection) -> AsyncIterator[Finding]:
    """What a caller gets: the models, an answer of the default one, and for operators the state of
    every replica."""
    async with AsyncClient(
        connection.target, api_key=connection.api_key, timeout=ANSWER_TIMEOUT_S, tls=connection.tls
    ) as client:
        try:
            models = await client.models()
        except MeshServeError as error:
            yield _failed("the models cannot be listed", error)
            return
        for finding in _ready(models):
            yield finding
        if generates(model for model in models if model.ready):
            yield await _answer(client)
    async for finding in _replicas(connection):
        yield finding


def _ready(models: list[Model]) -> Iterator[Finding]:
    for model in models:
        if model.ready:
            yield ok(f"the model {model.name!r} is ready")
        else:
            yield problem(
                f"the model {model.name!r} is not ready: no engine of it answers",
                "start an engine with engine.model set to it; a log of one that fails tells why",
            )


async def _answer(client: AsyncClient) -> Finding:
    started_s = time.monotonic()
    try:
        await client.generate("Hello", max_tokens=1, cache=False)
    except MeshServeError as error:
        return _failed("a request fails", error)
    took_s = time.monotonic() - started_s
    text = f"a request is answered, its first token after {1000 * took_s:.0f} ms"
    if took_s > SLOW_ANSWER_S:
        return warning(text, "`meshserve top` shows what is busy; docs/runbook.md says what to do")
    return ok(text)


async def _replicas(connection: Connection) -> AsyncIterator[Finding]:
    pictures = watch(connection, interval_s=60)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            picture = await anext(pictures)
    except PermissionDeniedError:
        yield warning(
            "the replicas were not looked at, for the key is not an operator's",
            "give the key of an operator: `operator: true` in the gateway's `auth.keys`",
        )
        return
    except (MeshServeError, TimeoutError) as error:
        reason = error if isinstance(error, MeshServeError) else None
        yield _failed("the replicas cannot be looked at", reason)
        return
    finally:
        await pictures.aclose()
    for finding in of_replicas(picture):
        yield finding


def of_replicas(picture: mesh_pb2.MeshSnapshot) -> Iterator[Finding]:
    """What a picture of the mesh tells."""
    known = [replica for service in picture.services for replica in service.replicas]
    for service in picture.services:
        if service.enabled and not service.replicas:
            yield problem(
                f"no replica of the {service.service} is known to the gateway",
                f"start one, and look at {service.service}.target in the gateway's settings",
            )
    for replica in known:
        if replica.state != monitor_pb2.REPLICA_STATE_SERVING:
            state = monitor_pb2.ReplicaState.Name(replica.state).removeprefix("REPLICA_STATE_")
            why = f": {replica.problem}" if replica.problem else ""
            yield problem(
                f"the {replica.service} at {replica.address} is "
                f"{state.lower().replace('_', ' ')}{why}",
                "look at its log; docs/runbook.md says what to do",
            )
    # Valkey has versions of its own.
    versions = {each.version for each in known if each.version and each.service != "valkey"}
    if len(versions) > 1:
        yield warning(
            f"replicas of several versions run: {', '.join(sorted(versions))}",
            "nothing is to be done while they are being replaced; else replace the older ones",
        )
    serving = sum(replica.state == monitor_pb2.REPLICA_STATE_SERVING for replica in known)
    if serving == len(known):
        yield ok(f"all {serving} replicas are serving")


def _failed(what: str, error: MeshServeError | None) -> Finding:
    if error is None:
        return problem(f"{what}: no answer in time", "`meshserve status` shows which service is it")
    shown = command_error(error)
    return problem(f"{what}: {shown.message}", shown.way_out or "docs/errors.md explains it")
