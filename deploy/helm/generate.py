"""Writes the schema of the chart's values and their page: `python deploy/helm/generate.py`.

A test fails while a file differs from what this would write.
"""

from __future__ import annotations

from pathlib import Path

from values_page import page_text
from values_schema import schema_text

HERE = Path(__file__).parent


def main() -> None:
    """Writes both files."""
    schema = HERE / "meshserve/values.schema.json"
    schema.write_text(schema_text(), encoding="utf-8")
    page = HERE.parents[1] / "docs/helm-values.md"
    page.write_text(page_text(), encoding="utf-8")


if __name__ == "__main__":
    main()
