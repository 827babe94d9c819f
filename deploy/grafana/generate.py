"""Writes the dashboards of Grafana as JSON: `python deploy/grafana/generate.py`.

A test fails while the files in dashboards/ differ from what this would write.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from boards.engine import engine
from boards.mesh import mesh
from boards.overview import overview
from boards.safety_and_cache import safety_and_cache
from boards.tenants import tenants
from grafana_foundation_sdk.cog.encoder import JSONEncoder

BOARDS = (overview, engine, mesh, safety_and_cache, tenants)


def main() -> None:
    """Writes one file for each dashboard."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--into", type=Path, default=Path(__file__).parent / "dashboards")
    into: Path = parser.parse_args().into
    encoder = JSONEncoder(sort_keys=True, indent=2)
    for board in BOARDS:
        built = board().build()
        # A provisioned dashboard is known by its uid; panels need numbers to be linked to.
        for number, panel in enumerate(built.panels or (), start=1):
            panel.id_val = number
        name = f"{board.__name__.replace('_', '-')}.json"
        (into / name).write_text(f"{encoder.encode(built)}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
