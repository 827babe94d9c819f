"""What the values of the chart mean: the text of docs/helm-values.md, from the comments of
values.yaml."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

VALUES = Path(__file__).parent / "meshserve/values.yaml"


def page_text() -> str:
    """The text of docs/helm-values.md."""
    lines = [
        "# Values of the Helm chart",
        "",
        "What `helm install` takes with `--values FILE` or `--set KEY=VALUE`. The chart refuses",
        "other keys. [kubernetes.md](kubernetes.md) says how they go together, and",
        "`deploy/helm/examples` has files that a test renders. Made from the comments in",
        "`deploy/helm/meshserve/values.yaml`.",
        "",
        "| Key | Default | Meaning |",
        "|---|---|---|",
    ]
    for key, default, meaning in _described_values():
        lines.append(f"| `{key}` | {default} | {meaning} |")
    return "\n".join(lines) + "\n"


def _described_values() -> Iterator[tuple[str, str, str]]:
    """(path, default, meaning) of every value that has a comment."""
    text = VALUES.read_text(encoding="utf-8")
    values = yaml.safe_load(text)
    path: list[tuple[int, str]] = []
    comment: list[str] = []
    for line in text.splitlines():
        bare = line.strip()
        if bare.startswith("#"):
            comment.append(bare.removeprefix("#").strip())
            continue
        found = re.match(r"( *)([A-Za-z0-9./-]+):", line)
        if found is not None:
            path = [each for each in path if each[0] < len(found[1])]
            path.append((len(found[1]), found[2]))
            if comment:
                keys = [key for _, key in path]
                yield (
                    ".".join(keys),
                    _shown(_at(values, keys)),
                    " ".join(comment).replace("|", "\\|"),
                )
        comment = []


def _at(values: Any, keys: list[str]) -> Any:
    for key in keys:
        values = values[key]
    return values


def _shown(value: Any) -> str:
    """A default in a cell of a table; a mapping whose keys have rows of their own shows nothing."""
    if isinstance(value, dict) and any(isinstance(each, dict) for each in value.values()):
        is_flat = all(
            not isinstance(inner, dict)
            for each in value.values()
            if isinstance(each, dict)
            for inner in each.values()
        )
        return f"`{json.dumps(value)}`" if is_flat and "requests" in value else ""
    return f"`{json.dumps(value, ensure_ascii=False)}`"
