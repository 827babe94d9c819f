"""Which test proves what of which family: the marker `proves`, of which docs/support.md is made.

`@pytest.mark.proves("{case}", "GPTQ", "{steps}")` names a family and columns of its table.
Parameters of the test stand in braces; of what names a family, the first word counts: "mistral,
windowed" and "bert that classifies" are a Mistral and a BERT. A test that proves something runs in
CI: there it fails where it is skipped elsewhere.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
DECODERS = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "phi3": "Phi-3",
    "gemma2": "Gemma 2",
    "gemma3": "Gemma 3",
    "gpt2": "GPT-2",
    "mixtral": "Mixtral",
    "qwen3-moe": "Qwen3-MoE",
}
ENCODERS = {
    "bert": "BERT",
    "roberta": "RoBERTa",
    "xlm-roberta": "XLM-R",
    "deberta": "DeBERTa-v2",
    "modernbert": "ModernBERT",
}
FORMATS = (
    "safetensors",
    "sharded",
    "pickled",
    "GGUF F32",
    "GGUF Q8_0",
    "GGUF Q4_K",
    "GGUF, every type",
    "GPTQ",
    "AWQ",
    "compressed-tensors",
    "FP8",
    "FP8 in blocks",
)
FEATURES = (
    "plain torch",
    "native kernels",
    "int8 weights",
    "int4 weights",
    "int8 KV cache",
    "windows",
    "chunked prefill",
    "prefix cache",
    "preemption",
    "speculation",
    "n > 1",
    "beam search",
    "structured output",
    "embeddings",
    "adapters",
    "quantize",
)
OF_ENCODERS = (
    "safetensors",
    "sharded",
    "pickled",
    "plain torch",
    "native kernels",
    "int8 weights",
    "int4 weights",
    "mixed batches",
    "embeddings",
    "classification",
    "scores",
)
# What a family does not have, so that there is nothing to prove.
HAS_NONE = {
    ("llama", "windows"),
    ("gpt2", "windows"),
    # No tool writes them.
    ("gpt2", "AWQ"),
    ("gpt2", "compressed-tensors"),
    ("gpt2", "FP8"),
    ("gpt2", "FP8 in blocks"),
    # It has no program.
    *(("deberta", column) for column in ("native kernels", "int8 weights", "int4 weights")),
}
# A test that needs one of these, or that is expected to fail, may not run in CI.
_NOT_IN_CI = ("gpu", "docker", "skip", "xfail")


def of_item(item: pytest.Item) -> Iterator[tuple[str, str]]:
    """(family, column) of all that a test proves. Raises ValueError for what no table has."""
    parameters: dict[str, Any] = {}
    if (callspec := getattr(item, "callspec", None)) is not None:
        parameters = callspec.params
    for mark in item.iter_markers("proves"):
        names = [each.format(**parameters) for each in mark.args]
        family = re.match(r"[\w-]*", names[0])
        assert family is not None
        known = (
            (*FORMATS, *FEATURES)
            if family[0] in DECODERS
            else OF_ENCODERS
            if family[0] in ENCODERS
            else ()
        )
        for column in names[1:]:
            if column not in known:
                raise ValueError(f"{item.nodeid} proves {column!r} of {names[0]!r}: there is none")
            if any(item.get_closest_marker(name) for name in _NOT_IN_CI):
                raise ValueError(f"{item.nodeid} proves {column!r}, but not in CI")
            yield family[0], column


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Have a test that proves something fail in CI where it would be skipped."""
    report = yield
    if report.skipped and os.environ.get("CI") and item.get_closest_marker("proves"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} proves what docs/support.md says, so CI does not skip it"
    return report


class _Collected:
    """Takes down what all tests of a collection prove."""

    def __init__(self) -> None:
        self.proofs: set[tuple[str, str, str]] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """A test counts once, whatever its parameters."""
        for item in items:
            name = item.nodeid.partition("[")[0]
            self.proofs |= {(family, column, name) for family, column in of_item(item)}


def collect() -> dict[tuple[str, str], list[str]]:
    """The tests, by name, that prove each (family, column): found by collecting, not by running."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "proofs.json"
        command = [sys.executable, "-m", __name__, str(path)]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if not path.exists():
            raise RuntimeError(f"the tests cannot be collected:\n{result.stdout}{result.stderr}")
        found: dict[tuple[str, str], list[str]] = {}
        for family, column, name in json.loads(path.read_text()):
            found.setdefault((family, column), []).append(name)
    return found


def main(path: Path) -> int:
    """Write what all tests prove as JSON."""
    files = sorted(
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").rglob("test_*.py")
        if "mark.proves(" in file.read_text()
    )
    collected = _Collected()
    options = ["--collect-only", "-q", "-p", "no:cacheprovider"]
    code = pytest.main([*options, *files], plugins=[collected])
    if code == 0:
        path.write_text(json.dumps(sorted(collected.proofs)))
    return int(code)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
