"""The tables of `meshserve top`: replicas, engines, models, tenants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from meshserve.cli.top_columns import Column, Table, measured, named
from meshserve.cli.top_feed import enum_word
from meshserve.cli.top_format import (
    Glyphs,
    age,
    bar,
    count,
    duration,
    joined,
    money,
    number,
    percent,
    size,
)
from meshserve.supervisor.logview import printable
from meshserve.v1 import engine_pb2, mesh_pb2, monitor_pb2

STATE_STYLES = {
    "serving": "green",
    "starting": "yellow",
    "unhealthy": "bold yellow",
    "draining": "yellow",
    "unreachable": "bold red",
}
_BAR_WIDTH = 10


def state_word(state: monitor_pb2.ReplicaState.ValueType) -> str:
    """`serving`, `unreachable` and so on."""
    return enum_word(monitor_pb2.ReplicaState.Name(state), "ReplicaState")


def replica_table(mesh: mesh_pb2.MeshSnapshot, glyphs: Glyphs) -> Table:
    """Every replica of every service that is used."""

    def name(row: mesh_pb2.ReplicaOverview) -> str:
        return f"{glyphs.marks.get(state_word(row.state), '-')} {row.service}"

    def style(row: mesh_pb2.ReplicaOverview) -> str:
        return STATE_STYLES.get(state_word(row.state), "")

    def remark(row: mesh_pb2.ReplicaOverview) -> str:
        if not row.address:
            return "no replica is known"
        word = state_word(row.state)
        return "" if word == "serving" else joined([word, printable(row.problem)], glyphs)

    columns = [
        named("SERVICE", 11, 0, name, style),
        named("ADDRESS", 21, 0, lambda row: row.address, _reporting),
        measured("CPU", 5, 2, "cpu_cores", percent),
        measured("MEM", 5, 3, "memory_bytes", size),
        measured("ACTIVE", 6, 4, "active_calls", count),
        measured("CALLS/S", 7, 4, "calls_per_second", number),
        measured("ERR", 5, 5, "error_ratio", percent, _alarming),
        measured("P50", 6, 6, "latency.p50_ms", duration),
        measured("P95", 6, 7, "latency.p95_ms", duration),
        measured("P99", 6, 9, "latency.p99_ms", duration),
        measured("UP", 7, 8, "uptime_ms", age),
        named("VERSION", 8, 10, lambda row: row.version),
    ]
    rows = [
        replica
        for service in mesh.services
        if service.enabled
        for replica in service.replicas or [mesh_pb2.ReplicaOverview(service=service.service)]
    ]
    return Table(columns, rows, remark)


def engine_table(mesh: mesh_pb2.MeshSnapshot, glyphs: Glyphs) -> Table:
    """What the engines do, those that answer."""

    def kv_use(row: mesh_pb2.ReplicaOverview) -> float:
        return row.engine.kv_blocks_used / max(1, row.engine.kv_blocks)

    columns = [
        named("ENGINE", 16, 0, lambda row: row.address),
        named("MODEL", 14, 7, lambda row: row.engine.model),
        measured("RUN", 4, 1, "engine.running_sequences", count),
        measured("WAIT", 4, 1, "engine.waiting_sequences", count, _noticeable),
        _bars("KV CACHE", 2, kv_use, glyphs),
        measured("OUT/S", 5, 1, "engine.generated_tokens_per_second", number),
        measured("IN/S", 5, 3, "engine.prompt_tokens_per_second", number),
        measured("STEP", 6, 4, "engine.step_time.p50_ms", duration),
        measured("PREFIX", 6, 5, "engine.prefix_hit_ratio", percent),
        measured("GUESS", 5, 6, "engine.draft_acceptance_ratio", percent),
        measured("QUEUED", 6, 8, "engine.queue_time.p95_ms", duration),
        measured("BATCH", 5, 9, "engine.batch_tokens", number),
        measured("PREEMPTED", 9, 10, "engine.preemptions_total", count),
        measured("GPU", 5, 6, "engine.gpu_utilization", percent),
        measured("GPU MEM", 7, 8, "engine.gpu_memory_used_bytes", size),
        named("DEVICE", 8, 12, lambda row: row.engine.device),
    ]
    engines = [each for service in mesh.services for each in service.replicas if _is_engine(each)]
    if not any(row.engine.HasField("gpu_memory_bytes") for row in engines):
        columns = [column for column in columns if not column.title.startswith("GPU")]
    return Table(columns, engines)


def model_table(mesh: mesh_pb2.MeshSnapshot, glyphs: Glyphs) -> Table:
    """Every model over all of its engines."""

    def name(row: mesh_pb2.ModelOverview) -> str:
        return f"{glyphs.marks['serving' if row.ready else 'unreachable']} {row.model}"

    def remark(row: mesh_pb2.ModelOverview) -> str:
        waiting = row.requests_awaiting_engine
        waits = f"{waiting} waiting for one" if waiting else ""
        return "" if row.ready else joined([_absence(row), waits], glyphs)

    columns = [
        named("MODEL", 16, 0, name, lambda row: "green" if row.ready else "bold red"),
        measured("ENGINES", 7, 5, "serving_engines", count),
        measured("REQ/S", 5, 1, "requests_per_second", number),
        measured("ERR", 5, 2, "error_ratio", percent, _alarming),
        measured("OUT/S", 5, 1, "completion_tokens_per_second", number),
        measured("IN/S", 5, 3, "prompt_tokens_per_second", number),
        measured("TTFT", 6, 3, "time_to_first_token.p50_ms", duration),
        measured("P95", 6, 4, "time_to_first_token.p95_ms", duration),
        measured("TPOT", 6, 4, "time_per_output_token.p50_ms", duration),
        measured("RUN", 4, 6, "running_sequences", count),
        measured("WAIT", 4, 6, "waiting_sequences", count, _noticeable),
        _bars("KV CACHE", 7, lambda row: row.kv_use_ratio, glyphs),
        measured("REQUESTS", 9, 8, "requests_total", count),
        _costs(mesh),
    ]
    return Table(columns, mesh.models, remark)


def tenant_table(mesh: mesh_pb2.MeshSnapshot, glyphs: Glyphs) -> Table:
    """What tenants use, and may."""

    def used(row: mesh_pb2.TenantOverview) -> float | None:
        if not row.HasField("requests_per_minute_limit"):
            return None
        return 60 * row.requests_per_second / row.requests_per_minute_limit

    def failed(row: mesh_pb2.TenantOverview) -> float:
        return sum(each.per_second for each in row.errors)

    def tokens(row: mesh_pb2.TenantOverview) -> float:
        return row.prompt_tokens_total + row.completion_tokens_total

    columns = [
        named("TENANT", 16, 0, lambda row: printable(row.tenant)),
        measured("REQ/S", 5, 1, "requests_per_second", number),
        measured("LIMIT/MIN", 9, 2, "requests_per_minute_limit", number),
        measured("USED", 5, 3, used, percent, _scarce),
        measured("FAILED/S", 8, 3, failed, number, _alarming),
        measured("OUT/S", 5, 1, "completion_tokens_per_second", number),
        measured("IN/S", 5, 4, "prompt_tokens_per_second", number),
        measured("REQUESTS", 9, 5, "requests_total", count),
        measured("TOKENS", 7, 6, tokens, number),
        _costs(mesh),
    ]
    return Table(columns, mesh.tenants)


def _absence(row: mesh_pb2.ModelOverview) -> str:
    """Why no engine takes requests for a model."""
    if row.state in (engine_pb2.MODEL_STATE_UNSPECIFIED, engine_pb2.MODEL_STATE_READY):
        return "no engine serves it"
    return f"it is {enum_word(engine_pb2.ModelState.Name(row.state), 'ModelState')}"


def _reporting(replica: mesh_pb2.ReplicaOverview) -> str:
    return "bold" if replica.reporting else ""


def _is_engine(replica: mesh_pb2.ReplicaOverview) -> bool:
    return replica.HasField("engine")


def _bars(title: str, rank: int, share: Callable[[Any], float], glyphs: Glyphs) -> Column:
    def show(value: float) -> str:
        return f"{bar(value, _BAR_WIDTH, glyphs)} {percent(value):>4}"

    return replace(measured(title, _BAR_WIDTH + 5, rank, share, show, _filled), is_bar=True)


def _costs(mesh: mesh_pb2.MeshSnapshot) -> Column:
    return measured("COST", 12, 4, "cost_total", lambda value: money(value, mesh.currency))


def _alarming(value: float) -> str:
    return "red" if value else ""


def _noticeable(value: float) -> str:
    return "yellow" if value else ""


def _filled(share: float) -> str:
    return _scarce(share) or "cyan"


def _scarce(share: float) -> str:
    return "red" if share >= 0.95 else "yellow" if share >= 0.8 else ""
