"""What the parts of `benchmarks.gpu` share: where they run, how they time, and what they write."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from services.engine.core.kernels.registry import REFERENCE, Op

# Written between two timed calls, so that none finds its input in the L2 cache: 50 MB on an H100.
_FLUSHED_BYTES = 256 << 20
_WARM_UPS, _REPEATS = 3, 15


@dataclass(frozen=True, slots=True)
class Row:
    """One figure.

    Attributes:
        case: what was measured, of the part.
        by: the implementation or the system.
        value: in `unit`; None: it could not be measured, and `note` says why.
        floor_s: the least time that the card's measured ceilings allow.
        seconds: what it took.
        values: further figures by their names, units included.
    """

    part: str
    case: str
    by: str
    value: float | None
    unit: str
    seconds: float | None = None
    floor_s: float | None = None
    note: str = ""
    values: dict[str, float] = field(default_factory=dict)

    @property
    def share(self) -> float | None:
        """How close to the floor it is: 1 is at it."""
        if not self.seconds or self.floor_s is None:
            return None
        return self.floor_s / self.seconds


class Bench:
    """One run of one part."""

    def __init__(self, part: str, device: torch.device, into: Path, *, tiny: bool, end: float):
        """end: in time.monotonic(), when no further case is begun."""
        self.part = part
        self.device = device
        self.tiny = tiny
        self.into = into
        self._end = end
        self._flushed: torch.Tensor | None = None
        self.ceilings: dict[str, float] = {}
        kept = into / "ceilings.json"
        if kept.exists():
            self.ceilings = json.loads(kept.read_text())

    @property
    def left_s(self) -> float:
        """Seconds before the part should be through."""
        return self._end - time.monotonic()

    def keep_ceilings(self, ceilings: dict[str, float]) -> None:
        """Remember what the card can do, for this part and those that follow."""
        self.ceilings = ceilings
        (self.into / "ceilings.json").write_text(json.dumps(ceilings))

    def floor_s(self, num_bytes: float = 0.0, flops: float = 0.0, kind: str = "bf16") -> float:
        """The least seconds for so many bytes and operations; 0 where there are no ceilings."""
        copied, computed = self.ceilings.get("copy"), self.ceilings.get(kind)
        memory = num_bytes / copied if copied else 0.0
        return max(memory, flops / computed if computed else 0.0)

    def add(self, row: Row) -> None:
        """Write a figure: what has been measured is kept, whatever happens next."""
        share = "" if row.share is None else f"{100 * row.share:6.1f} % of the floor"
        value = "-" if row.value is None else f"{row.value:12.4g} {row.unit}"
        print(f"{row.part:12} {row.case:48} {row.by:24} {value:>22} {share} {row.note}", flush=True)
        with (self.into / "rows.jsonl").open("a") as file:
            file.write(json.dumps(asdict(row) | {"share": row.share}) + "\n")

    def measure(
        self,
        case: str,
        by: str,
        run: Callable[[], Any],
        *,
        num_bytes: float = 0.0,
        flops: float = 0.0,
        kind: str = "bf16",
    ) -> None:
        """Time a function, and write what it reaches: TFLOP/s where that is its floor, else GB/s.

        One that fails is written with its message. Nothing is done once time is up.
        """
        if self.left_s <= 0:
            return
        floor = self.floor_s(num_bytes, flops, kind)
        computes = flops and (
            not num_bytes or self.floor_s(num_bytes) < self.floor_s(0, flops, kind)
        )
        unit = "TFLOP/s" if computes else "GB/s"
        try:
            seconds = self.seconds(run)
        except Exception as error:
            if isinstance(error, torch.AcceleratorError):
                raise  # nothing works any more in this process
            note = f"{type(error).__name__}: {str(error)[:200]}"
            self.add(Row(self.part, case, by, None, unit, note=note))
            return
        done = flops / 1e12 if computes else num_bytes / 1e9
        values = {"us": 1e6 * seconds}
        self.add(Row(self.part, case, by, done / seconds, unit, seconds, floor, values=values))

    def seconds(self, run: Callable[[], Any]) -> float:
        """The median time of a call.

        On a card, calls are captured in a CUDA graph where they can be, so that it is not the host
        that is timed, and the L2 cache is overwritten before each.
        """
        if self.device.type == "cpu":
            run()
            times = []
            for _ in range(2 if self.tiny else _REPEATS):
                started = time.perf_counter()
                run()
                times.append(time.perf_counter() - started)
            return statistics.median(times)
        for _ in range(_WARM_UPS):
            run()
        torch.cuda.synchronize()
        call = _captured(run) or run
        if self._flushed is None:
            self._flushed = torch.empty(_FLUSHED_BYTES, dtype=torch.uint8, device=self.device)
        events = [self._timed(call, self._flushed) for _ in range(_REPEATS)]
        torch.cuda.synchronize()
        return statistics.median(float(begin.elapsed_time(end)) for begin, end in events) / 1e3

    def _timed(self, call: Callable[[], Any], flushed: torch.Tensor) -> tuple[Any, Any]:
        """Have a call timed by the card, behind a write that leaves nothing of it in its cache."""
        event: Callable[..., Any] = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        flushed.zero_()
        begin.record()
        call()
        end.record()
        return begin, end


def _captured(run: Callable[[], Any]) -> Callable[[], None] | None:
    """The same as a graph; None where it waits for the device, and cannot be captured."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def implementations(op: Op[Any, Any]) -> dict[str, Callable[..., Any]]:
    """What an op can be computed by on a GPU, its reference included."""
    found = {REFERENCE: op.reference}
    for each in op.implementations.get("cuda", ()):
        if each.unavailable() is None:
            found[each.name] = each.run
    return found
