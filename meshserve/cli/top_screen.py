"""One screen of `meshserve top`: what is shown, and what keys change of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rich.console import Group, RenderableType
from rich.text import Text

from meshserve.cli.top_columns import Table
from meshserve.cli.top_format import Glyphs, age, cut
from meshserve.cli.top_summary import (
    CARDS_HEIGHT,
    CARDS_MIN_WIDTH,
    Trends,
    health,
    summary_cards,
    summary_lines,
)
from meshserve.cli.top_tables import engine_table, model_table, replica_table, tenant_table
from meshserve.supervisor.logview import printable
from meshserve.v1 import mesh_pb2

VIEWS = {"replicas": replica_table, "models": model_table, "tenants": tenant_table}
# Below this height lines are dearer than looks.
_CARDS_MIN_HEIGHT = 32
_MIN_HEIGHT = 10
_ARROWS = {"A": "k", "B": "j"}


@dataclass
class Screen:
    """What `meshserve top` shows.

    Attributes:
        target: which gateway it watches.
        interval_s: how often.
        view: which table is shown.
        problem: why nothing new comes; empty while it does.
    """

    target: str
    interval_s: float
    glyphs: Glyphs
    view: str = "replicas"
    problem: str = ""
    is_done: bool = False
    is_paused: bool = False
    trends: Trends = field(default_factory=Trends)
    _mesh: mesh_pb2.MeshSnapshot | None = None
    _seen_at: float = 0.0
    _sort: dict[str, str] = field(default_factory=dict)
    _offset: int = 0
    _escape: str = ""

    def take(self, mesh: mesh_pb2.MeshSnapshot) -> None:
        """Takes in the next picture; while paused the one that is shown stays."""
        self.problem = ""
        self.trends.add(mesh)
        if not self.is_paused or self._mesh is None:
            self._mesh = mesh
            self._seen_at = time.monotonic()

    def press(self, key: str) -> None:
        """A key was pressed; those that mean nothing do nothing."""
        # Arrows come as three characters.
        if self._escape or key == "\x1b":
            self._escape += key
            if len(self._escape) == 3:
                key, self._escape = _ARROWS.get(key, ""), ""
            elif self._escape not in ("\x1b", "\x1b["):
                self._escape = ""
                return
            else:
                return
        match key:
            case "q" | "Q":
                self.is_done = True
            case "p" | " ":
                self.is_paused = not self.is_paused
            case "v" | "\t":
                self._show(list(VIEWS)[(list(VIEWS).index(self.view) + 1) % len(VIEWS)])
            case "1" | "2" | "3":
                self._show(list(VIEWS)[int(key) - 1])
            case "s":
                self._sort_by_next()
            case "j":
                self._offset += 1
            case "k":
                self._offset = max(0, self._offset - 1)

    def render(self, width: int, height: int) -> RenderableType:
        """The whole screen."""
        if self._mesh is None:
            return Text(f"waiting for {self.target} {self.glyphs.ellipsis}", style="dim")
        parts: list[RenderableType] = [self._header(self._mesh, width)]
        room = max(_MIN_HEIGHT, height) - 2
        if width >= CARDS_MIN_WIDTH and height >= _CARDS_MIN_HEIGHT:
            parts.append(summary_cards(self._mesh, self.trends, width, self.glyphs))
            room -= CARDS_HEIGHT
        elif height >= _MIN_HEIGHT + 5:
            parts.extend(summary_lines(self._mesh, self.trends, width, self.glyphs))
            parts.append(Text())
            room -= 6
        body = self._body(self._mesh, width, room)
        parts.extend(body[:room])
        parts.extend([Text()] * (room - len(body)))
        parts.append(self._footer(width))
        return Group(*parts)

    def report(self, width: int) -> RenderableType:
        """All there is to say, once, on as many lines as it takes."""
        assert self._mesh is not None
        mesh, glyphs = self._mesh, self.glyphs
        parts: list[RenderableType] = [self._header(mesh, width)]
        parts.extend(summary_lines(mesh, self.trends, width, glyphs))
        for make in (replica_table, engine_table, model_table, tenant_table):
            table = make(mesh, glyphs)
            if table.rows:
                parts.append(Text())
                parts.extend(table.lines(width, len(table.rows) + 1, 0, glyphs))
        return Group(*parts)

    @property
    def _table(self) -> Table:
        assert self._mesh is not None
        return VIEWS[self.view](self._mesh, self.glyphs)

    def _show(self, view: str) -> None:
        self.view, self._offset = view, 0

    def _sort_by_next(self) -> None:
        if self._mesh is None:
            return
        keys = self._table.sort_keys
        now = self._sort.get(self.view, keys[0])
        self._sort[self.view] = keys[(keys.index(now) + 1) % len(keys)] if now in keys else keys[0]

    def _body(self, mesh: mesh_pb2.MeshSnapshot, width: int, room: int) -> list[Text]:
        """The table of the view, and as many others as there is room for; in the view of replicas
        their engines have some in any case."""
        table = self._table.sorted_by(self._sort.get(self.view, ""))
        others = [engine_table, *(make for view, make in VIEWS.items() if view != self.view)]
        below: list[Text] = []
        for make in others:
            other = make(mesh, self.glyphs)
            needed = len(other.rows) + 2
            left = room - len(table.rows) - 1 - len(below)
            if self.view == "replicas" and make is engine_table:
                needed = min(needed, max(room // 3, left))
            elif needed > left:
                continue
            if other.rows:
                below += [Text(), *other.lines(width, needed - 1, 0, self.glyphs)]
        above_room = room - len(below)
        self._offset = max(0, min(self._offset, len(table.rows) + 1 - above_room))
        return [*table.lines(width, above_room, self._offset, self.glyphs), *below]

    def _header(self, mesh: mesh_pb2.MeshSnapshot, width: int) -> Text:
        serving, total = health(mesh)
        state = f"{serving} of {total} replicas serving"
        mark = self.glyphs.marks["serving" if serving == total else "unhealthy"]
        style = "green" if serving == total else "bold red"
        right = Text(f"{mark} {state}", style=style)
        if self.problem:
            old = age(1000 * (time.monotonic() - self._seen_at))
            right = Text(f" {printable(self.problem)} ({old} old) ", style="reverse red")
        elif self.is_paused:
            right = Text(" paused ", style="reverse yellow")
        elif not mesh.window_ms:
            right = Text(f"measuring {self.glyphs.ellipsis}", style="dim")
        at = time.strftime("%H:%M:%S", time.localtime(mesh.time.seconds))
        left = Text.assemble(("meshserve top", "bold"), (f"  {self.target}  {at}", "dim"))
        right = cut(right, max(0, width - left.cell_len - 1), self.glyphs)
        gap = " " * max(1, width - left.cell_len - right.cell_len)
        return Text.assemble(left, gap, right, no_wrap=True, overflow="crop")

    def _footer(self, width: int) -> Text:
        sort = self._sort.get(self.view, self._table.sort_keys[0])
        pause = "go on" if self.is_paused else "pause"
        line = Text(no_wrap=True, overflow="crop")
        for key, meaning in (
            ("q", "quit"),
            ("v", f"view: {self.view}"),
            ("s", f"sort: {sort.lower()}"),
            ("p", pause),
            ("j/k", "scroll"),
        ):
            line.append(f" {key} ", style="reverse")
            line.append(f" {meaning}  ")
        line.truncate(width)
        return line
