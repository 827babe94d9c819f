"""What the mesh as a whole does, above the tables of `meshserve top`."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from rich import box
from rich.console import RenderableType
from rich.panel import Panel
from rich.table import Table as Grid
from rich.text import Text

from meshserve.cli.top_format import (
    ASCII,
    NOTHING,
    Glyphs,
    bar,
    count,
    cut,
    duration,
    joined,
    money,
    number,
    percent,
    sparkline,
)
from meshserve.v1 import mesh_pb2, monitor_pb2

TREND_LENGTH = 240
CARDS_HEIGHT = 7
CARDS_MIN_WIDTH = 144
_LABEL_WIDTH = 10
_LEAST_TREND_WIDTH = 12
_FAILURE = r"[\d.]+% failed: \w+"


@dataclass
class Trends:
    """What happened between one picture and the next, per second, for sparklines."""

    requests: deque[float] = field(default_factory=lambda: deque(maxlen=TREND_LENGTH))
    tokens: deque[float] = field(default_factory=lambda: deque(maxlen=TREND_LENGTH))
    _before: mesh_pb2.MeshSnapshot | None = None

    def add(self, mesh: mesh_pb2.MeshSnapshot) -> None:
        """Takes in the next picture."""
        before, self._before = self._before, mesh
        if before is None:
            return
        seconds = (mesh.time.ToNanoseconds() - before.time.ToNanoseconds()) / 1e9
        if seconds <= 0:
            return
        requests = mesh.traffic.requests_total - before.traffic.requests_total
        self.requests.append(max(0, requests) / seconds)
        known = {each.instance_id: each.engine for each in engines(before)}
        # An engine that was not there before tells nothing of what has happened since.
        generated = sum(
            each.engine.generated_tokens_total - known[each.instance_id].generated_tokens_total
            for each in engines(mesh)
            if each.instance_id in known
        )
        self.tokens.append(max(0, generated) / seconds)


def engines(mesh: mesh_pb2.MeshSnapshot) -> list[mesh_pb2.ReplicaOverview]:
    """The engines that answer."""
    return [
        replica
        for service in mesh.services
        for replica in service.replicas
        if replica.HasField("engine")
    ]


def health(mesh: mesh_pb2.MeshSnapshot) -> tuple[int, int]:
    """How many replicas serve, and how many there are."""
    states = [
        replica.state
        for service in mesh.services
        if service.enabled
        for replica in service.replicas
    ]
    return sum(state == monitor_pb2.REPLICA_STATE_SERVING for state in states), len(states)


def summary_lines(
    mesh: mesh_pb2.MeshSnapshot, trends: Trends, width: int, glyphs: Glyphs
) -> list[Text]:
    """Five lines."""
    facts = _Facts(mesh, glyphs)
    # A report on its own has none.
    trend_width = min(40, max(_LEAST_TREND_WIDTH, width - 68)) if trends.requests else 0
    requests = joined([facts.active, facts.failed, facts.denied], glyphs)
    tokens = joined([facts.tokens_in, facts.tokens_total], glyphs)
    lines: list[list[str | tuple[str, str]]] = [
        [*_trend("Requests", facts.requests, trends.requests, trend_width, glyphs), requests],
        [*_trend("Tokens", facts.tokens, trends.tokens, trend_width, glyphs), tokens],
        [_label("Latency"), joined(facts.latencies, glyphs)],
        [_label("Engines"), joined([facts.sequences, facts.kv, facts.preemptions], glyphs)],
        [_label("Cache"), joined([facts.cache, facts.safety, facts.found, facts.cost], glyphs)],
    ]
    return [cut(_alarming(Text.assemble(*line)), width, glyphs) for line in lines]


def summary_cards(
    mesh: mesh_pb2.MeshSnapshot, trends: Trends, width: int, glyphs: Glyphs
) -> RenderableType:
    """The same as cards side by side, CARDS_HEIGHT lines high, for wide terminals."""
    facts = _Facts(mesh, glyphs)
    inner = width // 5 - 4
    requests = [
        _big(facts.requests),
        _spark(trends.requests, inner, glyphs),
        Text(joined([facts.active, facts.requests_total], glyphs)),
        _alarming(facts.failed),
        Text(facts.denied),
    ]
    tokens = [
        _big(facts.tokens),
        _spark(trends.tokens, inner, glyphs),
        Text(facts.tokens_in),
        Text(facts.tokens_total, style="dim"),
    ]
    latencies = [
        Text(f"{'':6}{'p50':>6}{'p95':>6}{'p99':>6}", style="dim"),
        *map(Text, facts.latency_rows),
    ]
    computing = [
        _big(facts.sequences),
        facts.kv_bar(inner),
        Text(facts.kv),
        Text(facts.preemptions),
    ]
    rest = [facts.cache, facts.safety, facts.found, facts.cost, facts.cost_total]
    cards = {
        "Requests": requests,
        "Tokens": tokens,
        "Latency": latencies,
        "Engines": computing,
        "Cache, safety, cost": [Text(each) for each in rest if each],
    }
    grid = Grid.grid(expand=True)
    panels = []
    frame = box.ASCII if glyphs is ASCII else box.ROUNDED
    for title, lines in cards.items():
        grid.add_column(ratio=1)
        body = Text("\n").join(cut(line, inner, glyphs) for line in lines)
        panels.append(
            Panel(
                body,
                height=CARDS_HEIGHT,
                title=title,
                title_align="left",
                box=frame,
                border_style="dim",
            )
        )
    grid.add_row(*panels)
    return grid


class _Facts:
    """A picture in words."""

    def __init__(self, mesh: mesh_pb2.MeshSnapshot, glyphs: Glyphs) -> None:
        traffic, running = mesh.traffic, engines(mesh)
        self._glyphs = glyphs
        self.requests = f"{number(traffic.requests_per_second)}/s"
        self.requests_total = f"{count(traffic.requests_total)} so far"
        self.active = f"{count(traffic.active_requests)} active"
        failed = traffic.error_ratio if traffic.HasField("error_ratio") else None
        self.failed = "" if failed is None else f"{percent(failed)} failed"
        if failed:
            self.failed += f": {traffic.errors[0].name}"
        denials = sum(each.per_second for each in traffic.denials)
        self.denied = f"{number(denials)}/s denied" if denials else ""
        # As they are computed: the gateways count the tokens of an answer at its end.
        self.tokens = f"{number(sum(e.engine.generated_tokens_per_second for e in running))}/s out"
        self.tokens_in = f"{number(sum(e.engine.prompt_tokens_per_second for e in running))}/s in"
        self.tokens_total = (
            f"{number(traffic.completion_tokens_total)} out and "
            f"{number(traffic.prompt_tokens_total)} in so far"
        )
        self._latencies = {
            "TTFT": traffic.time_to_first_token,
            "TPOT": traffic.time_per_output_token,
            "ITL": traffic.inter_token_latency,
            "whole": traffic.duration,
        }
        waiting = sum(each.engine.waiting_sequences for each in running)
        computed = sum(each.engine.running_sequences for each in running)
        self.sequences = f"{count(computed)} running, {count(waiting)} waiting"
        blocks = sum(each.engine.kv_blocks for each in running)
        used = sum(each.engine.kv_blocks_used for each in running)
        self._kv = used / blocks if blocks else 0.0
        self.kv = f"KV cache {percent(self._kv)}"
        preempted = sum(each.engine.preemptions_per_second for each in running)
        self.preemptions = f"{number(preempted)}/s preempted" if preempted else ""
        self.cache = self._cache(mesh)
        self.safety, self.found = self._safety(mesh)
        has_cost = traffic.HasField("cost_total")
        self.cost = f"{money(traffic.cost_per_hour, mesh.currency)}/h" if has_cost else ""
        total = money(traffic.cost_total, mesh.currency)
        self.cost_total = f"{total} so far" if has_cost else ""

    @property
    def latencies(self) -> Iterable[str]:
        """Median and 95th percentile of each."""
        for name, overview in list(self._latencies.items())[:3]:
            if overview.count:
                yield f"{name} {duration(overview.p50_ms)}, p95 {duration(overview.p95_ms)}"
            else:
                yield f"{name} {NOTHING}"

    @property
    def latency_rows(self) -> Iterable[str]:
        """A row for each, under p50, p95 and p99."""
        for name, overview in self._latencies.items():
            values = (overview.p50_ms, overview.p95_ms, overview.p99_ms)
            shown = [duration(value) if overview.count else NOTHING for value in values]
            yield f"{name:6}" + "".join(f"{value:>6}" for value in shown)

    def kv_bar(self, width: int) -> Text:
        """The share of the KV cache that is in use."""
        style = "red" if self._kv >= 0.95 else "yellow" if self._kv >= 0.8 else "green"
        return Text(bar(self._kv, width, self._glyphs), style=style)

    @staticmethod
    def _cache(mesh: mesh_pb2.MeshSnapshot) -> str:
        if not mesh.HasField("response_cache"):
            return "off"
        cache = mesh.response_cache
        if not cache.HasField("hit_ratio"):
            return "idle"
        return f"hits {percent(cache.hit_ratio)} of {number(cache.lookups_per_second)}/s"

    @staticmethod
    def _safety(mesh: mesh_pb2.MeshSnapshot) -> tuple[str, str]:
        if not mesh.HasField("safety"):
            return "safety filter off", ""
        checked = f"{number(mesh.safety.checks_per_second)}/s checked"
        found = [each for each in mesh.safety.actions if each.name != "allow"]
        words = {"block": "blocked", "flag": "flagged", "redact": "redacted"}
        told = [f"{count(each.total)} {words.get(each.name, each.name)}" for each in found]
        return checked, ", ".join(told)


def _label(text: str) -> tuple[str, str]:
    return f"{text:{_LABEL_WIDTH}}", "bold"


def _trend(
    label: str, value: str, trend: Sequence[float], width: int, glyphs: Glyphs
) -> list[str | tuple[str, str]]:
    return [
        _label(label),
        (f"{value:>11} ", "bold cyan"),
        (sparkline(trend, width, glyphs), "cyan"),
        "  ",
    ]


def _alarming(text: str | Text) -> Text:
    """With what fails in red."""
    line = Text(text) if isinstance(text, str) else text
    line.highlight_regex(_FAILURE, "red")
    return line


def _big(text: str) -> Text:
    return Text(text, style="bold cyan")


def _spark(trend: Sequence[float], width: int, glyphs: Glyphs) -> Text:
    return Text(sparkline(trend, width, glyphs), style="cyan")
