"""Memory of each process of the mesh: when it has started, and after each workload.

    python -m benchmarks.mesh_memory --workloads W3 W5

Figures are the proportional set size in MiB, as in the comparison (memory.py); the last two columns
say how much of the last figure is the process's own memory, and how much its share of files that
are mapped, libraries above all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from benchmarks.memory import descendants
from benchmarks.plan import make_plan
from benchmarks.systems.meshserve_systems import Mesh
from benchmarks.workloads import SHAPES
from services.runtime.modelfiles import pull


@dataclass(frozen=True, slots=True)
class Memory:
    """Proportional set size of one process, in bytes."""

    own: int
    files: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.own + self.files

    def __add__(self, other: Memory) -> Memory:
        return Memory(self.own + other.own, self.files + other.files)


def read_memory(pid: int) -> Memory:
    """What a process takes. Raises OSError if it is gone."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, _, value = line.partition(":")
        fields[name] = int(value.split()[0]) * 1024
    return Memory(fields["Pss"] - fields["Pss_File"], fields["Pss_File"])


def process_name(command: Sequence[str]) -> str:
    """What a process of the mesh is, by its command line.

    >>> process_name(["python", "-m", "services.engine.core.process", "20"])
    'engine core'
    """
    if "-m" in command:
        module = command[command.index("-m") + 1]
        if module == "services.engine.core.process":
            return "engine core"
        return "supervisor" if module == "meshserve" else module.removeprefix("services.")
    # Valkey writes its address behind its name, into the same word.
    script = next((word for word in command[1:] if word.endswith(".py")), command[0].split()[0])
    return Path(script).stem


def snapshot(pid: int) -> dict[str, Memory]:
    """What each process of the tree takes, by its name; of one that ends meanwhile, nothing."""
    found: dict[str, Memory] = {}
    for each in descendants(pid):
        try:
            name = process_name(psutil.Process(each).cmdline())
            found[name] = found.get(name, Memory(0, 0)) + read_memory(each)
        except (OSError, psutil.Error):
            continue
    return found


def table(snapshots: Mapping[str, Mapping[str, Memory]]) -> str:
    """The snapshots, by when they were taken, as text."""
    last = snapshots[list(snapshots)[-1]]
    names = sorted(last, key=lambda name: -last[name].total)
    width = max(len(name) for name in (*names, "all"))
    lines = [" " * width + "".join(f"{when:>8}" for when in (*snapshots, "own", "files"))]
    nothing = Memory(0, 0)
    rows = {name: [each.get(name, nothing) for each in snapshots.values()] for name in names}
    rows["all"] = [sum(each.values(), nothing) for each in snapshots.values()]
    for name, row in rows.items():
        figures = [*(memory.total for memory in row), row[-1].own, row[-1].files]
        lines.append(f"{name:{width}}" + "".join(f"{each / 2**20:8.1f}" for each in figures))
    return "\n".join(lines)


def main() -> int:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mesh_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", default="smollm2-135m", help="name, path or hub id")
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--workloads", nargs="+", default=names, choices=names)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    pull(arguments.model)
    shapes = [shape for shape in SHAPES if shape.name in arguments.workloads]
    plan = make_plan(arguments.model, shapes, 1, arguments.seed)
    with Mesh("mesh", "MeshServe", arguments.model).start() as running:
        running.first_token(plan.warm_ups[0][0])
        snapshots = {"start": snapshot(running.pid)}
        for workload in plan.rounds[0]:
            running.run(workload)
            snapshots[workload.name] = snapshot(running.pid)
    print(table(snapshots))
    return 0


if __name__ == "__main__":
    sys.exit(main())
